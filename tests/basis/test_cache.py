"""The cache of solved bases: what it gives back, and that nothing wrong with it ever reaches a basis."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests import processes
from torch import Tensor

from pica.basis import BasisRequest, cache, cached_solve_basis, solve_basis, solve_many, spectral
from pica.basis._proof import flaw
from pica.basis.file import About, BasisFile, LayerRows, find_basis, write_basis
from pica.basis.shared import keep, kept
from pica.basis.spectral import Basis
from pica.cli import main
from pica.errors import BasisError, ConfigError, RankError

SHAPE = (112, 144)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv("PICA_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("PICA_CACHE_LIMIT", raising=False)
    monkeypatch.setattr(cache, "_noted", set())
    monkeypatch.setattr(cache, "_unscanned", {})
    return tmp_path / "cache" / "basis"


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rank of each decomposition that is really made."""
    ranks: list[int] = []
    original = spectral._solve_with_fallbacks

    def count(w: Tensor, rank: int, *rest: object) -> Basis:
        ranks.append(rank)
        return original(w, rank, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(spectral, "_solve_with_fallbacks", count)
    return ranks


def weight(seed: int = 0, dtype: torch.dtype = torch.float32, shape: tuple[int, int] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def entry(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def same(found: Basis, expected: Basis) -> bool:
    return (
        torch.equal(found.projector, expected.projector)
        and torch.equal(found.gains, expected.gains)
        and (found.side, found.projection, found.solver) == (expected.side, expected.projection, expected.solver)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("projection", ["principal", "minor"])
@pytest.mark.parametrize("side", ["auto", "in", "out"])
def test_a_second_solve_gives_the_same_bits_without_solving(solved: list[int], dtype, projection, side):
    w = weight(dtype=dtype)
    first = cached_solve_basis(w, 12, projection=projection, side=side)
    assert solved == [12]
    assert same(first, solve_basis(w, 12, projection=projection, side=side))
    assert same(cached_solve_basis(w.clone(), 12, projection=projection, side=side, name="another layer"), first)
    assert same(cached_solve_basis(w.T.contiguous().T, 12, projection=projection, side=side), first)
    assert solved == [12, 12]  # the second one is the comparison's


def test_a_smaller_rank_is_served_and_a_larger_one_replaces(folder: Path, solved: list[int]):
    w = weight()
    large = cached_solve_basis(w, 20)
    small = cached_solve_basis(w, 8)
    assert solved == [20]
    assert torch.equal(small.projector, large.projector[:8])
    assert small.projector.untyped_storage().nbytes() == small.projector.nbytes
    torch.testing.assert_close(small.projector, solve_basis(w, 8).projector, atol=1e-4, rtol=0)
    solved.clear()
    assert cached_solve_basis(w, 30).rank == 30
    assert solved == [30]
    assert cached_solve_basis(w, 20).rank == 20
    assert solved == [30]
    assert load_file(entry(folder))["projector"].shape[0] == 30


def test_a_process_that_solved_less_does_not_replace_more(folder: Path):
    w = weight()
    cached_solve_basis(w, 20)
    path = entry(folder)
    cache._write(path, path.stem, solve_basis(w, 8), 8, 10**9)
    assert load_file(path)["projector"].shape[0] == 20


@pytest.mark.parametrize("rows", [0, 5])
def test_a_weight_with_few_directions_serves_every_rank(solved: list[int], rows: int):
    w = weight(shape=(112, 5))[:, :rows] @ weight(shape=(5, 144))[:rows]
    assert cached_solve_basis(w, 12).rank == rows
    solved.clear()
    assert cached_solve_basis(w, 60).rank == rows
    assert solved == []


def test_whatever_decides_a_basis_is_in_the_key(folder: Path):
    w = weight()
    changed = w.clone()
    changed.view(torch.uint8).view(-1)[7] ^= 1  # one bit
    for other, settings in [
        (w, {}),
        (changed, {}),
        (w.bfloat16(), {}),
        (w.bfloat16().float(), {}),
        (w.half().view(torch.bfloat16), {}),
        (w.half(), {}),
        (w.reshape(144, 112), {}),
        (w, {"projection": "minor"}),
        (w, {"side": "in"}),
    ]:
        before = len(list(folder.iterdir())) if folder.is_dir() else 0
        assert same(cached_solve_basis(other, 8, **settings), solve_basis(other, 8, **settings))
        assert len(list(folder.iterdir())) == before + 1


def test_small_weights_and_random_directions_are_not_stored(folder: Path):
    cached_solve_basis(weight(shape=(64, 64)), 8)
    cached_solve_basis(weight(), 8, projection="random")
    assert not folder.exists()


def test_errors_are_those_of_the_solver(folder: Path):
    with pytest.raises(RankError, match=r"q: rank=200 is outside 1\.\.112"):
        cached_solve_basis(weight(), 200, name="q")
    with pytest.raises(ConfigError, match="projection='top'"):
        cached_solve_basis(weight(), 2, projection="top")
    with pytest.raises(BasisError, match="meta device"):
        cached_solve_basis(weight().to("meta"), 2)
    with pytest.raises(BasisError, match="NaN or infinity"):
        cached_solve_basis(weight() / 0, 2)
    assert not folder.exists()


def test_another_solver_is_always_called_and_never_stored(folder: Path):
    calls: list[int] = []

    def other(w: Tensor, rank: int, **settings: object) -> Basis:
        calls.append(rank)
        basis = solve_basis(w, rank)
        return Basis(-basis.projector, basis.side, basis.gains, basis.projection, "other")

    cached_solve_basis(weight(), 8)
    content = entry(folder).read_bytes()
    assert cached_solve_basis(weight(), 8, solve=other).solver == "other"
    cached_solve_basis(weight(1), 8, solve=other)
    assert calls == [8, 8]
    assert entry(folder).read_bytes() == content


def test_solve_many_uses_it(solved: list[int]):
    requests = [BasisRequest(f"layer{i}", 8) for i in range(3)]
    first, second = (solve_many(requests, lambda r: (weight(int(r.name[-1])), "out")) for _ in range(2))
    assert solved == [8, 8, 8]
    assert all(same(a, b) for a, b in zip(first, second))


def rewrite(change: Callable[[dict[str, Tensor], dict[str, str]], object]) -> Callable[[Path], object]:
    def apply(path: Path) -> None:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
        change(tensors, metadata)
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)

    return apply


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def forge(tensors: dict[str, Tensor], metadata: dict[str, str], **changed: Tensor) -> None:
    """Changed tensors with a checksum that is right for them."""
    tensors.update(changed)
    metadata["checksum"] = cache._checksum(tensors["projector"], tensors["gains"])


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-50]), "damaged"),
        (lambda p: p.write_bytes(p.read_bytes()[:5]), "damaged"),
        (lambda p: p.write_bytes(b""), "damaged"),
        (lambda p: p.write_bytes(b"\xff" * 8 + p.read_bytes()[8:]), "damaged"),
        (flip, "checksum"),
        (rewrite(lambda t, m: t.pop("gains")), "gains"),
        (rewrite(lambda t, m: m.clear()), "damaged"),
        (rewrite(lambda t, m: m.update(key="0" * 40)), "another weight"),
        (rewrite(lambda t, m: m.update(side="left")), "another weight"),
        (rewrite(lambda t, m: m.update(rank="many")), "damaged"),
        (rewrite(lambda t, m: forge(t, m, projector=t["projector"][:, :-1])), "shapes"),
        (rewrite(lambda t, m: forge(t, m, gains=t["gains"][:-1])), "shapes"),
        (rewrite(lambda t, m: forge(t, m, projector=torch.tensor(1.0))), "shapes"),
        (rewrite(lambda t, m: forge(t, m, projector=t["projector"].double())), "dtypes"),
        (rewrite(lambda t, m: forge(t, m, projector=t["projector"] * torch.nan)), "NaN"),
    ],
)
def test_a_damaged_entry_is_solved_again_and_replaced(folder: Path, solved: list[int], caplog, damage, why: str):
    w = weight()
    first = cached_solve_basis(w, 12)
    size = entry(folder).stat().st_size
    damage(entry(folder))
    with caplog.at_level(logging.WARNING, "pica"):
        assert same(cached_solve_basis(w, 12), first)
    (note,) = caplog.messages
    assert why in note
    assert str(entry(folder)) in note
    assert solved == [12, 12]
    assert entry(folder).stat().st_size == size
    assert same(cached_solve_basis(w, 12), first)
    assert solved == [12, 12]


