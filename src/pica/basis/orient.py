"""One deterministic rule for the sign of a direction."""

from __future__ import annotations

from typing import Annotated as Float  # jaxtyping's, when tests/test_shapes.py looks at what runs

import torch
from torch import Tensor

# Entries whose magnitude lies this close (relatively) to the largest count as ties, and the first of them decides.
# Structured weights (identity, Haar-like, block-repeated) have exact ties that rounding would otherwise break at random.
TIE = 1e-4
# Rows are looked at in slices of this many elements: magnitudes and comparisons are copies.
SLICE_ELEMENTS = 2**19


def direction_signs(directions: Float[Tensor, "k n"]) -> Float[Tensor, "k"]:
    """Sign that makes the entry of largest magnitude of each direction positive; of tied entries, the first.

    Args:
        directions: One direction a row, (k, n), any float dtype.
    Returns:
        +1 or -1 for each row, (k,), same dtype and device. A row of zeros gets +1.
    """
    if directions.numel() == 0:
        return directions.new_ones(directions.shape[0])
    parts = directions.split(max(1, SLICE_ELEMENTS // directions.shape[1]))
    return torch.cat([_signs(part) for part in parts])


def _signs(directions: Tensor) -> Tensor:
    magnitude = directions.abs()
    largest = magnitude.amax(dim=1, keepdim=True)
    first = (magnitude >= largest * (1 - TIE)).to(torch.uint8).argmax(dim=1, keepdim=True)  # argmax takes the first
    decisive = directions.gather(1, first).squeeze(1)
    return torch.where(decisive < 0, -torch.ones_like(decisive), torch.ones_like(decisive))
