"""A Llama that is built in no time, for tests that need many of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests import shared

IDS = torch.arange(3, 11)[None]


def base(seed: int = 0) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def logits(model: nn.Module) -> Tensor:
    return shared.logits(model, IDS)