def _plant(folder: Path, projector: Tensor, gains: Tensor) -> None:
    path = entry(folder)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    checksum = cache._checksum(projector.contiguous(), gains.contiguous())
    tensors = {"projector": projector.contiguous(), "gains": gains.contiguous()}
    save_file(tensors, path, {**metadata, "checksum": checksum})


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e25])
@pytest.mark.parametrize("how", ["random rows", "later directions", "gains", "not orthonormal", "swapped", "fewer"])
@pytest.mark.parametrize("shape", [SHAPE, SHAPE[::-1]])
def test_an_entry_of_other_directions_costs_a_solve(folder: Path, solved: list[int], caplog, shape, how: str, size):
    spectrum = 0.9 ** torch.arange(112)  # no near-ties: the directions are determined
    u, _, vt = torch.linalg.svd(weight(shape=shape).float(), full_matrices=False)
    w = (u * spectrum) @ vt * size
    expected = cached_solve_basis(w, 12)
    projector, gains = expected.projector.clone(), expected.gains.clone()
    rows = projector if expected.side == "in" else projector * gains.unsqueeze(1)
    if how == "random rows":
        rows = torch.linalg.qr(torch.randn(rows.shape[1], 12))[0].T
        gains = (rows.double() @ (w.T if expected.side == "in" else w).double()).norm(dim=1).float()
    elif how == "later directions":
        rows, gains = (vt if expected.side == "in" else u.T)[20:32], spectrum[20:32] * size
    elif how == "gains":
        gains = gains * torch.linspace(1, 1.5, 12)
    elif how == "not orthonormal":
        rows = rows.clone()
        rows[3] = rows[2]
    elif how == "swapped":
        rows = rows.flip(0)
    else:
        rows, gains = rows[:0], gains[:0]
    _plant(folder, rows if expected.side == "in" else rows / gains.unsqueeze(1), gains)
    found = cached_solve_basis(w, 12)
    assert same(found, expected)
    assert solved == [12, 12]
    assert "it is not this weight's basis" in caplog.text
    assert same(cached_solve_basis(w, 12), expected)  # which took the entry's place
    assert solved == [12, 12]


