"""Models to measure on: a folder that the user names, or random weights in the shapes of a published model (no download)."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, PretrainedConfig, PreTrainedModel

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]

SHAPES: dict[str, PretrainedConfig] = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "gemma-2b": GemmaConfig(
        vocab_size=256000,
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
    ),
    "llama-3-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
}


def load(name: str, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """The model in a folder, or one with random weights in the shapes of `SHAPES[name]`; the same weights each time."""
    if name in SHAPES:
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(SHAPES[name], dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(Path(name).expanduser(), dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    return model.to(torch.device(device))  # pyright: ignore[reportArgumentType] - transformers' wrapper hides torch's signature


def title(name: str) -> str:
    return f"{name} shapes, random weights" if name in SHAPES else Path(name).expanduser().name
