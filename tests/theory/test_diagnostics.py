"""Captured energy, intruder dimensions and ranks against their plain definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pica.errors import ConfigError
from pica.theory import (
    captured_energy,
    effective_rank,
    intruder_dimensions,
    random_directions,
    rank_for_share,
    spectrum,
    spectrum_rank,
    stable_rank,
)
from tests.theory.weights import make_base, orthonormal, pairs


@settings(max_examples=100, deadline=None, derandomize=True)
@given(pairs())
def test_captured_energy_is_that_of_the_projection(pair):
    base, tuned, _ = pair
    update = tuned - base
    curve = captured_energy(update, spectrum(base).inputs)
    total = float(update.square().sum())
    for r in range(1, len(curve) + 1):
        p = spectrum(base).inputs[:r]
        plain = float((update @ p.T @ p).square().sum()) / total if total else 0.0
        assert float(curve[r - 1]) == pytest.approx(plain, abs=1e-9)
    assert (curve.diff() >= -1e-12).all()


def test_a_random_space_captures_r_over_n_on_average():
    g = torch.Generator().manual_seed(0)
    update = torch.outer(*torch.randn(2, 12, generator=g, dtype=torch.float64))  # rank one: the largest spread
    n, draws = 12, 2000
    mean = torch.stack([captured_energy(update, random_directions(n, n, seed=s)) for s in range(draws)]).mean(0)
    for r in range(1, n + 1):
        # the share is Beta(r/2, (n-r)/2) distributed
        deviation = math.sqrt(2 * r * (n - r) / (n * n * (n + 2)) / draws)
        assert abs(float(mean[r - 1]) - r / n) <= 4 * deviation + 1e-12


def test_random_directions_are_orthonormal_seeded_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    rows = random_directions(4, 9, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert (rows @ rows.T - torch.eye(4)).abs().max() < 1e-12
    assert torch.equal(rows, random_directions(4, 9, seed=1))
    assert not torch.equal(rows, random_directions(4, 9, seed=2))


def test_intruders_are_new_directions_that_rank_high():
    g = torch.Generator().manual_seed(0)
    base, _, _, right = make_base("random", 12, 12, g)
    strange = right.sum(0) / 12**0.5  # a cosine of 0.29 with each of the base's
    tuned = base + 5.0 * torch.outer(orthonormal(1, 12, g)[0], strange)
    found = intruder_dimensions(right, spectrum(tuned).inputs)
    closest = (spectrum(tuned).inputs[:10] @ right.T).abs().max(1).values
    assert found.tolist() == [j for j in range(10) if closest[j] < 0.5]
    assert found.tolist()[0] == 0  # the new direction, now the largest
    scaled = spectrum(base * 1.01)
    assert intruder_dimensions(right, scaled.inputs).tolist() == []
    assert intruder_dimensions(right, spectrum(tuned).inputs, top=1, threshold=1e-6).tolist() == []
    with pytest.raises(ConfigError, match="threshold"):
        intruder_dimensions(right, right, threshold=0.0)


def test_ranks_of_known_spectra():
    flat = torch.ones(7, dtype=torch.float64)
    assert effective_rank(flat) == pytest.approx(7)
    assert stable_rank(flat) == pytest.approx(7)
    one = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)
    assert effective_rank(one) == pytest.approx(1)
    assert stable_rank(one) == pytest.approx(1)
    assert stable_rank(torch.tensor([2.0, 1.0], dtype=torch.float64)) == pytest.approx(1.25)
    assert effective_rank(torch.zeros(3)) == stable_rank(torch.zeros(3)) == 0.0


@given(st.lists(st.floats(0, 10), min_size=1, max_size=12), st.floats(0.01, 1.0))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_suggested_rank_is_the_smallest_that_reaches_the_share(energies, share):
    values = torch.tensor(energies, dtype=torch.float64)
    r, whole = rank_for_share(values, share), float(values.sum())
    assert float(values[:r].sum()) >= share * whole * (1 - 1e-9)
    assert r == 1 or float(values[: r - 1].sum()) < share * whole


def test_a_share_of_more_than_there_is_is_told_apart():
    assert rank_for_share(torch.tensor([1.0, 1.0]), 0.5, total=10.0) == 3
    with pytest.raises(ConfigError, match="share"):
        rank_for_share(torch.ones(2), 0.0)


def test_rank_from_the_base_alone():
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))  # 9, 13, 14 of 14
    assert [spectrum_rank(weight, s) for s in (0.5, 0.9, 0.99, 1.0)] == [1, 2, 3, 3]
    assert spectrum_rank(torch.zeros(3, 3), 0.9) == 1


def test_directions_may_have_an_adapters_precision():
    update, directions = torch.randn(7, 9, dtype=torch.float64), random_directions(3, 9, seed=0)
    torch.testing.assert_close(
        captured_energy(update.float(), directions.float()), captured_energy(update, directions), atol=1e-6, rtol=0
    )
