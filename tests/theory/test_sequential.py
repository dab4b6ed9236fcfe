"""Theorem 2 with measured L and G, on convex, flat and saddle-shaped losses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pica.errors import BasisError, ConfigError
from pica.theory import sequential_bound, sequential_projection
from tests.theory.weights import orthonormal


def losses(kind: str, out: int, width: int, g: torch.Generator):
    target = torch.randn(out, width, generator=g, dtype=torch.float64)
    mixing = torch.randn(out * width, out * width, generator=g, dtype=torch.float64)
    if kind == "quadratic":
        return lambda w: ((mixing @ (w - target).flatten()) ** 2).sum() / 2
    if kind == "saddle":  # gradients grow along both paths
        return lambda w: w.flatten() @ (mixing + mixing.T) @ w.flatten() / 2 + (w * target).sum()
    if kind == "linear":
        return lambda w: (w * target).sum()
    inputs = torch.randn(width, 12, generator=g, dtype=torch.float64)
    labels = torch.randint(out, (12,), generator=g)
    return lambda w: torch.nn.functional.cross_entropy((torch.tanh(w) @ inputs).T, labels)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from(["quadratic", "saddle", "linear", "classifier"]),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 12),
    st.sampled_from([1e-6, 1e-3, 1e-2, 0.1]),
    st.integers(0, 10**6),
)
def test_theorem_2_holds_with_measured_constants(kind, out, width, steps, step_size, seed):
    g = torch.Generator().manual_seed(seed)
    loss = losses(kind, out, width, g)
    start = torch.randn(out, width, generator=g, dtype=torch.float64)
    rank = 1 + seed % width
    found = sequential_projection(loss, start, orthonormal(rank, width, g), step_size=step_size, steps=steps)
    scale = 1e-13 * float(found.accumulated.norm() + start.norm())
    assert found.distance <= found.bound * (1 + 1e-9) + scale
    if steps == 1 or rank == width:  # one gradient, or nothing to project away
        assert found.distance <= scale + 1e-13


def test_the_bound_is_not_vacuous_for_a_short_run():
    g = torch.Generator().manual_seed(0)
    loss = losses("classifier", 4, 6, g)
    start = torch.randn(4, 6, generator=g, dtype=torch.float64)
    found = sequential_projection(loss, start, orthonormal(3, 6, g), step_size=1e-2, steps=20)
    moved = float((found.accumulated - start).norm())
    assert 0 < found.distance <= found.bound < 0.2 * moved
    assert found.bound == pytest.approx(found.leading_term, rel=0.2)


def test_the_end_points_are_those_of_the_definition():
    """Two steps by hand on a quadratic with a coupling across the projection."""
    hessian = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    directions = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    start = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    found = sequential_projection(
        lambda w: (w @ hessian @ w.T).squeeze() / 2, start, directions, step_size=0.1, steps=2
    )
    # gradient at (1, 2) is (2, 2.5): full goes to (0.8, 1.75), projected to (0.8, 2)
    # second gradients' first entries: 0.8 + 0.875 = 1.675 and 0.8 + 1 = 1.8
    assert found.accumulated.tolist() == [[pytest.approx(0.8 - 0.1675), 2.0]]
    assert found.sequential.tolist() == [[pytest.approx(0.8 - 0.18), 2.0]]
    assert found.distance == pytest.approx(0.0125)
    assert found.smoothness == pytest.approx(1.25**0.5)  # H (0, 1)


def test_the_closed_form_is_the_recursion_at_every_size():
    for a in (1e-12, 1e-6, 1e-3, 0.3, 2.0):
        d = 0.0
        for t in range(15):
            d = (1 + a) * d + a * t
        assert sequential_bound(a, 15, 1.0, 1.0) == pytest.approx(a * d, rel=1e-9)
    assert sequential_bound(1.0, 10_000, 1.0, 1.0) == float("inf")
    assert sequential_bound(0.1, 1, 1.0, 1.0) == 0.0


def test_refusals():
    eye = torch.eye(2)
    with pytest.raises(ConfigError, match="step_size"):
        sequential_projection(lambda w: w.sum(), eye, eye, step_size=0.0, steps=3)
    with pytest.raises(BasisError, match="orthonormal"):
        sequential_projection(lambda w: w.sum(), eye, 2 * eye, step_size=0.1, steps=3)
