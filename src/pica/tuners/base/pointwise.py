"""Convolutions with kernel 1: linear layers over channels, one a position. Views in and out of that reading."""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn

Pointwise = nn.Conv1d | nn.Conv2d | nn.Conv3d


def is_pointwise(module: nn.Module) -> TypeGuard[Pointwise]:
    """Whether a module is a convolution that acts on each position by itself: kernel 1, one group, no padding."""
    # a stride only leaves out positions, so it does not matter
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and not why_not_pointwise(module)


def why_not_pointwise(module: Pointwise) -> str:
    """What of a convolution a linear layer over channels cannot express; empty where nothing."""
    if any(size != 1 for size in module.kernel_size):
        return f"its kernel is {'x'.join(map(str, module.kernel_size))}"
    if module.groups != 1:
        return f"it has {module.groups} groups"
    if not isinstance(module.padding, str) and any(module.padding):
        return f"its padding is {'x'.join(map(str, module.padding))}"
    return ""


def read_positions(base: Pointwise, x: Tensor) -> Tensor:
    """What the convolution reads of its input, (N, channels, *places) or without N, as (N, places, channels)."""
    # A view, unless a stride leaves out places. Channels-last memory gives rows that lie in one piece, other memory columns
    # that do; `coordinates` and `add_product` take both as they are.
    if any(step != 1 for step in base.stride):
        x = x[(..., *(slice(None, None, step) for step in base.stride))]
    return as_positions(base, x)


def as_positions(base: Pointwise, images: Tensor) -> Tensor:
    """(N, channels, *places), or without N, as (N, places, channels): a view of contiguous or channels-last memory."""
    if images.ndim == len(base.kernel_size) + 1:
        images = images.unsqueeze(0)
    return images.flatten(2).mT


def as_images(positions: Tensor, like: Tensor) -> Tensor:
    """Undo `as_positions`: a view of the shape of `like`."""
    return positions.mT.reshape(like.shape)
