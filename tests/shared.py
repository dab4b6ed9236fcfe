"""What many tests share: the tokens that they feed to a tiny model, and what they read from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

IDS = torch.randint(3, 96, (3, 7), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


class Logits(nn.Module):
    """A language model as a function of tokens alone, as torch.jit.trace wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits
