"""One writer at a time for each output folder or file, also across processes and machines that share a file system."""

from __future__ import annotations

import errno
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pica.errors import InUseError, OutputError
from pica.files.folders import make_parents, remove_empty, translated_write_errors

LOCK = ".lock"
"""Ending of a lock's name beside what is claimed; its whole name where it has to lie in the claimed folder."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}  # of some network file systems
_SECONDS_BETWEEN_TRIES = 0.1


@contextmanager
def claimed(target: Path, *, patience: float = 0.0) -> Iterator[None]:
    """Be the only one who writes `target` in the block. Whether that exists, and may be replaced, is to be checked inside.

    The claim is the system's lock on a hidden file beside `target`, which is gone after the block. The system itself
    gives it up with its process, however that ends, so that a crashed owner stands in nobody's way. Where the system or
    the file system has no such locks, nothing is claimed.

    Args:
        target: A file or folder, there or not. Folders above it are made; those that are empty after the block go again.
        patience: Seconds to wait for another owner.
    Raises:
        InUseError: Another process has claimed it.
        OutputError: It cannot be written beside.
    """
    try:
        import fcntl
    except ImportError:  # not a Unix: there is nothing as simple
        yield
        return
    target = Path(os.path.realpath(target.expanduser()))
    made, until = list[Path](), time.monotonic() + patience
    try:
        while True:
            with translated_write_errors(target):
                made += make_parents(target)
                try:
                    path, handle = _opened(target)
                except FileNotFoundError:  # another one's failed attempt has just removed the folder again
                    continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(handle, 300, 0).decode(errors="replace").strip()
                os.close(handle)
                if time.monotonic() >= until:
                    raise InUseError(
                        f"Another pica{f' ({owner})' if owner else ''} is writing {str(target)!r}; wait for it, or choose "
                        "another place with --output."
                    ) from None
                time.sleep(_SECONDS_BETWEEN_TRIES)
                continue
            except OSError as error:
                os.close(handle)
                if error.errno not in _NO_LOCKS:
                    raise OutputError(f"Cannot lock {str(path)!r}: {error.strerror}.") from error
                yield
                return
            if _still_there(path, handle):
                break
            os.close(handle)  # its owner has removed it between our opening and locking it
        with suppress(OSError):  # on a full disk: it only makes the message richer
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()  # while it is ours: who has opened it meanwhile sees that it is gone, and tries again
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough where a forked process has it open too
            os.close(handle)
    finally:
        remove_empty(made)


def _opened(target: Path) -> tuple[Path, int]:
    """The lock's file, beside `target`; inside, where that is a folder (a mounted one) in a place not to be written."""
    path = target.parent / f".{target.name}{LOCK}"
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return path, os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not target.is_dir():
            raise
    path = target / LOCK
    return path, os.open(path, flags, 0o666)


def _still_there(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False
