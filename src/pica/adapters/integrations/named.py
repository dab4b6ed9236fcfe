"""Adapters in one folder, found by the name that a client of a server sends: never anything outside of the folder."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from pica.adapters.base_model import CONFIGS
from pica.errors import AdapterFileError, ConfigError
from pica.files.documents import DocumentError, read_json
from pica.tuners.base.config_file import CONFIG, WEIGHTS

METHODS = tuple(CONFIGS)  # no mapping: what a file holds may be a list, which none can be asked for
_LONGEST = 255  # bytes of a part of a name, as file systems have it


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter as it is on disk at one moment.

    Attributes:
        name: What clients call it.
        folder: Where it is, without links.
        state: Changes whenever one of its two files is written or replaced; cheap to ask for.
    """

    name: str
    folder: Path
    state: tuple[tuple[int, ...], ...]

    def digest(self) -> str:
        """A hash of the adapter.

        Returns:
            64 hexadecimal digits, which both files' bytes decide.
        Raises:
            AdapterFileError: one of them cannot be read.
        """
        found = hashlib.sha256()
        for name in (CONFIG, WEIGHTS):
            try:
                with open(self.folder / name, "rb") as file:
                    found.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise AdapterFileError(f"Adapter {self.name!r}: {name} cannot be read ({error.strerror}).") from error
        return found.hexdigest()


class AdapterFolder:
    """A folder whose subfolders are adapters: `NAME`, or `GROUP/NAME`."""

    def __init__(self, root: Path) -> None:
        """Take the folder.

        Args:
            root: Where the adapters are.
        Raises:
            ConfigError: there is none.
        """
        self.root = Path(os.path.realpath(root.expanduser()))
        if not self.root.is_dir():
            raise ConfigError(f"The folder of adapters {str(root)!r} does not exist.")

    def find(self, name: str) -> NamedAdapter | None:
        """Look for the adapter of that name. Links may lead to other places in the folder, and nowhere else.

        Args:
            name: As a client sent it.
        Returns:
            The adapter; None where there is none, or it is of another method than PiCa and SVFT.
        Raises:
            AdapterFileError: the adapter's files are damaged, or lead out of the folder.
        """
        folder = self._place(name)
        if folder is None or not os.path.lexists(folder / CONFIG):
            return None
        state = []
        for file in (CONFIG, WEIGHTS):
            path = folder / file
            if not Path(os.path.realpath(path)).is_relative_to(self.root):
                raise AdapterFileError(f"Adapter {name!r}: {file} is a link that leads out of the folder of adapters.")
            try:
                found = path.stat()
            except OSError as error:
                raise AdapterFileError(f"Adapter {name!r}: {file} cannot be read ({error.strerror}).") from error
            state.append((found.st_mtime_ns, found.st_size, found.st_ino))
        try:
            config = read_json(folder / CONFIG)
        except (DocumentError, OSError) as error:
            raise AdapterFileError(f"Adapter {name!r}: {CONFIG} cannot be read: {error}.") from error
        if not isinstance(config, dict):
            raise AdapterFileError(f"Adapter {name!r}: {CONFIG} holds no configuration.")
        return NamedAdapter(name, folder, tuple(state)) if config.get("peft_type") in METHODS else None

    def _place(self, name: str) -> Path | None:
        parts = name.split("/")
        for part in parts:
            hidden = not part or part.startswith(".")  # "", ".", ".." among them
            if hidden or "\\" in part or not part.isprintable() or len(part.encode(errors="replace")) > _LONGEST:
                return None
        if len(name.encode(errors="replace")) > 4 * _LONGEST:
            return None
        folder = Path(os.path.realpath(self.root.joinpath(*parts)))
        inside = folder != self.root and folder.is_relative_to(self.root)
        return folder if inside and folder.is_dir() else None
