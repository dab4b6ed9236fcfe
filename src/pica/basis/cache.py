"""Solved bases on disk, so that loading the same base model again needs no decomposition.

An entry is named by what decides its content: the bytes, shape and dtype of the weight, the projection, the requested
side, the kind of device that solves, and the version of this format. So an entry never goes stale, needs no lock, and
whoever finds it may use it. It is one safetensors file with `projector`, `gains` and a checksum of both. What is read is
held against the weight (`_proof`), so that a file that somebody else has put there is found out. Whatever goes wrong with
the cache costs a decomposition and a note in the log, never the load.

`PICA_CACHE_DIR` moves the cache (set to nothing, it is off); `PICA_CACHE_LIMIT` bounds it, in bytes, together with the bases
that were made from data, which lie beside the solved ones (`pica.basis.shared`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import stat
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pica.basis import spectral
from pica.basis._proof import flaw
from pica.basis._rounding import clear_count
from pica.basis.spectral import Basis, Side, WantedSide
from pica.errors import ConfigError

try:
    from xxhash import xxh3_128 as _hasher
except ImportError:  # a broken or missing wheel: slower, and entries of their own
    from hashlib import blake2b as _hasher

HASH = "blake2b" if _hasher is hashlib.blake2b else "xxh3_128"

logger = logging.getLogger(__name__)

FORMAT = 2
"""Raised whenever an entry's layout or the solver's result changes, so that older entries are not found any more."""

SMALLEST_ELEMENTS = 96 * 96
"""Weights with fewer elements are solved each time: that takes 2 ms at most, and to read an entry takes 0.5 ms."""

DEFAULT_LIMIT = 20 * 2**30
"""Bytes that the entries may take together."""

_USE_SECONDS = 600.0  # a use is noted at most so often
_STALE_SECONDS = 3600.0  # a temporary file this old belongs to a process that was killed
_SUFFIX, _PARTIAL = ".safetensors", ".partial"
_SOLVED, _SHARED = "basis", "shared"

_enabled = True
_noted: set[str] = set()
_unscanned: dict[Path, int] = {}  # bytes that this process wrote since it last measured, by the folder of all caches


@dataclass(frozen=True)
class CacheUse:
    """What the cache takes.

    Attributes:
        folder: Of all of it; None where it is off.
        bytes, entries: Of solved bases.
        shared_bytes, shared_entries: Of bases that were made from data.
        limit: Bound of both together, in bytes.
    """

    folder: Path | None
    bytes: int
    entries: int
    shared_bytes: int
    shared_entries: int
    limit: int


def use_basis_cache(enabled: bool) -> None:
    """Switch the cache of solved bases off or on again, for this process."""
    global _enabled
    _enabled = enabled


def cache_folder() -> Path | None:
    """Where entries are kept, `basis` in `PICA_CACHE_DIR` or in the user's cache folder; None where the cache is off."""
    off = not _enabled or os.environ.get("PICA_CACHE_DIR") == ""
    return None if off else cache_home(os.environ) / _SOLVED


def shared_folder() -> Path | None:
    """Where bases that were made from data are kept, beside the solved ones; None where the cache is off."""
    folder = cache_folder()
    return None if folder is None else folder.parent / _SHARED


def cache_home(environment: Mapping[str, str]) -> Path:
    """The folder of all caches: `PICA_CACHE_DIR`, or `pica` in the user's cache folder where that is not set, or empty."""
    user = environment.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    chosen = environment.get("PICA_CACHE_DIR") or os.path.join(user, "pica")
    return Path(os.path.abspath(os.path.expanduser(chosen)))


def cache_limit() -> int:
    """Read the bound on the cache's size.

    Returns:
        `PICA_CACHE_LIMIT`, or else `DEFAULT_LIMIT`, in bytes.
    Raises:
        ConfigError: `PICA_CACHE_LIMIT` is not a whole number of bytes.
    """
    text = os.environ.get("PICA_CACHE_LIMIT", "")
    if not text:
        return DEFAULT_LIMIT
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"PICA_CACHE_LIMIT={text!r} must be a whole number of bytes, e.g. {DEFAULT_LIMIT}.")
    return int(text)


def cache_use() -> CacheUse:
    """What the cache takes now."""
    folder = cache_folder()
    if folder is None:
        return CacheUse(None, 0, 0, 0, 0, cache_limit())
    solved, shared = _counted(folder), _counted(folder.parent / _SHARED)
    return CacheUse(folder.parent, *solved, *shared, cache_limit())


def _counted(folder: Path) -> tuple[int, int]:
    """Bytes, and number of entries."""
    found = _files(folder)
    return sum(size for _, size, _ in found), sum(path.suffix == _SUFFIX for path, _, _ in found)


def clear_cache() -> CacheUse:
    """Remove every entry (and nothing else that may be in the folders); returns what the cache took before."""
    before = cache_use()
    if before.folder is not None:
        for path, _, _ in _all_files(before.folder):
            path.unlink(missing_ok=True)
    return before


