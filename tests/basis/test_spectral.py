"""The basis against float64 SVD: subspaces by their projectors, never vectors; and every kind of awkward weight."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import Tensor

from pica.basis import BasisRequest, direction_signs, max_rank, solve_basis, solve_many, spectral, with_progress
from pica.basis._progress import fits_beside
from pica.errors import BasisError, ConfigError, RankError

SHAPES = {"square": (48, 48), "tall": (96, 40), "wide": (40, 96)}


def weight_with_spectrum(out: int, inn: int, sigma: Tensor, seed: int = 0) -> Tensor:
    """A float64 weight (out, in) with singular values `sigma`."""
    g = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(out, len(sigma), generator=g, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(inn, len(sigma), generator=g, dtype=torch.float64))
    return left @ torch.diag(sigma.double()) @ right.T


def decaying(out: int, inn: int, ratio: float = 1e-2) -> Tensor:
    """A weight whose singular values fall from 1 to `ratio`, each clearly apart from the next."""
    n = min(out, inn)
    return weight_with_spectrum(out, inn, torch.logspace(0, float(np.log10(ratio)), n))


def projector_of(rows: Tensor) -> Tensor:
    return rows.double().T @ rows.double()


def svd_rows(w: Tensor, rank: int, projection: str = "principal") -> Tensor:
    rows = torch.linalg.svd(w.double(), full_matrices=False)[2]
    return rows[:rank] if projection == "principal" else rows.flip(0)[:rank]


@pytest.mark.parametrize("side", ["auto", "in", "out"])
@pytest.mark.parametrize("rank", [1, 8, 39])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_principal_subspace_equals_float64_svd(shape, dtype, rank, side):
    w = decaying(*shape).to(dtype)
    basis = solve_basis(w, rank, side=side)
    rows = basis.directions(w)
    atol = 1e-9 if dtype == torch.float64 else 2e-3  # float32: eps * (s_1 / s_r)^2 over the relative gap
    assert rows.shape == (rank, shape[1])
    torch.testing.assert_close(projector_of(rows), projector_of(svd_rows(w, rank)), atol=atol, rtol=0)
    torch.testing.assert_close(rows.double() @ rows.double().T, torch.eye(rank).double(), atol=atol, rtol=0)
    sigma = torch.linalg.svdvals(w.double())[:rank]
    torch.testing.assert_close(basis.gains.double(), sigma, rtol=1e-4, atol=0)


def test_another_subspace_is_told_apart():
    """The comparison above can fail: the minor subspace has another projector."""
    w = decaying(48, 48)
    principal, minor = (projector_of(solve_basis(w, 8, projection=p).directions(w)) for p in ("principal", "minor"))
    assert (principal - minor).abs().max() > 0.1


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_projector_reads_the_side_with_fewer_features_and_gives_the_same_coordinates(shape):
    w = decaying(*shape)
    x = torch.randn(5, shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    basis = solve_basis(w, 8)
    assert basis.projector.shape == (8, min(shape))  # never more columns than the narrower side
    assert basis.side == ("out" if shape[0] < shape[1] else "in")
    source = x if basis.side == "in" else x @ w.T
    torch.testing.assert_close(source @ basis.projector.T, x @ basis.directions(w).T, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_minor_directions_are_the_last_ones_very_last_first(shape):
    w = decaying(*shape)
    rows = solve_basis(w, 6, projection="minor").directions(w)
    torch.testing.assert_close(projector_of(rows), projector_of(svd_rows(w, 6, "minor")), atol=1e-6, rtol=0)
    torch.testing.assert_close((rows[:1] @ w.T).norm(), torch.linalg.svdvals(w)[-1], rtol=1e-6, atol=0)


def test_minor_skips_directions_without_energy():
    w = weight_with_spectrum(30, 50, torch.tensor([4.0, 3.0, 2.0, 1.0]))
    rows = solve_basis(w, 2, projection="minor").directions(w)
    torch.testing.assert_close(projector_of(rows), projector_of(svd_rows(w, 4)[2:]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("projection", ["principal", "minor", "random"])
def test_a_smaller_rank_is_the_head_of_a_larger_one(projection):
    w = decaying(48, 64)
    small, large = (solve_basis(w, r, projection=projection).directions(w) for r in (5, 20))
    torch.testing.assert_close(small, large[:5], atol=1e-6, rtol=0)


def test_random_rows_are_orthonormal_and_depend_on_seed_and_name_only():
    w = decaying(32, 64)
    rows = solve_basis(w, 16, projection="random", seed=3, name="layers.0.q").projector
    torch.testing.assert_close(rows @ rows.T, torch.eye(16, dtype=rows.dtype), atol=1e-10, rtol=0)
    again = solve_basis(w * 7, 16, projection="random", seed=3, name="layers.0.q").projector
    assert torch.equal(rows, again)
    for other in ({"seed": 4, "name": "layers.0.q"}, {"seed": 3, "name": "layers.1.q"}):
        assert not torch.allclose(rows, solve_basis(w, 16, projection="random", **other).projector, atol=1e-2)
    before = torch.get_rng_state()
    solve_basis(w, 16, projection="random")
    assert torch.equal(before, torch.get_rng_state())


def test_random_rows_are_these_numbers_on_every_platform():
    """A change of these numbers makes every stored adapter with projection='random' another adapter."""
    w = torch.ones(2, 4, dtype=torch.float64)
    rows = solve_basis(w, 2, projection="random", seed=0, name="probe").projector
    expected = torch.tensor(
        [
            [-0.12210684069138722, 0.3402097146383704, 0.23501054432755303, 0.902284497027913],
            [0.5169040151621599, 0.818310540402268, 0.03793204774050506, -0.24847385844389738],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(rows, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(64),
        lambda: torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))[0],
        lambda: torch.eye(16).repeat(4, 4),
        lambda: weight_with_spectrum(48, 80, torch.tensor([2.0] * 20 + [1.0] * 20)).float(),
    ],
    ids=["identity", "orthogonal", "block-repeated", "two clusters"],
)
@pytest.mark.parametrize("rank", [4, 20, 40])
def test_tied_spectra_give_orthonormal_directions_of_the_right_gain(make, rank):
    w = make()
    rank = min(rank, int(torch.linalg.matrix_rank(w)))
    basis = solve_basis(w, rank)
    rows = basis.directions(w)
    torch.testing.assert_close(rows @ rows.T, torch.eye(rank), atol=1e-5, rtol=0)
    torch.testing.assert_close(basis.gains, torch.linalg.svdvals(w)[:rank], rtol=1e-5, atol=0)
    # W^T W maps the span onto itself: an invariant subspace, whichever rotation inside a cluster was picked
    image = rows @ w.T @ w
    torch.testing.assert_close(image @ rows.T @ rows, image, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_low_rank_weight_gives_the_directions_it_has(shape, dtype):
    out, inn = shape
    g = torch.Generator().manual_seed(0)
    # small integers: exactly rank 5 in every dtype
    w = torch.randint(-2, 3, (out, 5), generator=g).double() @ torch.randint(-2, 3, (5, inn), generator=g).double()
    basis = solve_basis(w.to(dtype), 12)
    assert basis.rank == 5
    torch.testing.assert_close(
        projector_of(basis.directions(w.to(dtype))), projector_of(svd_rows(w, 5)), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("rank", [1, 3, 17])
def test_directions_that_rounding_has_made_are_told_from_the_weights_own(shape, dtype, rank):
    g = torch.Generator().manual_seed(rank)
    out, inn = shape
    w = (torch.randn(out, rank, generator=g) @ torch.randn(rank, inn, generator=g)).to(dtype)
    basis = solve_basis(w, 24)
    assert basis.clear == rank < basis.rank
    assert basis.side == "in"  # S^-1 would amplify the output's rounding
    exact = solve_basis(w.float(), 24)  # in float32 these directions are the weight's own
    assert exact.clear == exact.rank == basis.rank


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_weight_of_full_rank_loses_none(shape, dtype):
    out, inn = shape
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    basis = solve_basis(w, min(shape) * 3 // 4)
    assert basis.clear == basis.rank == min(shape) * 3 // 4
    assert basis.side == ("out" if out < inn else "in")


@pytest.mark.parametrize("size", [1e-6, 3e4])
def test_a_projector_is_one_that_the_weights_dtype_can_hold(size):
    w = torch.randn(16, 40, generator=torch.Generator().manual_seed(0)).sign().mul(size).half()
    basis = solve_basis(w, 4)
    rounded = basis.projector.half().float()
    torch.testing.assert_close(rounded, basis.projector, atol=0, rtol=1e-2)


def test_a_zero_weight_has_no_directions():
    basis = solve_basis(torch.zeros(8, 16), 4)
    assert basis.rank == 0
    assert basis.directions(torch.zeros(8, 16)).shape == (0, 16)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad):
    w = decaying(16, 16)
    w[3, 4] = bad
    with pytest.raises(BasisError, match=r"layers\.7\.q_proj.*NaN or infinity"):
        solve_basis(w, 4, name="layers.7.q_proj")


@pytest.mark.parametrize("scale", [1e-25, 1e-8, 1e8, 1e25])
def test_the_scale_of_the_weight_does_not_matter(scale):
    w = decaying(40, 24).float()
    basis, scaled = solve_basis(w, 6), solve_basis(w * scale, 6)
    torch.testing.assert_close(scaled.directions(w), basis.directions(w), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.gains / scale, basis.gains, rtol=1e-4, atol=0)


def test_the_output_side_undoes_the_scale_too():
    w = decaying(24, 40).float()
    big = solve_basis(w * 1e20, 6)
    assert big.side == "out"
    torch.testing.assert_close(big.directions(w * 1e20), solve_basis(w, 6).directions(w), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rank", [0, -1, 41])
def test_a_rank_out_of_range_is_refused(rank):
    with pytest.raises(RankError, match=rf"q_proj: rank={rank} is outside 1\.\.40"):
        solve_basis(decaying(40, 96), rank, name="q_proj")


def test_other_bad_arguments_are_refused():
    w = decaying(8, 8)
    with pytest.raises(ConfigError, match="principal, minor, random"):
        solve_basis(w, 2, projection="top")
    with pytest.raises(ConfigError, match="side="):
        solve_basis(w, 2, side="left")  # pyright: ignore[reportArgumentType] - that is the point
    with pytest.raises(BasisError, match="meta device"):
        solve_basis(torch.empty(4, 4, device="meta"), 2)
    with pytest.raises(BasisError, match="float matrix"):
        solve_basis(torch.ones(4, 4, dtype=torch.int8), 2)


def test_signs_follow_one_rule():
    w = decaying(48, 64)
    rows = solve_basis(w, 10).directions(w)
    assert torch.equal(direction_signs(rows), torch.ones(10, dtype=rows.dtype))
    assert torch.equal(direction_signs(-rows), -torch.ones(10, dtype=rows.dtype))
    tied = torch.tensor([[-0.5, 0.5, 0.5, -0.5], [0.5000001, -0.5, 0.5, 0.5]])
    assert direction_signs(tied).tolist() == [-1.0, 1.0]


def test_two_solvers_agree_after_the_sign_rule():
    w = decaying(60, 40, ratio=0.1)
    by_eigh = solve_basis(w, 8).directions(w)
    by_svd = spectral._from_svd(w, 8, "principal", "in", torch.float64).directions(w)
    torch.testing.assert_close(by_eigh, by_svd, atol=1e-9, rtol=0)


def test_a_failing_solver_falls_back_to_svd_and_says_so(monkeypatch, caplog):
    def no_convergence(*args, **kwargs):
        raise np.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(spectral, "eigenvectors", no_convergence)
    w = decaying(40, 40)
    with caplog.at_level(logging.WARNING, logger="pica.basis.spectral"):
        basis = solve_basis(w, 4, name="layers.2.k_proj")
    assert basis.solver == "svd"
    torch.testing.assert_close(projector_of(basis.directions(w)), projector_of(svd_rows(w, 4)), atol=1e-9, rtol=0)
    assert "layers.2.k_proj" in caplog.text
    assert "did not converge" in caplog.text


def test_rows_that_are_not_orthonormal_count_as_a_failure(monkeypatch):
    real = spectral.leading_eigenvectors

    def skewed(*args, **kwargs):
        rows, solver = real(*args, **kwargs)
        return rows + rows.flip(0) * 0.3, solver

    monkeypatch.setattr(spectral, "leading_eigenvectors", skewed)
    assert solve_basis(decaying(40, 40), 4).solver == "svd"


def test_when_nothing_works_the_error_lists_what_was_tried(monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(spectral, "_gram", out_of_memory)
    monkeypatch.setattr(torch.linalg, "svd", out_of_memory)
    with pytest.raises(BasisError, match=r"q_proj: no solver.*gram on cpu: no memory left.*svd on cpu"):
        solve_basis(decaying(16, 16), 4, name="q_proj")


def test_lower_precision_settings_do_not_reach_the_basis():
    w = decaying(256, 192).float()
    reference = solve_basis(w, 32).projector
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            basis = solve_basis(w, 32)
            assert basis.projector.dtype == torch.float32
            torch.testing.assert_close(basis.projector, reference, atol=1e-5, rtol=0)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_weight_is_not_modified_and_needs_no_gradient():
    w = torch.nn.Parameter(decaying(32, 48).float())
    copy = w.detach().clone()
    basis = solve_basis(w, 8)
    assert torch.equal(w.detach(), copy)
    assert not basis.projector.requires_grad


@pytest.mark.parametrize("rank", [4, 30])
def test_solving_is_deterministic_bit_for_bit(rank):
    w = decaying(48, 64).float()
    assert torch.equal(solve_basis(w, rank).projector, solve_basis(w, rank).projector)


def test_half_precision_is_upcast_in_slices(monkeypatch):
    monkeypatch.setattr(spectral, "SLICE_ELEMENTS", 100)
    for shape in SHAPES.values():
        w = decaying(*shape).bfloat16()
        rows = solve_basis(w, 8).directions(w)
        torch.testing.assert_close(projector_of(rows), projector_of(svd_rows(w, 8)), atol=2e-3, rtol=0)


def test_max_rank():
    assert max_rank(10, 30) == 10
    assert max_rank(10, 30, "random") == 30


def test_many_in_order_with_a_bar_for_long_work(monkeypatch, capsys):
    weights = {f"layers.{i}": decaying(16, 16 + i) for i in range(4)}
    requests = [BasisRequest(name, 4) for name in weights]
    solved = solve_many(requests, lambda r: (weights[r.name], "in"))
    assert [b.projector.shape for b in solved] == [(4, 16), (4, 17), (4, 18), (4, 19)]
    assert "PiCa basis" not in capsys.readouterr().err
    monkeypatch.setattr("pica.basis._progress.QUIET_SECONDS", 0.0)
    solve_many(requests, lambda r: (weights[r.name], "in"))
    assert "PiCa basis" in capsys.readouterr().err


def test_small_weights_are_solved_side_by_side_to_the_same_bases(monkeypatch):
    """Whatever the number of workers, and with one weight among them that is too large to share the machine with."""
    weights = {f"layers.{i}": decaying(24 + i, 20) for i in range(7)}
    weights["layers.3"] = decaying(70, 60)
    requests = [BasisRequest(name, 4) for name in weights]
    expected = [solve_basis(weights[r.name], 4) for r in requests]
    monkeypatch.setattr("pica.basis._progress.SIDE_BY_SIDE", 50)
    monkeypatch.setattr("pica.basis._progress.ROOM", 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        solved = solve_many(requests, lambda r: (weights[r.name], "in"))
        assert torch.get_num_threads() == 3
        weights["layers.5"][0, 0] = float("nan")
        with pytest.raises(BasisError, match=r"layers\.5"):
            solve_many(requests, lambda r: (weights[r.name], "in"))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    for found, wanted in zip(solved, expected):
        torch.testing.assert_close(found.projector, wanted.projector, atol=1e-5, rtol=0)
        assert found.side == wanted.side


def test_a_large_weight_has_all_cores_also_after_small_ones(monkeypatch):
    weights = {f"layers.{i}": decaying(24, 20) if i % 3 else decaying(70, 60) for i in range(7)}
    threads: dict[str, int] = {}

    def solve(weight, rank, **options):
        threads[options["name"]] = torch.get_num_threads()
        return solve_basis(weight, rank, **options)

    monkeypatch.setattr("pica.basis._progress.SIDE_BY_SIDE", 50)
    monkeypatch.setattr("pica.basis._progress.ROOM", 0)
    monkeypatch.setattr("pica.basis._progress.solve_basis", solve)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        solve_many([BasisRequest(name, 4) for name in weights], lambda r: (weights[r.name], "in"))
    finally:
        torch.set_num_threads(before)
    assert [threads[name] for name in weights] == [2, 1, 1, 2, 1, 1, 2]


def test_large_weights_share_the_machine_where_memory_allows():
    assert fits_beside((16384, 2048), 256, workers=2)
    assert not fits_beside((16384, 2048), 256, workers=16)  # one after another, with 16 cores each
    assert not fits_beside((14336, 4096), 256, workers=2)
    assert fits_beside((1536, 576), 128, workers=64)


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="torch before 2.9 has one switch for all")
def test_precision_switches_are_put_back_after_threads():
    switch = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue] - made by the backend
    weights = {f"layers.{i}": decaying(24, 20) for i in range(6)}
    before = torch.get_num_threads(), switch.fp32_precision
    try:
        torch.set_num_threads(4)
        switch.fp32_precision = "bf16"
        solved = solve_many([BasisRequest(name, 4) for name in weights], lambda r: (weights[r.name], "in"))
        assert switch.fp32_precision == "bf16"
    finally:
        torch.set_num_threads(before[0])
        switch.fp32_precision = before[1]
    for basis in solved:
        assert float((basis.projector @ basis.projector.T - torch.eye(4)).abs().max()) < 1e-5


@pytest.mark.parametrize("layout", ["rows", "columns", "neither"])
@pytest.mark.parametrize(("out", "inn"), [(30, 12), (12, 30), (16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_gram_matrix_of_any_layout(monkeypatch, layout, out, inn, dtype):
    monkeypatch.setattr(spectral, "SLICE_ELEMENTS", 100)
    w = torch.randn(out, inn).to(dtype)
    if layout == "columns":
        w = w.T.contiguous().T
    elif layout == "neither":
        w = torch.stack([w, w], dim=-1)[..., 0]
    wide = torch.promote_types(dtype, torch.float32)
    for side, expected in (("in", w.to(wide).T @ w.to(wide)), ("out", w.to(wide) @ w.to(wide).T)):
        found = spectral._gram(w, "in" if side == "in" else "out", wide)
        torch.testing.assert_close(found.tril(), expected.tril(), atol=1e-4, rtol=1e-5)


def test_an_interrupt_at_the_bar_ends_the_work(monkeypatch):
    """A notebook keeps the error and all that it refers to: threads and precision must not stay as the work set them."""
    monkeypatch.setattr("pica.basis._progress.QUIET_SECONDS", 0.0)
    ended = []

    def work():
        try:
            yield from range(5)
        finally:
            ended.append(True)

    class Bar:
        def update(self) -> None:
            raise KeyboardInterrupt

        def close(self) -> None:
            pass

    monkeypatch.setattr("pica.basis._progress._bar", lambda total, done, unit: Bar())
    results = work()
    with pytest.raises(KeyboardInterrupt):
        with_progress(results, 5)
    assert ended
