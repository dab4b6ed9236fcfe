"""Theorem 1: how much of an update is lost when it is projected onto the base weight's principal column space.

The paper writes the fine-tuned weight as W* = (U P) S* (V Q)^T with P = I + E_P, Q = I + E_Q, every entry of E below
epsilon, and states ||dW - U_r U_r^T dW||_F^2 <= sum_{i>r} sigma_i(dW)^2 + O(epsilon). Two things have to be added before
that is a statement one can compute with. Write (in the paper's layout)

    dW = U (S* - S) V^T  +  (W* - U S* V^T)  =  stretch + turn,

the singular values changing in place, and the singular vectors turning.

1. The O(epsilon) term. turn = U (E_P S* Q^T + S* E_Q^T) V^T, so ||turn||_F <= epsilon (sqrt(m) + sqrt(n)) ||W*||_F: it
   scales with the norm of the WEIGHT, not of the update.
2. The order. Even for epsilon = 0 the projection loses sum_{i>r} (s*_i - s_i)^2, which is the Eckart-Young optimum only
   if the r singular values that change most are the first r. An update that raises only the last singular value has
   epsilon = 0, rank one, optimum zero, and is lost wholly. The statement therefore needs a term for what the stretch
   has in the wrong place, `misplaced`, or the assumption that it has nothing there.

With both, for every pair of weights:

    residual <= ( sqrt( (tail(dW) + ||turn||)^2 + misplaced ) + ||turn beyond r|| )^2,   tail(dW)^2 = optimum

(triangle inequality; the best rank-r error is 1-Lipschitz in the Frobenius norm).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated as Float  # jaxtyping's, when tests/test_shapes.py looks at what runs

import torch
from torch import Tensor

from pica.theory.bounds import Inequality
from pica.theory.subspaces import Spectrum, as_matrix, check_rank, spectra_of, spectrum


@dataclass(frozen=True)
class Perturbations:
    """E_P and E_Q of W* = (U P) S* (V Q)^T, on the k = min(out, in) singular directions.

    Attributes:
        inputs: E_P, (k, k): entry (i, j) is <u_i, u*_j> - [i = j] for the paper's u, directions of the input.
        outputs: E_Q, (k, k), the same for directions of the output.
        inputs_leak: (k,), norm of the part of u*_j outside the span of all k directions of W0; 0 where in <= out.
        outputs_leak: (k,), the same of v*_j; 0 where out <= in.
    """

    inputs: Float[Tensor, "k k"]
    outputs: Float[Tensor, "k k"]
    inputs_leak: Float[Tensor, "k"]
    outputs_leak: Float[Tensor, "k"]

    @property
    def epsilon(self) -> float:
        """Largest entry of E_P and E_Q in magnitude; the part outside the k directions counts as one entry each."""
        parts = (self.inputs, self.outputs, self.inputs_leak, self.outputs_leak)
        return max(float(part.abs().max()) for part in parts)


def perturbations(base: Float[Tensor, "out in"] | Spectrum, tuned: Float[Tensor, "out in"] | Spectrum) -> Perturbations:
    """Measure how far fine-tuning turned the singular vectors, with W*'s arbitrary signs chosen to fit W0's.

    The j-th singular vectors of both weights are compared, so two singular values that changed places, or a rotation among
    (nearly) equal ones, give entries of order 1 however small the update: E is of size ||dW|| / (distance between
    singular values), see `first_order_perturbations`. A small E is an assumption on the spectrum too.

    Args:
        base: W0 (out, in), or its spectrum.
        tuned: W* (out, in), or its spectrum.
    Returns:
        E_P and E_Q, and what of W*'s vectors lies outside of W0's.
    """
    before, after = spectra_of(base, tuned)
    p, q = before.inputs @ after.inputs.T, before.outputs @ after.outputs.T  # (k, k)
    signs = torch.where(torch.diagonal(p) + torch.diagonal(q) < 0, -1.0, 1.0).to(p.dtype)
    p, q = p * signs, q * signs
    eye = torch.eye(len(p), dtype=p.dtype, device=p.device)
    leaks = []
    for one, other in ((before.inputs, after.inputs), (before.outputs, after.outputs)):
        outside = other - (other @ one.T) @ one if one.shape[0] < one.shape[1] else torch.zeros_like(other[:, :1])
        leaks.append(outside.norm(dim=1))
    return Perturbations(p - eye, q - eye, *leaks)


def first_order_perturbations(
    base: Float[Tensor, "out in"] | Spectrum, update: Float[Tensor, "out in"]
) -> tuple[Float[Tensor, "k k"], Float[Tensor, "k k"]]:
    """Predict E_P and E_Q to first order in dW.

    With N = U^T dW V in the paper's layout: E_P[i, j] = (s_j N_ij + s_i N_ji) / (s_j^2 - s_i^2) and
    E_Q[i, j] = (s_i N_ij + s_j N_ji) / (s_j^2 - s_i^2).

    Args:
        base: W0 (out, in), or its spectrum.
        update: dW (out, in).
    Returns:
        E_P and E_Q off the diagonal, (k, k) each, float64, infinite or NaN for equal singular values.
    """
    before = base if isinstance(base, Spectrum) else spectrum(base)
    delta = as_matrix(update, "update")
    n = before.inputs @ delta.T @ before.outputs.T  # (k, k), the paper's U^T dW V
    row, column = before.values[:, None], before.values[None, :]  # s_i, s_j
    distance = column.square() - row.square()
    parts = []
    for numerator in (column * n + row * n.T, row * n + column * n.T):
        e = numerator / distance
        e.fill_diagonal_(0.0)
        parts.append(e)
    return parts[0], parts[1]


@dataclass(frozen=True)
class ProjectionError:
    """Theorem 1 for one weight and one rank; squared Frobenius norms unless said otherwise.

    Attributes:
        total: ||dW||^2.
        residual: ||dW - U_r U_r^T dW||^2, what PiCa's subspace of rank r cannot hold.
        optimum: sum_{i>r} sigma_i(dW)^2, what no subspace of rank r can hold (Eckart and Young).
        misplaced: What the change of the singular values has beyond place r above its own best rank r; 0 in the paper.
        turn: ||W* - U S* V^T||_F, the turning of the singular vectors (not squared).
        turn_beyond: The same outside U_r (not squared).
        epsilon: Largest entry of E_P and E_Q.
        scale: (sqrt(m) + sqrt(n)) ||W*||_F, the constant before epsilon (not squared).
    """

    total: float
    residual: float
    optimum: float
    misplaced: float
    turn: float
    turn_beyond: float
    epsilon: float
    scale: float

    @property
    def bound(self) -> float:
        """Bound on `residual` from the measured turn; holds for every pair of weights."""
        return self._bound(self.turn, self.turn_beyond)

    @property
    def epsilon_bound(self) -> float:
        """Bound on `residual` from epsilon alone, the paper's O(epsilon) made explicit; never below `bound`."""
        return self._bound(self.epsilon * self.scale, self.epsilon * self.scale)

    @property
    def vacuous(self) -> bool:
        """Whether `epsilon_bound` says no more than that a projection does not expand."""
        return self.epsilon_bound >= self.total

    @property
    def inequality(self) -> Inequality:
        return Inequality(self.residual, self.bound)

    def _bound(self, turn: float, beyond: float) -> float:
        return (math.sqrt((math.sqrt(self.optimum) + turn) ** 2 + self.misplaced) + beyond) ** 2