def note_use(path: Path) -> None:
    """Note that an entry is used now, if the path is one: those that were not used for longest go first."""
    if path.parent in (cache_folder(), shared_folder()):
        with suppress(OSError):
            # not each time: who has read a whole basis knows by this time whether the file is still the same
            if time.time() - path.stat().st_mtime > _USE_SECONDS:
                os.utime(path)


def cached_solve_basis(
    weight: Tensor,
    rank: int,
    *,
    projection: str = "principal",
    side: WantedSide = "auto",
    seed: int = 0,
    name: str = "weight",
    solve: Callable[..., Basis] = spectral.solve_basis,
) -> Basis:
    """`solve_basis`, or what it gave for the same weight before.

    One entry serves every smaller rank, as its first rows; a larger rank replaces it. Random directions are not kept
    (they cost little), nor are weights below `SMALLEST_ELEMENTS`.

    Args:
        weight: Frozen weight (out, in); this and what follows as for `solve_basis`.
        rank: Number of directions.
        projection: "principal", "minor" or "random".
        side: "in", "out" or "auto".
        seed: Of random directions.
        name: The layer, for messages and for the seed.
        solve: Called where there is no entry. Entries are those of `solve_basis`; another function is always called.
    Returns:
        The basis, on the weight's device, with memory of its own.
    Raises:
        BasisError: As `solve_basis`.
        RankError: As `solve_basis`.
        ConfigError: As `solve_basis`, or as `cache_limit`.
    """

    def fresh() -> Basis:
        return solve(weight, rank, projection=projection, side=side, seed=seed, name=name)

    folder = cache_folder()
    if (
        folder is None
        or solve is not spectral.solve_basis
        or projection not in ("principal", "minor")
        or weight.ndim != 2
        or weight.is_meta
        or not weight.is_floating_point()
        or weight.numel() < SMALLEST_ELEMENTS
        or not 1 <= rank <= min(weight.shape)  # the solver says what is wrong
    ):
        return fresh()
    _warn_if_shared(folder)
    limit = cache_limit()
    key = _key(weight, projection, side)
    path = folder / f"{key}{_SUFFIX}"
    found = _read(path, key, weight, rank, projection, side)
    if found is not None:
        return found
    basis = fresh()
    _write(path, key, basis, rank, limit)
    return basis


def _digest(tensor: Tensor) -> str:
    """Hash of a tensor's bytes, in row-major order."""
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return _hasher(content).hexdigest()


def _key(weight: Tensor, projection: str, side: str) -> str:
    dtype, shape, device = str(weight.dtype), tuple(weight.shape), weight.device.type
    parts = [FORMAT, HASH, _digest(weight), dtype, shape, projection, side, device]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()


def _checksum(projector: Tensor, gains: Tensor) -> str:
    return f"{HASH}:{_digest(projector)}{_digest(gains)}"


