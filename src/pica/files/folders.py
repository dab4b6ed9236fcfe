"""Output folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pica.errors import OutputError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# safetensors, torch.save and shutil report a failed write in exceptions of their own, with only the text to tell by;
# "inline_container" is the part of torch that writes files.
_FULL_TEXTS = ("No space left", "StorageFull", "quota exceeded", "File too large", "inline_container")

_STALE_SECONDS = 3600.0
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


def disk_is_full(error: BaseException) -> bool:
    """Whether an exception, of whatever library, means that a write found no room."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    known = isinstance(error, (OSError, RuntimeError)) or type(error).__name__ == "SafetensorError"
    return known and any(part in str(error) for part in _FULL_TEXTS)


@contextmanager
def translated_write_errors(path: Path) -> Iterator[None]:
    """Turn failures to write into one sentence that names the place.

    Raises:
        OutputError: In place of an OSError, or of another library's error for a full disk.
    """
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        if disk_is_full(error):
            raise OutputError(
                f"No room left to write {str(path)!r}; free some space on that disk, or choose another place with "
                "--output."
            ) from error
        if isinstance(error, OSError):
            raise OutputError(f"Cannot write {str(path)!r}: {error.strerror or error}.") from error
        raise


def make_parents(target: Path) -> list[Path]:
    """Make the folders above `target` that are missing, and return them, the deepest first; see `remove_empty`."""
    missing = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except BaseException:
        remove_empty(missing)
        raise
    return missing


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those of these folders that are there and empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def atomic_folder(target: Path, *, replace: bool = True) -> Iterator[Path]:
    """A new folder to fill, which takes the name `target` once the block has ended without an error.

    Its files are flushed to disk first. A folder that is there is replaced in one step where the system can (Linux), so
    that whoever looks, also after a kill or a power cut, finds the one or the other; elsewhere in two.

    Args:
        target: Its name; where that is a link to a folder, that folder's.
        replace: Whether to replace a folder that is not empty.
    Yields:
        The folder, under a temporary name beside `target`.
    Raises:
        OutputError: Writing failed, or `target` is not empty and not to be replaced; nothing is left behind, and `target`
            is as it was.
    """
    target = Path(os.path.realpath(target.expanduser()))
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    with translated_write_errors(target):
        made = make_parents(target)
        try:
            partial.mkdir()
            _remove_leftovers(target)
            yield partial
            flush_all(partial)
            if replace:
                put_in_place(partial, target)
            else:
                _put_where_nothing_is(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            remove_empty(made)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A name for a file to write, which takes the name `target` once the block has ended without an error.

    Args:
        target: Its name; a file of that name is replaced.
    Yields:
        A temporary name beside `target`, of which there is no file yet.
    Raises:
        OutputError: Writing failed; nothing is left behind, and `target` is as it was.
    """
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    with translated_write_errors(target):
        made = make_parents(target)
        try:
            _remove_leftovers(target)
            yield partial
            _make_readable(partial, target.parent.stat().st_mode)
            flush(partial)
            os.replace(partial, target)
            flush(target.parent)
        finally:
            partial.unlink(missing_ok=True)
            remove_empty(made)


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """`atomic_folder`, which replaces no folder but an adapter's, and that only if asked.

    Args:
        target: The folder to make. It may exist where it is empty.
        overwrite: Whether an adapter that is there may be replaced. A folder that holds anything else never is.
    Yields:
        As `atomic_folder`.
    Raises:
        OutputError: `target` is a file or a folder that must not be replaced, or cannot be written.
    """
    check_replaceable(target, overwrite=overwrite)
    with atomic_folder(target, replace=overwrite) as partial:
        yield partial


def check_replaceable(target: Path, *, overwrite: bool) -> None:
    """Raise `OutputError` where `new_folder` may not put its folder."""
    target = target.expanduser()
    if target.is_dir():
        if not any(target.iterdir()):
            return
        if not overwrite:
            raise OutputError(
                f"{str(target)!r} is not empty; choose another folder, or pass overwrite=True (--overwrite)."
            )
        if not (target / "adapter_config.json").is_file():
            raise OutputError(f"{str(target)!r} holds something else than an adapter, so it is not replaced.")
    elif target.exists() or target.is_symlink():
        raise OutputError(f"{str(target)!r} is a file; choose a folder.")


def _remove_leftovers(target: Path) -> None:
    """Remove what processes that were killed more than an hour ago left of their attempts to write `target`."""
    for path in target.parent.iterdir():
        if path.name.startswith(f".{target.name}.") and path.suffix == ".partial":
            with suppress(OSError):
                if time.time() - path.stat().st_mtime <= _STALE_SECONDS:
                    continue
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def _put_where_nothing_is(partial: Path, target: Path) -> None:
    if os.name == "nt" and target.is_dir():
        target.rmdir()  # elsewhere renaming does that, in the same step
    try:
        os.rename(partial, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise OutputError(
            f"{str(target)!r} was free when this began and is no longer, so nothing was written; choose another place with "
            "--output."
        ) from None
    flush(target.parent)


def put_in_place(partial: Path, target: Path) -> None:
    """Give a complete folder its name; one of that name is removed. Both in the same folder, on one file system."""
    old = partial.with_suffix(".old")
    if not target.is_dir():
        os.rename(partial, target)
    elif _exchange(partial, target):
        old = partial  # that is what it is called now
    else:
        os.rename(target, old)
        try:
            os.rename(partial, target)
        except BaseException:  # also an interrupt: without this there would be no folder under its name
            os.rename(old, target)
            raise
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _make_readable(path: Path, folder_mode: int) -> None:
    """Give a new file the permissions that the umask says, which its folder shows: safetensors writes for the owner only."""
    found = path.lstat()
    if (
        stat.S_ISREG(found.st_mode) and found.st_nlink == 1
    ):  # a link to a file that was there before is not ours to change
        path.chmod(stat.S_IMODE(found.st_mode) | (folder_mode & 0o666))


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders in one step; False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    import ctypes

    try:
        rename = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):  # a C library without it
        return False
    rename.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def flush_all(folder: Path) -> None:
    """Have a folder and all in it on disk, readable by whom the system's settings say."""
    for path in folder.rglob("*"):
        _make_readable(path, folder.stat().st_mode)
        flush(path)
    flush(folder)


def flush(path: Path) -> None:
    """Have a file's or folder's content on disk before a rename is, so that a power cut cannot leave empty files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
