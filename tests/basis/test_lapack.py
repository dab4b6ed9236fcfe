"""The routines called without Python's lock give what the plain formula gives, and so do the wrappers in their place."""

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits

from pica.basis import _lapack

DTYPES = [(torch.float32, 2e-5), (torch.float64, 1e-13)]


@pytest.fixture(params=["direct", "wrapped"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "wrapped":
        monkeypatch.setattr(_lapack, "_routine", lambda name, dtype: None)
    return request.param


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_gram_is_added_to_the_lower_triangle_only(dtype: torch.dtype, tolerance: float, transposed: bool) -> None:
    rows = torch.randn(7, 5, dtype=dtype) if not transposed else torch.randn(5, 7, dtype=dtype).T
    before = torch.randn(5, 5, dtype=dtype)
    total = before.clone()
    _lapack.add_lower_gram(total, rows)
    expected = before.double() + rows.double().T @ rows.double()
    torch.testing.assert_close(total.tril().double(), expected.tril(), atol=10 * tolerance, rtol=tolerance)
    assert torch.equal(total.triu(1), before.triu(1))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("window", [(0, 2), (17, 19), (5, 5), (0, 19)])
def test_eigenvectors_of_a_part_of_the_spectrum(dtype: torch.dtype, tolerance: float, window: tuple[int, int]) -> None:
    base = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0]
    values = torch.arange(1.0, 21.0, dtype=torch.float64)
    gram = (base * values @ base.T).to(dtype)
    first, last = window
    found = _lapack.eigenvectors(gram.tril(), first, last)
    assert found.shape == (last - first + 1, 20)
    assert found.dtype == dtype
    expected = base.T[first : last + 1]
    matches = (found.double() * expected).sum(1).abs()  # the sign is open
    torch.testing.assert_close(matches, torch.ones_like(matches), atol=10 * tolerance, rtol=0)


def test_here_the_routines_are_called_directly() -> None:
    for name in ("syrk", "syevr"):
        for dtype, _ in DTYPES:
            assert _lapack._routine(name, dtype) is not None


def test_another_signature_is_left_to_the_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_lapack._SIGNATURES, "syrk", "char char long long real real long real real long")
    assert _lapack._routine.__wrapped__("syrk", torch.float32) is None


def test_python_runs_on_while_lapack_computes() -> None:
    """The lock is released: another thread counts on during one long call."""
    gram = torch.randn(700, 700, dtype=torch.float64)
    gram = gram @ gram.T
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    begun = time.perf_counter()
    _lapack.eigenvectors(gram, 600, 699)
    ended = time.perf_counter()
    done.set()
    thread.join()
    during = [moment for moment in ticks if begun < moment < ended]
    assert len(during) >= 3, f"{len(during)} ticks in {ended - begun:.3f} s"


def test_a_matrix_that_is_not_row_major_is_refused() -> None:
    with pytest.raises(ValueError, match="row-major"):
        _lapack.eigenvectors(torch.randn(4, 4).T[:, ::2].T, 0, 0)
    with pytest.raises(ValueError, match="row-major"):
        _lapack.add_lower_gram(torch.zeros(4, 4), torch.randn(4, 8)[:, ::2])


def test_failure_of_lapack_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> None:
        arguments[-1]._obj.value = 3  # info, by reference

    monkeypatch.setattr(_lapack, "_routine", lambda name, dtype: fails)
    with pytest.raises(np.linalg.LinAlgError, match="info 3"):
        _lapack.eigenvectors(torch.eye(4), 0, 0)


def blas_threads() -> set[int]:
    return {library.num_threads for library in _lapack._controller().lib_controllers if library.user_api == "blas"}


def test_blas_has_its_threads_back_when_the_last_is_through() -> None:
    """Two that overlap, of which the first to come is the first to go."""
    with threadpool_limits(limits=2, user_api="blas"):
        first, second = _lapack.one_blas_thread(), _lapack.one_blas_thread()
        first.__enter__()
        second.__enter__()
        assert blas_threads() == {1}
        first.__exit__(None, None, None)
        assert blas_threads() == {1}
        second.__exit__(None, None, None)
        assert blas_threads() == {2}


@pytest.mark.parametrize(("limit", "threads"), [(8, 1), (7, 2)])
def test_small_problems_are_solved_by_one_thread(monkeypatch: pytest.MonkeyPatch, limit: int, threads: int) -> None:
    seen = []
    monkeypatch.setattr(_lapack, "ONE_THREAD", limit)
    monkeypatch.setattr(_lapack, "_eigenvectors", lambda *_: seen.append(blas_threads()))
    with threadpool_limits(limits=2, user_api="blas"):
        _lapack.eigenvectors(torch.eye(8), 0, 1)
    assert seen == [{threads}]
