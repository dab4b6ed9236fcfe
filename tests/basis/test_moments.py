"""Leading directions of a stream of vectors, against the eigenvectors of all of it at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pica.basis import moments
from pica.basis.moments import Moment, Sketch, passes_of, rows_of_outputs, stream_of


def vectors(count: int = 300, width: int = 80, seed: int = 0) -> Tensor:
    """Rows whose energies fall by a quarter from each direction to the next, none of them an axis."""
    g = torch.Generator().manual_seed(seed)
    turned, _ = torch.linalg.qr(torch.randn(width, width, generator=g, dtype=torch.float64))
    return torch.randn(count, width, generator=g, dtype=torch.float64) * 0.87 ** torch.arange(width) @ turned


def expected(x: Tensor, rank: int) -> Tensor:
    return torch.linalg.svd(x.double(), full_matrices=False)[2][:rank]


def feed(stream: moments.Stream, x: Tensor, parts: int = 3) -> moments.Stream:
    for _ in range(stream.passes):
        for part in x.chunk(parts):
            stream.add(part)
        stream.end_pass()
    return stream


def projector_of(rows: Tensor) -> Tensor:
    return rows.double().T @ rows.double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["whole", "sketch"])
def test_the_leading_directions_are_those_of_all_vectors_at_once(kind, dtype, monkeypatch):
    monkeypatch.setattr(moments, "SPARE", 12)
    x = vectors().to(dtype)
    made = Moment(80, x.device) if kind == "whole" else Sketch(80, 8, x.device, seed=0)
    found = feed(made, x).leading(8)
    atol = 1e-6 if kind == "whole" else 1e-3  # three passes over a spectrum that falls slowly
    torch.testing.assert_close(projector_of(found.rows), projector_of(expected(x, 8)), atol=atol, rtol=0)
    torch.testing.assert_close(found.rows @ found.rows.T, torch.eye(8).double(), atol=1e-10, rtol=0)
    assert found.total == pytest.approx(float(x.double().square().sum()))
    energies = (x.double() @ found.rows.T).square().sum(0)
    torch.testing.assert_close(found.energies, energies, rtol=1e-9, atol=0)
    assert bool((energies.diff() < 0).all()), "the strongest first"


def test_directions_that_no_vector_has_are_left_out():
    x = vectors(5)
    assert feed(Moment(80, x.device), x).leading(8).rows.shape == (5, 80)
    assert feed(Moment(80, x.device), torch.zeros(5, 80)).leading(8).total == 0


def test_only_wide_vectors_are_sketched_and_the_seed_decides_how(monkeypatch):
    monkeypatch.setattr(moments, "WIDE", 64)
    monkeypatch.setattr(moments, "SPARE", 4)
    kinds = {width: type(stream_of(width, 8, torch.device("cpu"), seed=0)) for width in (64, 80)}
    assert kinds == {64: Moment, 80: Sketch}
    assert [passes_of(width, 8) for width in (64, 80)] == [1, moments.ITERATIONS + 1]
    x = vectors()
    same, again, other = (feed(Sketch(80, 8, x.device, seed=seed), x).leading(8).rows for seed in (0, 0, 1))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_rows_of_outputs_are_the_best_approximation_of_the_weight_on_the_stream():
    """W P^T P is as near to W on these vectors as any matrix of its rank can be, and the principal rows are not."""
    x, rank = vectors(seed=1), 6
    weight = torch.randn(40, 80, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = x @ weight.T
    outputs = feed(Moment(40, x.device), y).leading(rank).rows
    rows = rows_of_outputs(outputs, weight)
    torch.testing.assert_close(rows @ rows.T, torch.eye(rank).double(), atol=1e-10, rtol=0)
    best = outputs.T @ outputs @ weight  # U U^T W, by Eckart and Young in the norm of C
    torch.testing.assert_close(best @ rows.T @ rows, best, atol=1e-10, rtol=0)
    least = float(torch.linalg.svdvals(y)[rank:].square().sum())
    assert float((y - x @ best.T).square().sum()) == pytest.approx(least)
    principal = torch.linalg.svd(weight)[2][:rank]
    assert float((y - x @ principal.T @ principal @ weight.T).square().sum()) > 1.5 * least
