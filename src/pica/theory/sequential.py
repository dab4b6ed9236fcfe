"""Theorem 2: projecting every gradient against projecting once, at the end, what all gradients have moved.

Let X_t be plain gradient descent on the whole weight, W_t = W0 + (X_t - W0) P^T P its accumulated move projected once, and
P_t the descent that projects every gradient (PiCa's). With a loss that is L-smooth and gradients bounded by G,
d_t = ||W_t - P_t||_F obeys d_{t+1} <= (1 + eta L) d_t + eta^2 L G t, since X_t is at most eta G t from its projection. Hence

    d_T <= (G / L) ((1 + eta L)^T - 1 - eta L T)  =  (eta^2 / 2) L G T (T - 1) + (G / L) O((eta L T)^3).

The first term is the paper's; the proof does not make it a bound by itself, the whole expression is one. Twice the first
term is one as well, without a remainder, because X_t and P_t are never further apart than 2 eta G t. Plain gradient
descent only: nothing here speaks of Adam, momentum or weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated as Float  # jaxtyping's, when tests/test_shapes.py looks at what runs

import torch
from torch import Tensor

from pica.errors import ConfigError
from pica.theory.bounds import Inequality
from pica.theory.subspaces import as_matrix, check_orthonormal


@dataclass(frozen=True)
class SequentialProjection:
    """Both trajectories' ends, and what the theorem takes from them.

    Attributes:
        accumulated: W_T, all gradients of full descent, projected once, (out, in).
        sequential: P_T, every gradient projected, (out, in).
        step_size, steps: eta and T.
        smoothness: L as measured: largest ||grad(X_t) - grad(P_t)|| / ||X_t - P_t||. The proof needs it nowhere else.
        gradient_bound: G as measured: largest Frobenius norm of a gradient on either path.
    """

    accumulated: Float[Tensor, "out in"]
    sequential: Float[Tensor, "out in"]
    step_size: float
    steps: int
    smoothness: float
    gradient_bound: float

    @property
    def distance(self) -> float:
        """||W_T - P_T||_F."""
        return float((self.accumulated - self.sequential).norm())

    @property
    def leading_term(self) -> float:
        """The paper's (eta^2 / 2) L G T (T - 1), without its remainder."""
        eta, t = self.step_size, self.steps
        return 0.5 * eta**2 * self.smoothness * self.gradient_bound * t * (t - 1)

    @property
    def bound(self) -> float:
        """The smaller of (G / L) ((1 + eta L)^T - 1 - eta L T) and twice the leading term; both hold for all eta, T."""
        return min(sequential_bound(self.step_size, self.steps, self.smoothness, self.gradient_bound),
                   2 * self.leading_term)  # fmt: skip

    @property
    def inequality(self) -> Inequality:
        return Inequality(self.distance, self.bound)


def sequential_bound(step_size: float, steps: int, smoothness: float, gradient_bound: float) -> float:
    """(G / L) ((1 + eta L)^T - 1 - eta L T), without cancellation for small eta L T; 0 where L is 0."""
    a = step_size * smoothness
    if a == 0 or steps < 2:
        return 0.0
    log = steps * math.log1p(a)
    if log > 700:
        return math.inf
    if a * steps < 1e-2:  # sum_{t<T} t (1 + a)^(T-1-t), all terms positive
        total = sum(t * math.exp((steps - 1 - t) * math.log1p(a)) for t in range(steps))
        return step_size**2 * smoothness * gradient_bound * total
    return gradient_bound / smoothness * (math.expm1(log) - a * steps)


def sequential_projection(
    loss: Callable[[Tensor], Tensor],
    start: Float[Tensor, "out in"],
    directions: Float[Tensor, "r in"],
    *,
    step_size: float,
    steps: int,
) -> SequentialProjection:
    """Run both descents of Theorem 2 on a loss, in float64.

    Args:
        loss: Scalar function of a weight (out, in) in float64, differentiable by autograd.
        start: W0 (out, in).
        directions: P, orthonormal rows (r, in).
        step_size: eta, positive.
        steps: T, at least 1.
    Returns:
        Both trained weights, the smoothness seen on the way, and the theorem's bound on their distance.
    Raises:
        BasisError: The rows are not orthonormal, or the loss left the finite numbers.
        ConfigError: `step_size` or `steps` is out of range.
    """
    if not (math.isfinite(step_size) and step_size > 0) or steps < 1:
        raise ConfigError(f"step_size={step_size} must be positive and steps={steps} at least 1.")
    base, rows = as_matrix(start, "start"), as_matrix(directions, "directions")
    check_orthonormal(rows, "directions")

    def gradient(weight: Tensor) -> Tensor:
        point = weight.clone().requires_grad_(True)
        with torch.enable_grad():
            (found,) = torch.autograd.grad(loss(point), point)
        return as_matrix(found, "gradient")

    full, sequential = base.clone(), base.clone()
    smoothness = bound = 0.0
    for _ in range(steps):
        g_full, g_seq = gradient(full), gradient(sequential)
        bound = max(bound, float(g_full.norm()), float(g_seq.norm()))
        apart = float((full - sequential).norm())
        if apart > 0:
            smoothness = max(smoothness, float((g_full - g_seq).norm()) / apart)
        full = full - step_size * g_full
        sequential = sequential - step_size * (g_seq @ rows.T) @ rows
    accumulated = base + ((full - base) @ rows.T) @ rows
    return SequentialProjection(accumulated, sequential, step_size, steps, smoothness, bound)
