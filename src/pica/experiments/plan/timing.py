"""How long a basis takes to solve on this machine."""

from __future__ import annotations

import time
from functools import cache

import torch

from pica._devices import accelerator
from pica.basis import solve_basis

TRIAL_WIDTH = 768  # of the weights that the solver is timed on


@cache
def solver_rates() -> tuple[float, float, float]:
    """(seconds a weight, a multiply-add of the Gram matrix, a cube of its width) of the solver, on this machine."""
    # from the best of two solves each of a small, a square and a tall random weight
    device = accelerator() or torch.device("cpu")
    n = TRIAL_WIDTH

    def seconds(rows: int, columns: int) -> float:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(rows, columns, generator=generator).to(device)
        taken = []
        for _ in range(2):
            begun = time.perf_counter()
            solve_basis(weight, min(32, columns))
            taken.append(time.perf_counter() - begun)
        return min(taken)

    each = seconds(32, 32)
    square, tall = seconds(n, n) - each, seconds(4 * n, n) - each
    gram = max(0.0, (tall - square) / (3 * n**3))
    return each, gram, max(0.0, square / n**3 - gram)


def basis_seconds(out_features: int, in_features: int) -> float:
    """Estimated time to solve the basis of one weight here: the Gram matrix of its smaller side, and its eigenvectors."""
    each, gram, eigen = solver_rates()
    n = min(out_features, in_features)
    return each + gram * out_features * in_features * n + eigen * n**3