def projection_error(
    base: Float[Tensor, "out in"] | Spectrum,
    tuned: Float[Tensor, "out in"] | Spectrum,
    update: Float[Tensor, "out in"],
    rank: int,
    *,
    update_values: Float[Tensor, "k"] | None = None,
    turned: Perturbations | None = None,
) -> ProjectionError:
    """Theorem 1: the error of projecting dW onto the top-r column space of W0, and everything that bounds it.

    Args:
        base: W0 (out, in), or its spectrum.
        tuned: W* (out, in), or its spectrum.
        update: dW = W* - W0.
        rank: r, 1 <= r <= min(out, in).
        update_values: Singular values of dW in falling order, where they are known already.
        turned: `perturbations(base, tuned)`, where they are known already.
    Returns:
        The error and its parts.
    Raises:
        RankError: `rank` is out of range.
        BasisError: A weight is unusable, or the shapes differ.
    """
    before, after = spectra_of(base, tuned)
    delta = as_matrix(update, "update")
    check_rank(rank, len(before.values))
    values = torch.linalg.svdvals(delta) if update_values is None else update_values
    kept = before.inputs[:rank]
    residual = (delta - (delta @ kept.T) @ kept).square().sum()
    tail = values[rank:].square().sum()

    change = (after.values - before.values).square()  # (k,), squared singular values of the stretch, in W0's order
    misplaced = change[rank:].sum() - change.sort(descending=True).values[rank:].sum()
    fine_tuned = (after.outputs.T * after.values) @ after.inputs
    turn = fine_tuned - (before.outputs.T * after.values) @ before.inputs
    beyond = turn - (turn @ kept.T) @ kept
    return ProjectionError(
        total=float(delta.square().sum()),
        residual=float(residual),
        optimum=float(tail),
        misplaced=max(0.0, float(misplaced)),
        turn=float(turn.norm()),
        turn_beyond=float(beyond.norm()),
        epsilon=(turned or perturbations(before, after)).epsilon,
        scale=sum(math.sqrt(side) for side in delta.shape) * float(after.values.norm()),
    )