@pytest.mark.parametrize("rank", [3, 60, 112])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spectrum", ["flat", "low rank", "steep", "tied"])
def test_an_entry_of_the_weights_own_is_never_doubted(solved: list[int], rank: int, dtype, spectrum: str):
    index = torch.arange(112)
    values = {
        "flat": torch.ones(112),
        "low rank": (index < 5) * 1.0,
        "steep": 0.8**index,
        "tied": 1 / (1 + torch.div(index, 2, rounding_mode="floor")),
    }[spectrum]
    u, _, vt = torch.linalg.svd(weight().float(), full_matrices=False)
    w = ((u * values) @ vt).to(dtype)
    first = cached_solve_basis(w, rank)
    for _ in range(5):  # what is tested is drawn anew each time
        found = cached_solve_basis(w, rank)
        assert same(found, first)
        assert found.clear == first.clear
    assert solved == [rank]


@pytest.mark.skipif(os.name != "posix", reason="asks for owners and modes of files")
def test_a_folder_that_others_may_write_to_is_told_once(folder: Path, caplog):
    cached_solve_basis(weight(), 12)
    assert folder.stat().st_mode & 0o077 == 0
    assert "Basis cache" not in caplog.text
    folder.chmod(0o777)
    cached_solve_basis(weight(), 12)
    cached_solve_basis(weight(1), 12)
    assert caplog.text.count("everybody may write to the folder") == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="gives a folder to another group")
def test_a_group_of_others_is_told_and_ones_own_is_not(folder: Path, caplog):
    import grp

    cached_solve_basis(weight(), 12)
    folder.chmod(0o770)
    cached_solve_basis(weight(1), 12)
    assert "Basis cache" not in caplog.text
    other = next(group for group in grp.getgrall() if group.gr_gid != os.getegid())
    os.chown(folder, -1, other.gr_gid)
    cached_solve_basis(weight(2), 12)
    assert f"the group {other.gr_name} may write to the folder" in caplog.text


