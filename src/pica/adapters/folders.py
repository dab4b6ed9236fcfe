"""Output folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pica.errors import OutputError


@contextmanager
def new_folder(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place when the block ends without an error.

    Its files are flushed to disk first. After an error it is removed, and `target` is as it was.

    Args:
        target: The folder to make. It may exist where it is empty.
        overwrite: Whether an adapter that is there may be replaced. A folder that holds anything else never is.
    Raises:
        OutputError: `target` is a file or a folder that must not be replaced, or cannot be written.
    """
    target = Path(os.path.abspath(target.expanduser()))
    check_replaceable(target, overwrite=overwrite)
    work = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        work.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{str(target)!r} cannot be written: {error.strerror}.") from error
    try:
        yield work
        for path in work.rglob("*"):
            _flush(path)
        _flush(work)
        _replace(target, work)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{str(target)!r} cannot be written ({error.strerror or error}); nothing was changed there."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_replaceable(target: Path, *, overwrite: bool) -> None:
    """Raise `OutputError` where `new_folder` may not put its folder."""
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


def _replace(target: Path, work: Path) -> None:
    old = None
    if target.is_dir():
        old = work.with_suffix(".old")
        target.rename(old)
    try:
        work.rename(target)
    except OSError:
        if old is not None:
            old.rename(target)
        raise
    _flush(target.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
