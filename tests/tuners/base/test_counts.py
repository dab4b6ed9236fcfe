"""Trainable parameters of full-size models, from their published configurations, on the meta device: the paper's table."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DebertaV2Config,
    GemmaConfig,
    LlamaConfig,
    PretrainedConfig,
    ViTConfig,
)

from pica import PicaConfig, coverage

GEMMA_2B = GemmaConfig(
    vocab_size=256000,
    hidden_size=2048,
    intermediate_size=16384,
    num_hidden_layers=18,
    num_attention_heads=8,
    num_key_value_heads=1,
    head_dim=256,
)
GEMMA_7B = GemmaConfig(
    vocab_size=256000,
    hidden_size=3072,
    intermediate_size=24576,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=256,
)
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
DEBERTA_V3_BASE = DebertaV2Config(
    vocab_size=128100,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
)
VIT_B_16 = ViTConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072)

QKVUD = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
ALL_SEVEN = [*QKVUD, "o_proj", "gate_proj"]


def on_meta(config: PretrainedConfig, *, causal: bool = True) -> nn.Module:
    with torch.device("meta"):
        return (AutoModelForCausalLM if causal else AutoModel).from_config(config)


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("config", "targets", "rank", "expected"),
    [
        (GEMMA_2B, QKVUD, 32, 671_744),
        (GEMMA_2B, QKVUD, 256, 5_373_952),
        (GEMMA_7B, QKVUD, 16, 638_976),
        (GEMMA_7B, QKVUD, 128, 5_111_808),
        (GEMMA_7B, QKVUD, 256, 10_223_616),
        (LLAMA_3_8B, ALL_SEVEN, 32, 1_376_256),
        (LLAMA_3_8B, ALL_SEVEN, 256, 11_010_048),
        (DEBERTA_V3_BASE, None, 16, 110_592),
        (VIT_B_16, None, 64, 442_368),
    ],
    ids=["Gemma-2B", "Gemma-2B", "Gemma-7B", "Gemma-7B", "Gemma-7B", "Llama-3-8B", "Llama-3-8B", "DeBERTa", "ViT"],
)
def test_trainable_parameters_are_the_papers(config, targets, rank, expected):
    base = on_meta(config, causal=targets is not None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="PiCa")  # no layer of these models lacks the rank
        model = get_peft_model(base, PicaConfig(r=rank, target_modules=targets))
    assert trainable(model) == expected
    assert coverage(model).trainable == expected


def test_the_default_targets_of_gemma_are_the_papers():
    model = get_peft_model(on_meta(GEMMA_2B), PicaConfig(r=32))
    assert trainable(model) == 671_744


@pytest.mark.parametrize(
    ("config", "rank", "dora", "expected"),
    [
        (GEMMA_2B, 1, False, 820_224),
        (GEMMA_2B, 32, False, 26_247_168),
        (GEMMA_2B, 1, True, 1_198_080),
        (GEMMA_2B, 16, True, 13_501_440),
    ],
    ids=["LoRA r=1", "LoRA r=32", "DoRA r=1", "DoRA r=16"],
)
def test_the_baselines_beside_them_are_the_papers(config, rank, dora, expected):
    base = on_meta(config)
    model = get_peft_model(base, LoraConfig(r=rank, target_modules=QKVUD), low_cpu_mem_usage=True)
    count = trainable(model)
    if dora:  # one magnitude a row of each weight; PEFT cannot make DoRA on the meta device (it needs weight norms)
        count += sum(m.out_features or 0 for m in base.modules() if isinstance(m, LoraLayer))
    assert count == expected


def test_sharing_decides_the_count():
    shared = get_peft_model(on_meta(GEMMA_2B), PicaConfig(r=32, target_modules=["q_proj"]))
    separate = get_peft_model(on_meta(GEMMA_2B), PicaConfig(r=32, target_modules=["q_proj"], share="none"))
    in_nines = get_peft_model(on_meta(GEMMA_2B), PicaConfig(r=32, target_modules=["q_proj"], share=9))
    assert trainable(separate) == 18 * trainable(shared)
    assert trainable(in_nines) == 2 * trainable(shared)