@pytest.mark.parametrize("side", ["in", "out"])
def test_one_wrong_direction_is_found_whatever_is_drawn(side: Literal["in", "out"]):
    u, spectrum, vt = torch.linalg.svd(weight(), full_matrices=False)
    rows = (vt if side == "in" else u.T / spectrum.unsqueeze(1))[:12].contiguous()
    assert flaw(weight(), rows, spectrum[:12], side, "principal") is None
    wrong = spectrum[:12].clone()
    wrong[5] *= 1.1
    for _ in range(20):
        assert flaw(weight(), rows, wrong, side, "principal") is not None


def test_entries_are_never_unpickled(folder: Path, monkeypatch: pytest.MonkeyPatch):
    first = cached_solve_basis(weight(), 12)
    torch.save({"projector": first.projector, "gains": first.gains}, entry(folder))
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("unpickled"))
    assert same(cached_solve_basis(weight(), 12), first)


@pytest.mark.parametrize("how", ["file in the way", "read-only", "no room for the file", "no room for the name"])
def test_a_folder_that_takes_nothing_is_noted_once(folder: Path, monkeypatch, caplog, how: str):
    def refuse(code: int) -> Callable[..., None]:
        def raise_it(*args: object, **settings: object) -> None:
            raise OSError(code, os.strerror(code))

        return raise_it

    if how == "file in the way":
        folder.parent.write_text("")
    elif how == "read-only":
        monkeypatch.setattr(Path, "mkdir", refuse(errno.EROFS))
    elif how == "no room for the file":
        monkeypatch.setattr(cache, "save_file", refuse(errno.ENOSPC))
    else:
        monkeypatch.setattr(os, "replace", refuse(errno.ENOSPC))
    with caplog.at_level(logging.WARNING, "pica"):
        for seed in (0, 1, 0):
            assert same(cached_solve_basis(weight(seed), 12), solve_basis(weight(seed), 12))
    assert len(caplog.messages) == 1
    assert "Nothing can be stored in the basis cache" in caplog.messages[0]
    assert not folder.is_dir() or list(folder.iterdir()) == []


def write_and_read(ready: Path, ranks: list[int]) -> None:
    weights = [torch.randn(112, 144, generator=torch.Generator().manual_seed(s)) for s in range(6)]
    ready.touch()
    for turn in range(6):
        for w in weights:
            basis = cached_solve_basis(w, ranks[turn % len(ranks)])
            gram = basis.directions(w) @ basis.directions(w).T
            assert torch.allclose(gram, torch.eye(basis.rank), atol=1e-4)
            torch.testing.assert_close((w @ basis.directions(w).T).norm(dim=0), basis.gains)


def test_processes_may_share_a_folder(folder: Path, tmp_path: Path):
    """Two processes write and read the same entries, while this one keeps removing and truncating them."""
    said = tmp_path / "said"
    writers = [
        processes.start(write_and_read, tmp_path / f"ready{i}", ranks, said=said)
        for i, ranks in enumerate([[6, 12, 24], [24, 8]])
    ]
    turn = 0
    while any(writer.is_alive() for writer in writers):
        found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
        if found and all((tmp_path / f"ready{i}").exists() for i in range(2)):
            path = found[turn % len(found)]
            if turn % 2:
                path.unlink(missing_ok=True)
            else:
                broken = path.with_name("broken")
                broken.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
                os.replace(broken, path)
            turn += 1
        time.sleep(0.005)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0, said.read_text()
    assert [path for path in folder.iterdir() if path.suffix != ".safetensors"] == []


def test_the_least_recently_used_entries_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch, solved: list[int]):
    cached_solve_basis(weight(0), 16)
    size = entry(folder).stat().st_size
    monkeypatch.setenv("PICA_CACHE_LIMIT", str(int(3.2 * size)))
    (oldest,) = folder.iterdir()
    os.utime(oldest, (1, 1))
    for seed in (1, 2):
        cached_solve_basis(weight(seed), 16)
        os.utime(next(p for p in folder.iterdir() if p.stat().st_mtime > 1e9), (1 + seed, 1 + seed))
    cached_solve_basis(weight(0), 16)  # used: no longer the oldest
    cached_solve_basis(weight(3), 16)
    assert cache.cache_use().bytes <= int(3.2 * size)
    solved.clear()
    for seed in (0, 2, 3):
        cached_solve_basis(weight(seed), 16)
    assert solved == []
    cached_solve_basis(weight(1), 16)
    assert solved == [16]


