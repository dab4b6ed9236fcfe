"""Theorem 1: what holds for every pair, what the paper's wording leaves out, and E to first order."""

import pytest
import torch
from hypothesis import given, settings

from pica.theory import first_order_perturbations, perturbations, projection_error, spectrum
from tests.theory.weights import make_base, make_pair, orthonormal, pairs

many = settings(max_examples=300, deadline=None, derandomize=True)


@many
@given(pairs())
def test_the_explicit_bounds_hold_for_every_pair(pair):
    base, tuned, rank = pair
    found = projection_error(base, tuned, tuned - base, rank)
    # an error of eps ||W|| in a norm is one of eps ||W|| sqrt(bound) in its square
    size = float(base.norm() + tuned.norm())
    rounding = 1e-12 * size * (found.bound**0.5 + 1e-12 * size)
    assert found.optimum <= found.residual + rounding  # Eckart and Young: nothing of rank r is better
    assert found.residual <= found.total + rounding
    assert found.residual <= found.bound + rounding
    assert found.bound <= found.epsilon_bound + rounding
    assert found.turn_beyond <= found.turn * (1 + 1e-12) + 1e-13 * size
    assert found.misplaced >= 0


@many
@given(pairs())
def test_the_decomposition_is_that_of_the_paper(pair):
    base, tuned, _ = pair
    before, after = spectrum(base), spectrum(tuned)
    e = perturbations(base, tuned)
    eye = torch.eye(len(before.values), dtype=torch.float64)
    # W* = (V Q) S* (U P)^T in PyTorch's layout, on the k directions; exact where W is square
    if base.shape[0] == base.shape[1]:
        rebuilt = before.outputs.T @ (e.outputs + eye) @ torch.diag(after.values) @ (e.inputs + eye).T @ before.inputs
        assert (rebuilt - tuned).abs().max() <= 1e-12 * (1 + float(tuned.norm()))
    for matrix, leak in ((e.inputs, e.inputs_leak), (e.outputs, e.outputs_leak)):
        columns = (matrix + eye).square().sum(0) + leak.square()
        assert (columns - 1).abs().max() < 1e-10  # P and Q are orthogonal once what leaks is counted
    assert (torch.diagonal(e.inputs) + torch.diagonal(e.outputs)).min() >= -2 - 1e-12  # signs chosen to fit


def test_the_statement_without_the_order_of_changes_is_false():
    """epsilon = 0 and an optimum of zero, yet the whole update is lost: only the last singular value has changed."""
    base = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    tuned = torch.diag(torch.tensor([3.0, 2.0, 1.5], dtype=torch.float64))
    found = projection_error(base, tuned, tuned - base, 1)
    assert found.epsilon == 0.0
    assert found.optimum == 0.0
    assert found.residual == pytest.approx(0.25)
    assert found.misplaced == pytest.approx(0.25)
    assert found.bound == pytest.approx(0.25)


def test_the_explicit_bound_says_something_where_the_vectors_hardly_turn():
    """An update that raises the leading singular values and turns hardly anything: the case that the theorem is about."""
    g = torch.Generator().manual_seed(0)
    base, left, _, right = make_base("steep", 8, 6, g)
    raise_ = torch.diag(torch.tensor([0.5, 0.2, 0.1, 0.0, 0.0, 0.0], dtype=torch.float64))
    noise = 1e-9 * torch.randn(8, 6, generator=g, dtype=torch.float64)
    update = left.T @ raise_ @ right + noise
    found = projection_error(base, base + update, update, 2)
    assert not found.vacuous
    assert found.residual == pytest.approx(found.optimum, rel=1e-4)
    assert found.epsilon_bound < 0.2 * found.total


def test_for_a_small_update_without_structure_the_epsilon_bound_is_vacuous_and_says_so():
    base, tuned = make_pair("random", "random", 16, 16, 1e-6, 3)
    found = projection_error(base, tuned, tuned - base, 4)
    assert found.epsilon < 1e-3
    assert found.vacuous
    assert found.residual > 0.5 * found.total  # and the column space indeed holds about 4 / 16 of it


@pytest.mark.parametrize("size", [1e-4, 1e-5, 1e-6])
def test_perturbations_agree_with_first_order_theory(size):
    g = torch.Generator().manual_seed(1)
    values = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    left, right = orthonormal(5, 5, g), orthonormal(5, 5, g)
    base = left.T @ torch.diag(values) @ right
    update = size * torch.randn(5, 5, generator=g, dtype=torch.float64)
    exact = perturbations(base, base + update)
    predicted = first_order_perturbations(base, update)
    for found, linear in zip((exact.inputs, exact.outputs), predicted):
        off = found - torch.diag(torch.diagonal(found))
        assert (off - linear).abs().max() < 100 * size**2
        assert linear.abs().max() > 0.1 * size
        assert torch.diagonal(found).abs().max() < 100 * size**2  # the diagonal is of second order


def test_entries_in_a_cluster_are_large_however_small_the_update():
    base, tuned = make_pair("ties", "random", 6, 6, 1e-7, 5)
    e = perturbations(base, tuned)
    assert e.epsilon > 0.1
    assert e.inputs[3:, 3:].abs().max() < 1e-4  # outside the cluster of the first three, nothing turns


def test_signs_do_not_matter():
    base, tuned = make_pair("random", "random", 6, 4, 1e-6, 7)
    before, after = spectrum(base), spectrum(tuned)
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)[:, None]
    flipped = type(after)(after.outputs * flips, after.values, after.inputs * flips)
    one, other = perturbations(before, after), perturbations(before, flipped)
    assert torch.equal(one.inputs, other.inputs)
    assert one.epsilon < 1e-3
