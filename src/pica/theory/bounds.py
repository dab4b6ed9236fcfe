"""Lemma 3.1 (Wedin) and the inequalities that the paper's appendix uses, each as both of its sides."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated as Float  # jaxtyping's, when tests/test_shapes.py looks at what runs
from typing import Literal

import torch
from torch import Tensor

from pica.errors import BasisError
from pica.theory.subspaces import Spectrum, as_matrix, check_orthonormal, check_rank, sines, spectra_of

Norm = Literal["spectral", "frobenius"]


@dataclass(frozen=True)
class Inequality:
    """left <= right, as measured."""

    left: float
    right: float

    def holds(self, *, rounding: float = 1e-10) -> bool:
        """Whether it does, up to a relative error of float64 arithmetic on both sides."""
        return self.left <= self.right + rounding * max(abs(self.left), abs(self.right))


@dataclass(frozen=True)
class WedinBound:
    """Lemma 3.1 for one weight and one rank.

    Attributes:
        sine_in: Norm of the sines between the top-r input directions of W0 and W* (the paper's left subspaces).
        sine_out: The same of the output directions.
        update: ||dW|| in the chosen norm.
        gap: delta = sigma_r(W0) - sigma_{r+1}(W*), with sigma_{k+1} = 0 past the last.
        gap_before: sigma_r(W0) - sigma_{r+1}(W0) - ||dW||_2, which Weyl's inequality puts below `gap`: what can be said
            before fine-tuning from the size of the update alone.
        largest: The largest value that the sines of any two such subspaces can have in this norm.
    """

    sine_in: float
    sine_out: float
    update: float
    gap: float
    gap_before: float
    largest: float

    @property
    def bound(self) -> float:
        """||dW|| / delta; infinite where the gap is not positive and the lemma says nothing."""
        return self.update / self.gap if self.gap > 0 else math.inf

    @property
    def vacuous(self) -> bool:
        """Whether the bound excludes nothing."""
        return self.bound >= self.largest

    @property
    def inequality(self) -> Inequality:
        return Inequality(max(self.sine_in, self.sine_out), self.bound)


def wedin(
    base: Float[Tensor, "out in"] | Spectrum,
    tuned: Float[Tensor, "out in"] | Spectrum,
    update: Float[Tensor, "out in"],
    rank: int,
    norm: Norm = "spectral",
    *,
    update_values: Float[Tensor, "k"] | None = None,
) -> WedinBound:
    """Lemma 3.1: a small update keeps the principal subspaces.

    With delta = sigma_r(W0) - sigma_{r+1}(W*) > 0 and a unitarily invariant norm, the sines of the angles between the
    top-r singular subspaces of W0 and W*, on either side, are at most ||dW|| / delta.

    Args:
        base: W0 (out, in), or its spectrum.
        tuned: W* (out, in), or its spectrum.
        update: dW = W* - W0.
        rank: r, 1 <= r <= min(out, in).
        norm: "spectral": of the largest angle. "frobenius": root of the sum of squares over all angles.
        update_values: Singular values of dW in falling order, where they are known already.
    Returns:
        The sines of both sides and what bounds them.
    Raises:
        RankError: `rank` is out of range.
        BasisError: A weight is unusable, or the shapes differ.
    """
    before, after = spectra_of(base, tuned)
    delta = as_matrix(update, "update")
    check_rank(rank, len(before.values))
    top = float(before.values[rank - 1])
    next_before, next_after = (float(s.values[rank]) if rank < len(s.values) else 0.0 for s in (before, after))
    values = torch.linalg.svdvals(delta) if update_values is None else update_values
    spectral = float(values.max())
    angles = [
        sines(before.inputs[:rank], after.inputs[:rank]),
        sines(before.outputs[:rank], after.outputs[:rank]),
    ]
    if norm == "spectral":
        size, measured, largest = spectral, [float(a.max()) for a in angles], 1.0
    else:
        size, measured = float(delta.norm()), [float(a.norm()) for a in angles]
        largest = math.sqrt(min(rank, max(delta.shape) - rank)) if max(delta.shape) > rank else 0.0
    return WedinBound(measured[0], measured[1], size, top - next_after, top - next_before - spectral, largest)


def weyl(base: Float[Tensor, "out in"], tuned: Float[Tensor, "out in"]) -> Inequality:
    """Weyl: no singular value moves by more than the update's largest.

    Args:
        base: W0 (out, in).
        tuned: W* (out, in).
    Returns:
        max_i |sigma_i(W*) - sigma_i(W0)| <= ||dW||_2.
    """
    before, after = as_matrix(base), as_matrix(tuned)
    _same_shape(before, after)
    moved = (torch.linalg.svdvals(after) - torch.linalg.svdvals(before)).abs().max()
    return Inequality(float(moved), float(torch.linalg.matrix_norm(after - before, 2)))


def mirsky(base: Float[Tensor, "out in"], tuned: Float[Tensor, "out in"]) -> Inequality:
    """Mirsky, Weyl's inequality in the Frobenius norm: sqrt(sum_i (sigma_i(W*) - sigma_i(W0))^2) <= ||dW||_F."""
    before, after = as_matrix(base), as_matrix(tuned)
    _same_shape(before, after)
    moved = (torch.linalg.svdvals(after) - torch.linalg.svdvals(before)).norm()
    return Inequality(float(moved), float((after - before).norm()))


def norm_invariance(weight: Float[Tensor, "out in"], rotation: Float[Tensor, "in in"]) -> Inequality:
    """A rotation of its input does not change a weight's norm.

    Args:
        weight: W (out, in).
        rotation: Q (in, in), orthogonal.
    Returns:
        ||W Q||_F and ||W||_F, which are equal up to rounding.
    Raises:
        BasisError: `rotation` is not orthogonal to 1e-8.
    """
    matrix, q = as_matrix(weight), as_matrix(rotation, "rotation")
    check_orthonormal(q, "rotation")
    return Inequality(float((matrix @ q).norm()), float(matrix.norm()))


def non_expansiveness(weight: Float[Tensor, "out in"], directions: Float[Tensor, "r in"]) -> Inequality:
    """An orthogonal projection does not expand.

    Args:
        weight: W (out, in).
        directions: P, orthonormal rows (r, in).
    Returns:
        ||W P^T P||_F <= ||W||_F.
    Raises:
        BasisError: The rows are not orthonormal to 1e-8.
    """
    matrix, rows = as_matrix(weight), as_matrix(directions, "directions")
    check_orthonormal(rows, "directions")
    return Inequality(float(((matrix @ rows.T) @ rows).norm()), float(matrix.norm()))


def _same_shape(before: Tensor, after: Tensor) -> None:
    if before.shape != after.shape:
        raise BasisError(
            f"base and fine-tuned weight have different shapes, {tuple(before.shape)} and {tuple(after.shape)}."
        )
