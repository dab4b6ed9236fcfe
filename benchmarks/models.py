"""Models to measure on: a folder that the user names, or random weights in the shapes of a published model (no download)."""

from __future__ import annotations

import copy
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


FEW_WORDS = 1024
"""Vocabulary of a model that is cut to some of its layers, so that the layers are what is timed."""


def load(name: str, dtype: torch.dtype, device: str = "cpu", layers: int | None = None) -> PreTrainedModel:
    """The model in a folder, or one with random weights in the shapes of `SHAPES[name]`; the same weights each time.

    Args:
        layers: So many layers of the shapes and a vocabulary of `FEW_WORDS`; None for the whole model.
    """
    if name in SHAPES:
        torch.manual_seed(0)
        config = copy.deepcopy(SHAPES[name])
        if layers is not None:
            config.update({"num_hidden_layers": layers, "vocab_size": FEW_WORDS})
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    if layers is not None:
        raise SystemExit(f"--layers is for the shapes {', '.join(SHAPES)}, not for a model in a folder.")
    model = AutoModelForCausalLM.from_pretrained(Path(name).expanduser(), dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    return model.to(torch.device(device))  # pyright: ignore[reportArgumentType] - transformers' wrapper hides torch's signature


def title(name: str, layers: int | None = None) -> str:
    if name not in SHAPES:
        return Path(name).expanduser().name
    part = f"{layers} of its layers and {FEW_WORDS:,} words, " if layers else ""
    return f"{name} shapes, {part}random weights"
