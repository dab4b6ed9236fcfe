"""Exports that a server made of adapters, on disk, within a bound, shared by all servers of a machine.

An entry is a LoRA folder named by what decides its content, so that it never goes stale. A server says which entries it
uses, in a file that it keeps locked as long as it lives: an engine reads an adapter's folder again at any time, so nothing
that is in use is removed, whatever the bound.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pica.adapters.integrations.compact import SHARED
from pica.files.claims import claimed
from pica.tuners.base.config_file import CONFIG, WEIGHTS

try:
    import fcntl
except ImportError:  # not a Unix: then nothing is known to be in use, and nothing is removed
    fcntl = None

logger = logging.getLogger(__name__)

_USERS = ".users"


class ExportCache:
    """A folder of exports.

    Attributes:
        folder: Where they are.
        limit: Bytes that they may take together.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder.expanduser().absolute(), limit
        self._lease: int | None = None
        self._used: set[str] = set()

    def entry(self, key: str) -> Path:
        """Where the export of that key is, or is to be made."""
        return self.folder / key

    def take(self, key: str) -> bool:
        """Whether the export is there, whole; if it is, it stays as long as this process lives."""
        with self._alone():
            if not is_whole(self.entry(key)):
                return False
            if key not in self._used:
                os.write(self._own_lease(), f"{key}\n".encode())
                self._used.add(key)
            with suppress(OSError):
                os.utime(self.entry(key))
            return True

    def _alone(self) -> AbstractContextManager[None]:
        """No other process takes or removes entries in this block."""
        return claimed(self.folder / _USERS, patience=60.0)

    def trim(self) -> None:
        """Remove the entries that were used longest ago, until the rest is within the bound."""
        with self._alone():
            self._trim()

    def _trim(self) -> None:
        entries = []
        for path in self.folder.iterdir():
            if not path.name.startswith(".") and path.is_dir():
                with suppress(OSError):
                    size = sum(file.stat().st_size for file in path.iterdir())
                    entries.append((path.stat().st_mtime, size, path))
        total = sum(size for _, size, _ in entries)
        if total <= self.limit:
            return
        kept = self._in_use()
        for _, size, path in sorted(entries):
            if total <= self.limit:
                return
            if kept is not None and path.name not in kept:
                gone = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.removed")
                with suppress(OSError):
                    os.rename(path, gone)  # in one step: nobody finds half an entry
                    shutil.rmtree(gone, ignore_errors=True)
                    total -= size
        if total > self.limit:
            logger.warning(
                "The exports in %s take %d MiB, more than their bound of %d MiB, and all that are left are in use; "
                "raise the bound, or export to a smaller rank.",
                self.folder,
                total >> 20,
                self.limit >> 20,
            )

    def _own_lease(self) -> int:
        if self._lease is None:
            users = self.folder / _USERS
            users.mkdir(parents=True, exist_ok=True)
            self._lease = os.open(
                users / uuid.uuid4().hex, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666
            )
            if fcntl is not None:
                fcntl.flock(self._lease, fcntl.LOCK_EX)
        return self._lease

    def _in_use(self) -> set[str] | None:
        """Keys that a living process uses; files of dead ones go. None where that cannot be told."""
        if fcntl is None:
            return None
        found = set(self._used)
        users = self.folder / _USERS
        for path in users.iterdir() if users.is_dir() else ():
            with suppress(FileNotFoundError):
                handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                except BlockingIOError:
                    found.update(path.read_text().split())
                except OSError:
                    return None
                finally:
                    os.close(handle)
        return found


def is_whole(folder: Path) -> bool:
    """Whether an exported folder is there with both of its files, and the tensors' file as long as its header says."""
    weights = folder / (SHARED if (folder / SHARED).is_file() else WEIGHTS)
    try:
        with safe_open(weights, framework="pt"):
            return (folder / CONFIG).is_file()
    except (OSError, SafetensorError):
        return False