def test_what_killed_processes_left_is_removed(folder: Path):
    folder.mkdir(parents=True)
    for name, age in (("old", 7200), ("new", 60)):
        left = folder / f".{name}.partial"
        left.write_bytes(b"half")
        os.utime(left, (time.time() - age, time.time() - age))
    cached_solve_basis(weight(), 8)
    assert sorted(path.name for path in folder.glob(".*")) == [".new.partial"]


def test_a_bound_that_is_no_number_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PICA_CACHE_LIMIT", "20GB")
    with pytest.raises(ConfigError, match="PICA_CACHE_LIMIT='20GB' must be a whole number of bytes"):
        cached_solve_basis(weight(), 8)


def test_where_it_is_and_how_it_is_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert cache.cache_folder() == tmp_path / "cache" / "basis"
    cache.use_basis_cache(False)
    try:
        assert cache.cache_folder() is None
        cached_solve_basis(weight(), 8)
        assert not (tmp_path / "cache").exists()
    finally:
        cache.use_basis_cache(True)
    monkeypatch.setenv("PICA_CACHE_DIR", "")
    assert cache.cache_folder() is None
    monkeypatch.delenv("PICA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "pica" / "basis"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "pica" / "basis"


@pytest.fixture
def made(tmp_path: Path) -> BasisFile:
    """A basis of 24 kB that no weight can tell."""
    layer = LayerRows(torch.linalg.qr(torch.randn(128, 40)).Q.T.contiguous(), torch.ones(40), torch.ones(64))
    return write_basis(tmp_path / "made", {"block.0.q": layer}, About("activation", 40, "a model"))


def test_bases_from_data_are_bounded_with_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch, made: BasisFile):
    keep("a" * 64, made)
    cached_solve_basis(weight(0), 16)
    size = made.path.stat().st_size
    assert cache.cache_use() == cache.CacheUse(
        folder.parent, entry(folder).stat().st_size, 1, size, 1, cache.DEFAULT_LIMIT
    )
    (shared,) = (folder.parent / "shared").iterdir()
    os.utime(shared, (1, 1))
    assert kept("a" * 64) is not None  # used: no longer the oldest
    os.utime(entry(folder), (2, 2))
    monkeypatch.setenv("PICA_CACHE_LIMIT", str(int(2.2 * size)))
    monkeypatch.setattr(cache, "_unscanned", {})
    keep("b" * 64, made)
    assert kept("a" * 64) is not None
    assert kept("b" * 64) is not None
    assert cache.cache_use().entries == 0, "the solved one was not used for longest"
    os.utime(shared, (1, 1))
    cached_solve_basis(weight(0), 16)
    cached_solve_basis(weight(1), 16)
    assert kept("a" * 64) is None
    monkeypatch.setenv("PICA_CACHE_LIMIT", str(size - 1))
    keep("c" * 64, made)
    assert kept("c" * 64) is None, "one that is larger than the bound takes nobody else's place"


def test_a_use_of_a_basis_from_data_does_not_make_it_another_file(folder: Path, made: BasisFile):
    keep("a" * 64, made)
    found = kept("a" * 64)
    assert found is not None
    assert kept("a" * 64) is found
    assert find_basis(None, made.digest, None) is found


def test_the_command_shows_and_empties_it(folder: Path, made: BasisFile, capsys: pytest.CaptureFixture[str]):
    cached_solve_basis(weight(), 8)
    keep("a" * 64, made)
    (folder / "notes.txt").write_text("not ours")
    assert main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert f"{folder.parent}: 1 solved bases, " in shown
    assert " and 1 made from data, 0.0 MiB; together of at most 20 GiB" in shown
    assert main(["cache", "--no-cache"]) == 0
    assert "is off" in capsys.readouterr().out
    assert main(["cache", "clear"]) == 0
    assert "Removed 1 solved bases" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert list((folder.parent / "shared").iterdir()) == []
