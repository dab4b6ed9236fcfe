"""Whether a stored basis is that of a weight, for the price of two passes over the weight.

A solver's work is to find singular directions; to check them takes a product with one vector. It is a random combination
of all directions, drawn anew each time, so that no file can be made to pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated as Float  # jaxtyping's, when tests/test_shapes.py looks at what runs

import torch
from torch import Tensor

from pica.basis import spectral
from pica.basis._precision import full_precision

# What a direction may be off by, relative to its gain: a correct one is off by rounding only, and another by all of it.
TOLERANCE = 0.05
# Rounding of float32, which a large gain brings into the products that belong to a small one: the solver's own limit.
ROUNDING = 1e-5


def flaw(
    weight: Float[Tensor, "out in"],
    projector: Float[Tensor, "rank width"],
    gains: Float[Tensor, "rank"],
    side: str,
    projection: str,
) -> str | None:
    """Look for a sign that a basis is not one that `solve_basis` would give for `weight`.

    The directions must be orthonormal, and W^T W p_i = gain_i^2 p_i (so they are singular directions, of those gains); and
    where they are the principal ones, no direction that is left out may be markedly longer.

    Args:
        weight: (out, in).
        projector: As in `Basis`: (rank, in) on side "in", (rank, out) on side "out"; finite, on any device.
        gains: (rank,), finite, on any device.
        side: "in" or "out".
        projection: "principal" or "minor".
    Returns:
        What shows it, for the middle of a sentence; None where nothing does.
    """
    if not len(gains):
        return "it has no direction" if bool(weight.any()) else None
    if not bool((gains > 0).all()):
        return "a gain is not positive"
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with full_precision(weight.device):
        return _flaw(weight, projector.to(weight.device, dtype), gains.to(weight.device, dtype), side, projection)


def _flaw(weight: Tensor, projector: Tensor, gains: Tensor, side: str, projection: str) -> str | None:
    # U^T means to W^T what V^T means to W. Squares of the weight's entries have to be numbers.
    rows = projector if side == "in" else projector * gains.unsqueeze(1)
    scale = 1.0 if 1e-12 < float(gains.max()) < 1e12 else float(gains.max())
    gains = gains / scale
    least, most = float(gains.min()), float(gains.max())
    generator = torch.Generator()
    generator.seed()
    signs = (torch.randint(0, 2, (len(rows),), generator=generator) * 2 - 1).to(rows)
    outside = torch.randn(rows.shape[1], generator=generator).to(rows) / least
    within = rows.T @ (signs / gains)
    if not bool(((rows @ within) * gains - signs).abs().max() <= TOLERANCE):
        return "its directions are not orthonormal"
    drawn = float(outside.norm())
    outside = outside - rows.T @ (rows @ outside)
    # W^T W keeps the span of singular directions and all that is orthogonal to it apart, so one product does for both.
    image = torch.zeros_like(outside)
    for part in _parts(weight, side, rows.dtype, scale):
        image += (part @ (within + outside)) @ part
    found = rows @ image
    size = most if projection == "principal" else float(torch.linalg.vector_norm(weight, dtype=torch.float64)) / scale
    allowed = TOLERANCE * gains + ROUNDING * size**2 / least
    if not bool(((found - signs * gains).abs() <= allowed).all()):
        return "its directions or their gains are not the weight's"
    if projection != "principal":
        return None
    rest = image - rows.T @ found
    rest = rest - rows.T @ (rows @ rest)
    energy = sum(float((part @ rest).square().sum()) for part in _parts(weight, side, rows.dtype, scale))
    # of a weight without further directions only rounding is left
    left = max(float(rest.norm()), ROUNDING * most**2 * drawn)
    if not energy <= left**2 * ((1 + TOLERANCE) ** 2 * least**2 + ROUNDING * most**2):
        return "the weight has longer directions"
    return None


def _parts(weight: Tensor, side: str, dtype: torch.dtype, scale: float) -> Iterator[Tensor]:
    """Rows of W (side "in") or of W^T, over `scale`, some at a time."""
    matrix = weight if side == "in" else weight.T
    for part in matrix.split(max(1, spectral.SLICE_ELEMENTS // matrix.shape[1])):
        yield part.to(dtype) if scale == 1.0 else part.to(dtype) / scale
