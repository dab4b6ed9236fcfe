"""Tiny models with PiCa adapters whose matrices are not zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import pica
from pica.tuners.base.bank import get_bank

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def adapted(base: nn.Module, *, seed: int = 0, scale: float = 0.05, **options: Any) -> PeftModel:
    """`base` with an adapter that looks trained: matrices with a falling spectrum, so that truncation means something."""
    model = get_peft_model(base, pica.PicaConfig(**{"r": 12, "target_modules": TARGETS, **options}))  # pyright: ignore[reportArgumentType]
    assert isinstance(model, PeftModel)
    generator = torch.Generator().manual_seed(seed)
    bank = get_bank(model.get_base_model())
    assert bank is not None
    for matrix in bank.matrices("default").values():
        out, rank = matrix.shape
        left, right = torch.randn(out, rank, generator=generator), torch.randn(rank, rank, generator=generator)
        fall = torch.linspace(1.0, 0.1, rank).square()
        matrix.data = (scale * (left * fall) @ right).to(matrix)
    return model.eval()


@pytest.fixture
def pica_llama(tiny_llama: Callable[..., nn.Module]) -> Callable[..., PeftModel]:
    """Factory of tiny Llamas with an adapter: keyword arguments of `PicaConfig`, and `dtype` of the base."""

    def make(dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
        return adapted(tiny_llama(dtype=dtype), **options)

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    """A batch of token ids, (2, 12)."""
    return torch.randint(3, 96, (2, 12), generator=torch.Generator().manual_seed(3))
