"""Singular subspaces of a weight and the angles between them, in float64.

Layout, here and in all of `pica.theory`: weights are PyTorch's, W (out, in) = A S B^T. The paper writes W0 = W^T, so its
left singular vectors U are our right ones B (directions of the input), and its right ones V are our left ones A.
A set of directions is a matrix of orthonormal rows, (r, n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated as Float  # jaxtyping's, when tests/test_shapes.py looks at what runs

import torch
from torch import Tensor

from pica.errors import BasisError, RankError


@dataclass(frozen=True)
class Spectrum:
    """Thin singular value decomposition of a weight (out, in), W = outputs^T diag(values) inputs, k = min(out, in).

    Attributes:
        outputs: Left singular vectors as rows, (k, out); the paper's V^T.
        values: Singular values in falling order, (k,).
        inputs: Right singular vectors as rows, (k, in); the paper's U^T, whose first r rows are PiCa's basis P.
    """

    outputs: Float[Tensor, "k out"]
    values: Float[Tensor, "k"]
    inputs: Float[Tensor, "k in"]


def as_matrix(weight: Float[Tensor, "out in"], name: str = "weight") -> Float[Tensor, "out in"]:
    """Make a weight fit to be measured.

    Args:
        weight: Any dtype.
        name: For messages.
    Returns:
        It in float64, without gradient, on its device.
    Raises:
        BasisError: It is not a matrix, has no entries, or holds NaN or infinity.
    """
    if weight.ndim != 2 or not weight.numel():
        raise BasisError(f"{name}: a matrix (out, in) is needed, got shape {tuple(weight.shape)}.")
    matrix = weight.detach().to(torch.float64)
    if not torch.isfinite(matrix).all():
        raise BasisError(f"{name}: holds NaN or infinity, so nothing can be said of its spectrum.")
    return matrix


def check_rank(rank: int, limit: int) -> None:
    """Raise `RankError` unless 1 <= rank <= limit."""
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= limit:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise RankError(f"rank={rank} is outside 1..{limit}, which is what this weight allows.")


def check_orthonormal(rows: Float[Tensor, "r n"], name: str) -> None:
    """Raise `BasisError` unless the rows (r, n) are orthonormal to 1e-8."""
    error = float((rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).abs().max())
    if error > 1e-8:
        raise BasisError(f"{name}: its rows are not orthonormal (off by {error:.1e}).")


def spectra_of(
    base: Float[Tensor, "out in"] | Spectrum, tuned: Float[Tensor, "out in"] | Spectrum
) -> tuple[Spectrum, Spectrum]:
    """Decompose a pair of weights, where that is not done yet.

    Args:
        base: W0 (out, in), or its spectrum.
        tuned: W* (out, in), or its spectrum.
    Returns:
        Both spectra.
    Raises:
        BasisError: See `as_matrix`; or the shapes differ.
    """
    before = base if isinstance(base, Spectrum) else spectrum(base)
    after = tuned if isinstance(tuned, Spectrum) else spectrum(tuned)
    shapes = [(s.outputs.shape[1], s.inputs.shape[1]) for s in (before, after)]
    if shapes[0] != shapes[1]:
        raise BasisError(f"base and fine-tuned weight have different shapes, {shapes[0]} and {shapes[1]}.")
    return before, after


def spectrum(weight: Float[Tensor, "out in"]) -> Spectrum:
    """Decompose a weight in float64.

    Where singular values are equal their vectors are only fixed up to a rotation; what comes out is one choice.

    Args:
        weight: (out, in), any float dtype.
    Returns:
        Its singular values and both sets of vectors.
    Raises:
        BasisError: See `as_matrix`.
    """
    left, values, right = torch.linalg.svd(as_matrix(weight), full_matrices=False)
    return Spectrum(left.T, values, right)


def sines(one: Float[Tensor, "r n"], other: Float[Tensor, "s n"]) -> Float[Tensor, "angles"]:
    """Measure the angles between two subspaces, accurately where they are small.

    Args:
        one: Orthonormal rows, (r, n).
        other: Orthonormal rows, (s, n).
    Returns:
        Sines of the principal angles, (min(r, s),), rising.
    """
    # from the part of the smaller set that lies outside the span of the larger
    small, large = (one, other) if one.shape[0] <= other.shape[0] else (other, one)
    outside = small - (small @ large.T) @ large  # (r, n)
    return torch.linalg.svdvals(outside).flip(0).clamp(max=1.0)


def principal_angles(one: Float[Tensor, "r n"], other: Float[Tensor, "s n"]) -> Float[Tensor, "angles"]:
    """Measure the angles between two subspaces, near 0 and near 90 degrees alike (Bjoerck and Golub).

    Args:
        one: Orthonormal rows, (r, n).
        other: Orthonormal rows, (s, n).
    Returns:
        Principal angles in radians, (min(r, s),), rising.
    """
    cosines = torch.linalg.svdvals(one @ other.T).clamp(max=1.0)  # falling
    return torch.atan2(sines(one, other), cosines)


def random_directions(rank: int, width: int, *, seed: int) -> Float[Tensor, "rank width"]:
    """Orthonormal rows (rank, width), uniformly distributed, from a generator of its own."""
    check_rank(rank, width)
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(width, rank, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * torch.sign(torch.diagonal(r))).T  # the signs make the distribution uniform