def _read(path: Path, key: str, weight: Tensor, rank: int, projection: str, side: str) -> Basis | None:
    """The first `rank` directions of an entry, or None where it is missing, too small or damaged (then it is removed)."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            projector, gains = file.get_tensor("projector"), file.get_tensor("gains")
        asked, solved_side = int(metadata.get("rank", "")), metadata.get("side")
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        if not path.exists():  # removed while it was being opened, which torch reports as a RuntimeError
            return None
        return _discard(path, str(error) or type(error).__name__)
    used: Side = "out" if solved_side == "out" else "in"
    rows = projector.shape[0] if projector.ndim else -1
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    width = weight.shape[1] if used == "in" else weight.shape[0]
    if metadata.get("key") != key or solved_side != used or side not in ("auto", used):
        return _discard(path, "it belongs to another weight")
    if projector.shape != (rows, width) or gains.shape != (rows,) or not 0 <= rows <= asked:
        return _discard(path, f"shapes {tuple(projector.shape)} and {tuple(gains.shape)}")
    if projector.dtype != dtype or gains.dtype != dtype or not metadata.get("solver"):
        return _discard(path, f"dtypes {projector.dtype} and {gains.dtype}, solver {metadata.get('solver')!r}")
    if metadata.get("checksum") != _checksum(projector, gains):
        return _discard(path, "its checksum is wrong")
    if not math.isfinite(float(projector.sum()) + float(gains.sum())):  # NaN and infinity do not vanish in a sum
        return _discard(path, "NaN or infinity")
    if rows > min(weight.shape):
        return _discard(path, f"{rows} directions of a weight {tuple(weight.shape)}")
    if asked < rank and rows == asked:  # fewer rows than asked for: the weight has no more, whatever the rank
        return None
    if (found := flaw(weight, projector, gains, used, projection)) is not None:
        return _discard(path, f"it is not this weight's basis: {found}")
    note_use(path)
    # copies, so that nothing refers to the file and the rows that were not asked for take no memory
    kept, lengths = projector[:rank].clone(), gains[:rank].clone()
    clear = clear_count(weight, lengths) if projection == "principal" else None
    return Basis(kept.to(weight.device), used, lengths.to(weight.device), projection, metadata["solver"], clear)


def _discard(path: Path, why: str) -> None:
    logger.warning("%s in the basis cache is damaged (%s); its basis is computed again", path, why)
    with suppress(OSError):
        path.unlink()


def _write(path: Path, key: str, basis: Basis, rank: int, limit: int) -> None:
    """Store an entry under a temporary name, then rename it: readers and other writers see whole files only.

    Nothing is flushed: an entry that a power cut leaves half-written fails its checksum.
    """
    projector, gains = basis.projector.cpu().contiguous(), basis.gains.cpu().contiguous()
    size = projector.nbytes + gains.nbytes
    if size > limit or _rank_of(path) >= rank:  # another process may have stored more in the meantime
        return
    metadata = {
        "key": key,
        "rank": str(rank),
        "side": basis.side,
        "solver": basis.solver,
        "checksum": _checksum(projector, gains),
    }
    partial = path.with_name(f".{key}.{uuid.uuid4().hex}{_PARTIAL}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        save_file({"projector": projector, "gains": gains}, partial, metadata)
        os.replace(partial, path)
        make_room(path.parent.parent, size, limit)
    except (OSError, SafetensorError) as error:
        _note_once(f"Nothing can be stored in the basis cache {str(path.parent)!r} ({error}); going on without it.")
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _rank_of(path: Path) -> int:
    """Rank that a (whole) entry was solved for; 0 where there is none."""
    try:
        with safe_open(path, framework="pt") as file:
            return int((file.metadata() or {}).get("rank", "0"))
    except (OSError, SafetensorError, ValueError, RuntimeError):  # RuntimeError: removed while it was being opened
        return 0


def _note_once(text: str) -> None:
    if text.partition("(")[0] not in _noted:  # every layer of a model would say the same
        _noted.add(text.partition("(")[0])
        logger.warning("%s", text)


def _warn_if_shared(folder: Path) -> None:
    """Say once that others may write to the cache folder: they decide how long a load takes, though not what it gives."""
    if (why := _who_else_writes(folder)) is not None:
        _note_once(
            f"Basis cache {str(folder)!r}: {why}. Its entries are checked; for one of your own, set PICA_CACHE_DIR."
        )


def _who_else_writes(folder: Path) -> str | None:
    try:
        import grp
        import pwd

        status, me = folder.stat(), os.geteuid()
        if status.st_uid not in (me, 0):
            return "another user owns the folder"
        if status.st_mode & stat.S_IWOTH:
            return "everybody may write to the folder"
        if status.st_mode & stat.S_IWGRP:
            group, user = grp.getgrgid(status.st_gid), pwd.getpwuid(me)
            if not (
                group.gr_gid == user.pw_gid and group.gr_name == user.pw_name and {*group.gr_mem} <= {user.pw_name}
            ):
                return f"the group {group.gr_name} may write to the folder"
    except (ImportError, OSError, KeyError):  # not a Unix; no such folder yet; a user or group without a name
        pass
    return None


def _files(folder: Path) -> list[tuple[Path, int, float]]:
    """(path, bytes, time of last use) of entries and of temporary files, ours only."""
    found: list[tuple[Path, int, float]] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                with suppress(OSError):  # another process has removed it
                    if entry.name.endswith((_SUFFIX, _PARTIAL)) and entry.is_file(follow_symlinks=False):
                        status = entry.stat(follow_symlinks=False)
                        found.append((Path(entry.path), status.st_size, status.st_mtime))
    except OSError:
        return []
    return found


def _all_files(home: Path) -> list[tuple[Path, int, float]]:
    """As `_files`, of solved bases and of those that were made from data."""
    return [*_files(home / _SOLVED), *_files(home / _SHARED)]


def make_room(home: Path, written: int, limit: int) -> None:
    """Remove the entries that were not used for longest, until the rest is within `limit` bytes.

    To measure the folders after each write would take longer than to solve, once it holds many entries. So a process
    measures them at its first write and after each 1/64 of the limit, and then leaves that much room.

    Args:
        home: The folder of all caches.
        written: Bytes that were added.
        limit: Bytes that there may be.
    """
    slack = limit // 64
    _unscanned[home] = _unscanned.get(home, slack) + written
    if _unscanned[home] < slack:
        return
    _unscanned[home] = 0
    found = sorted(_all_files(home), key=lambda item: item[2])
    total = sum(size for _, size, _ in found)
    now = time.time()
    for path, size, used in found:
        abandoned = path.suffix == _PARTIAL and now - used > _STALE_SECONDS
        if abandoned or (total > limit - slack and path.suffix == _SUFFIX):
            path.unlink(missing_ok=True)
            total -= size
