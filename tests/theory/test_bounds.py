"""Lemma 3.1 and the appendix's inequalities, on random and on awkward weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pica.errors import BasisError, RankError
from pica.theory import (
    mirsky,
    non_expansiveness,
    norm_invariance,
    principal_angles,
    random_directions,
    sines,
    wedin,
    weyl,
)
from tests.theory.weights import make_pair, orthonormal, pairs

many = settings(max_examples=200, deadline=None, derandomize=True)


@many
@given(pairs(), st.sampled_from(["spectral", "frobenius"]))
def test_wedin_holds(pair, norm):
    base, tuned, rank = pair
    found = wedin(base, tuned, tuned - base, rank, norm)
    # rounding turns a computed subspace by eps * ||W|| / gap, and W* - W0 is only known to eps * ||W||
    rounding = 1e-13 * float(base.norm() + tuned.norm()) / found.gap if found.gap > 0 else 0.0
    assert max(found.sine_in, found.sine_out) <= found.bound + rounding + 1e-13
    assert max(found.sine_in, found.sine_out) <= found.largest + 1e-9
    assert found.gap_before <= found.gap + 1e-12 * float(base.norm() + tuned.norm())


@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
def test_wedin_is_not_vacuous_on_a_small_update_and_within_reach_of_the_truth(norm):
    for seed in range(20):
        base, tuned = make_pair("random", "random", 8, 8, 1e-5, seed)
        found = wedin(base, tuned, tuned - base, 3, norm)
        assert not found.vacuous
        assert 0.01 * found.bound < max(found.sine_in, found.sine_out) <= found.bound < 0.1


def test_wedin_is_nearly_attained_by_a_turn_across_the_gap():
    base = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    tuned = base + 1e-3 * torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    found = wedin(base, tuned, tuned - base, 1)
    assert found.sine_in == pytest.approx(found.bound, rel=1e-3)


def test_wedin_says_nothing_across_a_tie_and_the_subspace_does_turn():
    base = torch.eye(2, dtype=torch.float64)
    tuned = base + 1e-6 * torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    found = wedin(base, tuned, tuned - base, 1)
    assert found.vacuous
    assert found.sine_in > 0.5  # 45 degrees, for an update of one millionth


@many
@given(pairs())
def test_weyl_and_mirsky_hold(pair):
    base, tuned, _ = pair
    tolerance = 1e-13 * float(base.norm() + tuned.norm())
    for found in (weyl(base, tuned), mirsky(base, tuned)):
        assert found.left <= found.right + tolerance


def test_weyl_is_attained_by_a_change_of_one_singular_value():
    base = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    found = weyl(base, base + torch.diag(torch.tensor([0.0, 0.25, 0.0])))
    assert found.left == pytest.approx(0.25)
    assert found.right == pytest.approx(0.25)


@many
@given(pairs(), st.integers(0, 10**6))
def test_norm_invariance_and_non_expansiveness(pair, seed):
    base, _, rank = pair
    width = base.shape[1]
    rotation = random_directions(width, width, seed=seed)
    found = norm_invariance(base, rotation)
    assert found.left == pytest.approx(found.right, rel=1e-12, abs=1e-300)
    assert non_expansiveness(base, rotation[:rank]).holds()
    if rank < width and found.right:
        assert non_expansiveness(base, rotation[:rank]).left < found.right  # a random subspace loses something


def test_an_oblique_projection_is_refused():
    with pytest.raises(BasisError, match="not orthonormal"):
        non_expansiveness(torch.eye(2), torch.tensor([[1.0, 1.0]]))


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-3, 0.7, math.pi / 2 - 1e-9, math.pi / 2])
def test_angles_are_accurate_at_both_ends(angle):
    g = torch.Generator().manual_seed(0)
    frame = orthonormal(3, 6, g)
    one = frame[:2]
    other = torch.stack([frame[0], math.cos(angle) * frame[1] + math.sin(angle) * frame[2]])
    assert principal_angles(one, other).tolist() == pytest.approx([0.0, angle], rel=1e-6, abs=1e-15)
    assert principal_angles(other, one).tolist() == pytest.approx([0.0, angle], rel=1e-6, abs=1e-15)
    assert sines(one, other)[1].item() == pytest.approx(math.sin(angle), rel=1e-6, abs=1e-15)


def test_angles_of_spans_of_different_size_and_of_the_whole_space():
    g = torch.Generator().manual_seed(0)
    frame = orthonormal(5, 5, g)
    assert principal_angles(frame[:2], frame).abs().max() < 1e-12
    assert principal_angles(frame[:2], frame[2:]).min() == pytest.approx(math.pi / 2)


def test_refusals_name_what_is_wrong():
    good = torch.eye(3)
    with pytest.raises(RankError, match=r"rank=4 is outside 1\.\.3"):
        wedin(good, good, good, 4)
    with pytest.raises(BasisError, match="different shapes"):
        wedin(good, torch.eye(4), good, 1)
    with pytest.raises(BasisError, match="NaN or infinity"):
        weyl(good, good / 0)
