"""What rounding to a weight's dtype leaves of its directions, and of coordinates that are read from a layer's output."""

from __future__ import annotations

from typing import Annotated as Float  # jaxtyping's, when tests/test_shapes.py looks at what runs

import torch
from torch import Tensor

# Rounding an entry errs by at most half a step, and steps are at most eps of it: eps / sqrt(12) in the mean square.
ROUNDING = 0.3
# The output's rounding reaches coordinates that are read from it this many times larger than the input's would, in the
# mean square over directions, before the input is read instead: in bfloat16 an error of 0.7%.
READING_LIMIT = 4.0
# Weights are looked at in slices of this many elements: squares are copies.
SLICE_ELEMENTS = 2**18


def clear_count(weight: Float[Tensor, "out in"], gains: Float[Tensor, "rank"]) -> int:
    """Count the leading directions of a weight that are its own.

    A weight of rank k that was rounded to float16 or bfloat16 has further directions, which the rounding made. Their
    gains are the norm of a random matrix as large as what the first k directions leave, (out - k, in - k), or less.
    Float32 and float64 weights are solved in their own precision, whose rounding is dropped there.

    Args:
        weight: (out, in), any float dtype.
        gains: |W p_i| of its directions, (rank,), falling.
    Returns:
        0 to rank; the directions from there on are made of rounding.
    """
    if weight.dtype.itemsize >= 4 or not len(gains):
        return len(gains)
    step = ROUNDING * torch.finfo(weight.dtype).eps
    if float(gains.min()) > 2 * step * float(gains.max()):  # no row or column is longer than the first direction
        return len(gains)
    rows, columns = (float(found.max()) for found in norms(weight))
    (m, n), index = weight.shape, torch.arange(len(gains), dtype=torch.float64)
    # of a weight whose entries are alike: |W|_F (sqrt(m - k) + sqrt(n - k)) / sqrt(m n)
    noise = columns * (1 - index / m).sqrt() + rows * (1 - index / n).sqrt()
    lost = gains.double().cpu() <= step * noise
    return int(lost.to(torch.uint8).argmax()) if bool(lost.any()) else len(gains)


def norms(weight: Float[Tensor, "out in"]) -> tuple[Float[Tensor, "out"], Float[Tensor, "in"]]:
    """Norms of the rows (out,) and of the columns (in,), float64."""
    found = _by_rows_and_columns(weight, torch.float32)
    size = float(found[0].max()) if len(found[0]) else 0.0
    if 1e-12 < size < 1e12:
        return found
    return _by_rows_and_columns(weight, torch.float64)  # squares that overflow or vanish in float32


def _by_rows_and_columns(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, squares = [], torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for part in weight.split(max(1, SLICE_ELEMENTS // max(1, weight.shape[1]))):
        square = part.to(dtype).square()
        rows.append(square.sum(1).double())
        squares += square.sum(0)
    return torch.cat(rows).sqrt_(), squares.sqrt_()


def readable(w: Float[Tensor, "out in"], scale: float, gains: Float[Tensor, "rank"]) -> bool:
    """Whether coordinates are to be read from the layer's output, as S^-1 U^T W x: it is smaller, and as good as its input.

    Rounding of the output, whose entries are |W|_F / sqrt(out) for an input of entries of one, is divided by a
    direction's gain; outputs may be rounded to half precision whatever the weight's dtype is (autocast). And the entries of
    S^-1 U^T, 1 / (gain sqrt(out)) or so, must be numbers of the weight's dtype.

    Args:
        w: The weight over `scale`, (out, in).
        scale: What it was divided by.
        gains: |w p_i| of the directions, (rank,).
    Returns:
        Whether the coordinates are to be read there, which is side "out".
    """
    if w.shape[1] <= w.shape[0]:
        return False
    if not len(gains):
        return True
    size = float(norms(w)[0].square_().mean().sqrt_())
    info = torch.finfo(w.dtype)
    least, most = 1 / (float(gains.max()) * scale * w.shape[0] ** 0.5), 1 / (float(gains.min()) * scale)
    held = least >= 100 * info.tiny * info.eps and most <= info.max
    return held and float((size / gains).square().mean().sqrt()) <= READING_LIMIT
