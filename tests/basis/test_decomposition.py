"""The full singular value decomposition of a frozen weight."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from pica.basis import factorise
from pica.errors import BasisError


def weight_with_spectrum(out: int, inn: int, sigma: Tensor, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(out, len(sigma), generator=g, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(inn, len(sigma), generator=g, dtype=torch.float64))
    return left @ torch.diag(sigma.double()) @ right.T


@pytest.mark.parametrize("shape", [(20, 20), (20, 30), (30, 20), (12, 90), (90, 12), (1, 5), (5, 1)], ids=str)
def test_the_sides_rebuild_the_weight_and_are_orthonormal(shape):
    n = min(shape)
    w = weight_with_spectrum(shape[0], shape[1], torch.linspace(2, 0.5, n))
    f = factorise(w)
    assert (f.left.shape, f.values.shape, f.right.shape, f.usable) == ((shape[0], n), (n,), (n, shape[1]), n)
    torch.testing.assert_close(f.left * f.values @ f.right, w, atol=1e-12, rtol=0)
    for gram in (f.left.T @ f.left, f.right @ f.right.T):
        torch.testing.assert_close(gram, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (f.values.diff() <= 0).all()
    assert (f.right.gather(1, f.right.abs().argmax(1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_small_and_neighbouring_singular_values_keep_their_directions(transposed):
    """A Gram matrix would lose the small ones, and float32 would mix the neighbours."""
    sigma = torch.tensor([1.0, 1.0 - 1e-6, 0.5, 1e-4, 1e-7, 1e-9], dtype=torch.float64)
    w = weight_with_spectrum(40, 17, sigma)
    exact = factorise(w)
    assert exact.usable == 6
    torch.testing.assert_close(exact.values[:6], sigma, atol=1e-15, rtol=1e-6)
    other = factorise(w.T.contiguous())  # solved by itself; the same directions with the sides exchanged
    cosines = (exact.left[:, :6] * other.right[:6].T).sum(0)
    torch.testing.assert_close(cosines.abs(), torch.ones(6, dtype=torch.float64), atol=1e-6, rtol=0)
    # left and right sides belong together, sign included
    torch.testing.assert_close(exact.left[:, :6].T @ w @ exact.right[:6].T, torch.diag(sigma), atol=1e-12, rtol=0)


def test_directions_without_a_singular_value_are_zero():
    w = weight_with_spectrum(12, 9, torch.tensor([3.0, 1.0]))
    w[4:] = 0.0
    w = w.round(decimals=1).float()
    rank = int(torch.linalg.matrix_rank(w.double()))
    f = factorise(w)
    assert f.usable == rank < 9
    assert not f.left[:, rank:].any()
    assert not f.right[rank:].any()
    nothing = factorise(torch.zeros(3, 4))
    assert nothing.usable == 0
    assert not nothing.left.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_weights_are_decomposed_exactly(dtype):
    w = weight_with_spectrum(24, 16, torch.linspace(3, 1, 16)).to(dtype)
    f, exact = factorise(w), factorise(w.double())
    assert f.left.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(f.right.double(), exact.right, atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.full((3, 3), float("nan")), "holds NaN"),
        (torch.zeros(3, 3, device="meta"), "meta device"),
        (torch.zeros(3, 3, dtype=torch.int8), "float matrix"),
        (torch.zeros(3), "float matrix"),
    ],
)
def test_what_cannot_be_decomposed_is_refused_by_name(weight, message):
    with pytest.raises(BasisError, match=rf"some\.layer: .*{message}"):
        factorise(weight, name="some.layer")


def test_a_failing_solver_is_named(monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise RuntimeError("did not converge\nmore")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    with caplog.at_level(logging.WARNING), pytest.raises(BasisError, match="svd on cpu: did not converge"):
        factorise(torch.eye(3))
    assert "did not converge" in caplog.text
