"""Which entries of T are trained, and the product with T, against the dense formula in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pica.tuners.svft.pattern import (
    affinity,
    band_positions,
    entry_count,
    position_problem,
    random_positions,
    top_positions,
)
from pica.tuners.svft.update import apply_band, apply_diagonal, apply_entries, dense_matrix, is_narrow

WIDTHS = st.integers(1, 24)
BANDS = st.integers(0, 30)


@given(WIDTHS, BANDS)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_a_band_has_as_many_entries_as_the_formula_says_and_no_others(n, d):
    positions = band_positions(n, d).long()
    i, j = positions // n, positions % n
    everything = torch.arange(n)
    inside = (everything[:, None] - everything[None]).abs() <= d
    assert torch.equal(positions, inside.flatten().nonzero().squeeze(1))
    assert len(positions) == entry_count(n, d)
    assert ((i - j).abs() <= d).all()
    assert position_problem(positions, n) is None


@given(WIDTHS, BANDS, st.integers(0, 5))
@settings(derandomize=True, deadline=None, max_examples=60)
def test_random_positions_are_distinct_rising_and_as_many_as_a_band(n, d, seed):
    count = entry_count(n, d)
    positions = random_positions(n, count, seed, "group")
    assert len(positions) == count
    assert position_problem(positions, n) is None
    assert torch.equal(positions, random_positions(n, count, seed, "group"))


def test_random_positions_are_the_same_for_ever_and_differ_by_seed_and_group():
    assert random_positions(5, 5, 0, "g").tolist() == [6, 7, 21, 22, 23]
    drawn = {tuple(random_positions(40, 120, s, g).tolist()) for s in (0, 1) for g in ("a", "b")}
    assert len(drawn) == 4
    # all positions are equally likely: 2,000 draws of a quarter of 64 positions, each about 500 times
    hits = torch.zeros(64)
    for seed in range(2000):
        hits[random_positions(8, 16, seed, "g").long()] += 1
    assert float(((hits - 500) / 375**0.5).square().mean()) == pytest.approx(1.0, abs=0.4)


def test_the_largest_entries_are_chosen_and_of_equal_ones_the_first():
    scores = torch.tensor([[1.0, 5.0, 2.0], [2.0, 2.0, 4.0], [0.0, 2.0, 3.0]])
    assert top_positions(scores, 3).tolist() == [1, 5, 8]
    assert top_positions(scores, 5).tolist() == [1, 2, 3, 5, 8]
    assert top_positions(scores, 9).tolist() == list(range(9))


def test_affinity_is_the_inner_product_and_knows_no_signs():
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(6, 6, generator=g))[0] for _ in range(2))
    found = affinity(u, v.T)
    for i in range(6):
        for j in range(6):
            assert found[i, j] == pytest.approx(abs(float(u[:, i] @ v[:, j])), abs=1e-6)
    signs = torch.tensor([1.0, -1, 1, 1, -1, -1])
    assert torch.equal(affinity(u * signs, (v * signs).T), found)
    tall = torch.randn(10, 6, generator=g)
    assert torch.equal(affinity(tall, v.T), affinity(tall[:6], v.T))


@pytest.mark.parametrize(
    ("positions", "n"),
    [([0, 0], 3), ([3, 1], 3), ([-1, 2], 3), ([4, 9], 3)],
    ids=["twice", "falling", "negative", "beyond"],
)
def test_positions_from_a_file_are_checked(positions, n):
    assert "rising positions in a 3 x 3" in str(position_problem(torch.tensor(positions, dtype=torch.int32), n))


@pytest.mark.parametrize("shape", [(7,), (5,), (2, 3), (0, 4)], ids=str)
@pytest.mark.parametrize(("n", "d"), [(40, 0), (40, 1), (40, 2), (97, 5)])
def test_band_and_entries_are_the_dense_product_with_its_gradients(shape, n, d):
    g = torch.Generator().manual_seed(n + d)
    positions = band_positions(n, d)
    values = torch.randn(len(positions), generator=g, dtype=torch.float64)
    h = torch.randn(*shape, n, generator=g, dtype=torch.float64)
    weights = torch.randn(*shape, n, generator=g, dtype=torch.float64)
    results = []
    for product in (
        lambda x, t: x @ torch.zeros(n * n, dtype=t.dtype).index_put((positions.long(),), t).view(n, n).T,
        lambda x, t: apply_band(x, t, d),
        lambda x, t: apply_entries(x, t, positions),
    ):
        x, t = h.clone().requires_grad_(), values.clone().requires_grad_()
        z = product(x, t)
        (z * weights).sum().backward()
        results.append((z.detach(), x.grad, t.grad))
    assert is_narrow(n, d)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(b, a, atol=1e-12, rtol=1e-12)


def test_random_entries_and_the_diagonal_are_the_dense_product():
    g = torch.Generator().manual_seed(0)
    positions = random_positions(12, 40, 3, "g")
    values = torch.randn(40, generator=g, dtype=torch.float64)
    h = torch.randn(5, 12, generator=g, dtype=torch.float64)
    dense = dense_matrix(values, positions, 12)
    assert torch.equal(dense.flatten()[positions.long()], values)
    assert int((dense != 0).sum()) == 40
    torch.testing.assert_close(apply_entries(h, values, positions), h @ dense.T)
    torch.testing.assert_close(apply_diagonal(h, values[:12]), h @ torch.diag(values[:12]))
    torch.autograd.gradcheck(
        lambda x, t: apply_entries(x, t, positions), (h.requires_grad_(), values.requires_grad_()), fast_mode=True
    )
