"""Pairs of weights that a bound may stumble on: ties, rank deficiency, tiny gaps, swapped and one-sided updates."""

import torch
from hypothesis import strategies as st
from torch import Tensor

KINDS = ("random", "ties", "deficient", "tiny gap", "steep", "zero")
UPDATES = ("random", "low rank", "tail only", "swap", "opposite", "aligned", "none")


def orthonormal(rows: int, width: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(width, rows, generator=generator, dtype=torch.float64))[0].T


def make_base(kind: str, out: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, its left vectors, singular values and right vectors (rows)."""
    k = min(out, width)
    values = torch.rand(k, generator=generator, dtype=torch.float64).sort(descending=True).values + 0.1
    if kind == "ties":
        values[: (k + 1) // 2] = 1.5
    elif kind == "deficient":
        values[k // 2 :] = 0.0
    elif kind == "tiny gap":
        values = torch.linspace(1.0, 1.0 - 1e-9 * k, k, dtype=torch.float64)
    elif kind == "steep":
        values = 10.0 ** -torch.arange(k, dtype=torch.float64)
    elif kind == "zero":
        values = torch.zeros(k, dtype=torch.float64)
    left, right = orthonormal(k, out, generator), orthonormal(k, width, generator)
    return left.T @ torch.diag(values) @ right, left, values, right


def make_pair(kind: str, change: str, out: int, width: int, size: float, seed: int) -> tuple[Tensor, Tensor]:
    """W0 and W*, (out, width)."""
    g = torch.Generator().manual_seed(seed)
    base, left, values, right = make_base(kind, out, width, g)
    k = len(values)
    if change == "random":
        delta = torch.randn(out, width, generator=g, dtype=torch.float64)
    elif change == "low rank":
        delta = torch.outer(
            torch.randn(out, generator=g, dtype=torch.float64), torch.randn(width, generator=g, dtype=torch.float64)
        )
    elif change == "tail only":
        delta = torch.outer(left[-1], right[-1])
    elif change == "swap":  # turns the first direction towards the last
        delta = torch.outer(left[0], right[-1]) - torch.outer(left[-1], right[0])
    elif change == "opposite":
        delta = -base
    elif change == "aligned":
        shrink = torch.rand(k, generator=g, dtype=torch.float64).sort(descending=True).values
        delta = left.T @ torch.diag(shrink) @ right
    else:
        delta = torch.zeros(out, width, dtype=torch.float64)
    return base, base + size * delta


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """W0, W* and a rank."""
    out, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    size = 10.0 ** draw(st.integers(-9, 1))
    base, tuned = make_pair(
        draw(st.sampled_from(KINDS)), draw(st.sampled_from(UPDATES)), out, width, size, draw(st.integers(0, 10**6))
    )
    return base, tuned, draw(st.integers(1, min(out, width)))
