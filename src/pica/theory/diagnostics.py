"""What people measure on a pair of weights: captured energy, intruder dimensions, effective and stable rank."""

from __future__ import annotations

from typing import Annotated as Float  # jaxtyping's, when tests/test_shapes.py looks at what runs
from typing import Annotated as Int

import torch
from torch import Tensor

from pica.errors import ConfigError
from pica.theory.subspaces import Spectrum, as_matrix

INTRUDER_THRESHOLD = 0.5
"""A singular vector of the fine-tuned weight is an intruder when its cosine with every one of the base stays below this."""
INTRUDER_TOP = 10
"""Only so many of the leading singular vectors are asked: in the tail, vectors mix among near ties without meaning."""


def direction_energies(update: Float[Tensor, "out in"], directions: Float[Tensor, "r in"]) -> Float[Tensor, "r"]:
    """Measure how much of an update each direction carries.

    Args:
        update: dW (out, in); transpose it to ask for directions of the output.
        directions: Orthonormal rows p_i (r, in).
    Returns:
        ||dW p_i||^2 for each of them, (r,), float64.
    """
    return (as_matrix(update, "update") @ as_matrix(directions, "directions").T).square().sum(0)


def captured_energy(update: Float[Tensor, "out in"], directions: Float[Tensor, "r in"]) -> Float[Tensor, "r"]:
    """Measure which share of an update lies in the span of the first directions.

    For directions that have nothing to do with the update the expectation is i / in (see `random_directions`).

    Args:
        update: dW (out, in).
        directions: Orthonormal rows (r, in).
    Returns:
        Share of ||dW||_F^2 in the span of the first 1, 2, ..., r rows: (r,), rising, at most 1, float64; zeros for a zero
        update.
    """
    total = float(as_matrix(update, "update").square().sum())
    energies = direction_energies(update, directions)
    return energies.cumsum(0) / total if total else torch.zeros_like(energies)


def rank_for_share(energies: Float[Tensor, "k"], share: float, *, total: float | None = None) -> int:
    """Find the rank that holds a share of the energy.

    Args:
        energies: Non-negative, (k,), in the order of the directions.
        share: Above 0, at most 1.
        total: What the share is of; the sum of `energies` if left out.
    Returns:
        Smallest r whose first r energies hold it, 1 to k; k + 1 where all together do not.
    Raises:
        ConfigError: `share` is out of range.
    """
    if not 0.0 < share <= 1.0:
        raise ConfigError(f"share={share} must lie above 0 and be at most 1, for instance 0.9.")
    whole = float(energies.sum()) if total is None else total
    # rounding in the sum must not ask for directions that hold nothing
    reached = energies.cumsum(0) >= share * whole * (1 - 1e-12)
    return int(reached.to(torch.uint8).argmax()) + 1 if bool(reached.any()) else len(energies) + 1


def intruder_dimensions(
    base: Float[Tensor, "k n"],
    tuned: Float[Tensor, "s n"],
    *,
    threshold: float = INTRUDER_THRESHOLD,
    top: int = INTRUDER_TOP,
) -> Int[Tensor, "found"]:
    """Places, among the first `top`, of fine-tuned singular vectors that resemble none of the base's.

    The definition of Shuttleworth et al. (arXiv 2410.21228): max_i |<v_i, v*_j>| < threshold, over all i.

    Args:
        base: Singular vectors of W0 as orthonormal rows (k, n), all of them.
        tuned: Singular vectors of W* as orthonormal rows in falling order of singular value (k, n).
        threshold: Cosine, between 0 and 1.
        top: Number of leading vectors of W* to ask.
    Returns:
        Indices j, rising, int64.
    Raises:
        ConfigError: `threshold` is out of range.
    """
    if not 0.0 < threshold <= 1.0:
        raise ConfigError(f"threshold={threshold} must lie above 0 and be at most 1.")
    closest = (tuned[:top] @ base.T).abs().max(dim=1).values
    return (closest < threshold).nonzero().squeeze(1)


def effective_rank(values: Float[Tensor, "k"]) -> float:
    """Count singular values by how evenly they share their sum (Roy and Vetterli 2007).

    Args:
        values: Singular values, (k,), non-negative.
    Returns:
        exp of the entropy of the values divided by their sum: 1 to k; 0 for a zero weight.
    """
    total = values.sum()
    if not float(total):
        return 0.0
    p = values / total
    return float(torch.exp(-torch.xlogy(p, p).sum()))


def stable_rank(values: Float[Tensor, "k"]) -> float:
    """Count singular values by their squares, the largest as one.

    Args:
        values: Singular values, (k,), non-negative.
    Returns:
        ||W||_F^2 / ||W||_2^2: 1 to k; 0 for a zero weight.
    """
    largest = values.max()
    return float((values / largest).square().sum()) if float(largest) else 0.0


def spectrum_rank(weight: Float[Tensor, "out in"] | Spectrum, share: float) -> int:
    """Choose a rank from the base weight alone.

    Args:
        weight: W0 (out, in), or its spectrum.
        share: Above 0, at most 1.
    Returns:
        Smallest r, at least 1, whose r largest singular values hold `share` of ||W||_F^2.
    """
    values = weight.values if isinstance(weight, Spectrum) else torch.linalg.svdvals(as_matrix(weight))
    return max(1, min(len(values), rank_for_share(values.square(), share)))
