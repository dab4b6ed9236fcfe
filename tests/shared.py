"""What many tests share: the tokens that they feed to a tiny model, layers without one, and what they read from both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pica.tuners.base.layer import SharedLayer

IDS = torch.randint(3, 96, (3, 7), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, ids: Tensor = IDS, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **more).logits


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def layers_of(model: nn.Module) -> list[Any]:
    """The adapted layers, of either method."""
    return [m for m in model.modules() if isinstance(m, SharedLayer)]


class Blocks(nn.Module):
    """Linear layers of one role and shape, whose outputs are summed."""

    def __init__(self, inn: int, out: int, count: int = 3, bias: bool = False) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(inn, out, bias=bias)}) for _ in range(count))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([block["fc"](x) for block in self.layers]).sum(0)  # pyright: ignore


class Logits(nn.Module):
    """A language model as a function of tokens alone, as torch.jit.trace wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits
