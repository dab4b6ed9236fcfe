"""Model folders as an index of their tensors, each read when it is asked for: no model is ever in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pica.errors import ConfigError
from pica.files.documents import read_json
from pica.text import first_line

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Entry:
    """Where a tensor is, and what it is: its file, shape and dtype as safetensors writes it ("F32", "BF16", ...)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class WeightFolder:
    """A model folder (one file or sharded) as an index of its tensors.

    Attributes:
        path: The folder.
        entries: Tensors by name, in the order of the files.
        config: The model's config.json; empty where there is none.
    """

    def __init__(self, path: Path) -> None:
        """Read the headers of all files.

        Raises:
            ConfigError: The folder holds no safetensors model, or a file of it is missing or damaged.
        """
        self.path = path
        self.entries: dict[str, Entry] = {}
        for file in _files(path):
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - no mapping
                        part = opened.get_slice(name)
                        self.entries[name] = Entry(file, tuple(part.get_shape()), part.get_dtype())
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{str(file)!r} cannot be read as safetensors: {error}.") from error
        self.config: dict[str, Any] = {}
        if (path / "config.json").is_file():
            try:
                self.config = read_json(path / "config.json")
            except (OSError, ValueError) as error:
                raise ConfigError(f"{str(path / 'config.json')!r} cannot be read: {error}.") from error

    def load(self, name: str) -> Tensor:
        """One tensor, in its stored dtype. Its file is mapped, and unmapped once the tensor is gone."""
        entry = self.entries[name]
        with safe_open(entry.file, framework="pt") as opened:
            return opened.get_tensor(name)


def _files(path: Path) -> list[Path]:
    if (path / INDEX).is_file():
        try:
            names = sorted(set(read_json(path / INDEX)["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{str(path / INDEX)!r} cannot be read: {error}.") from error
        files = [path / Path(name).name for name in names]  # a shard lies beside its index, never elsewhere
    else:
        files = [path / SINGLE] if (path / SINGLE).is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"Model folder {str(path)!r} holds no safetensors file; load it with transformers and write it again with "
            "save_pretrained."
        )
    if missing := [file.name for file in files if not file.is_file()]:
        raise ConfigError(f"Model folder {str(path)!r} lacks {missing[0]}, which its index names.")
    return files


def renaming(names: Collection[str], others: Collection[str]) -> Callable[[str], str]:
    """Find out what tensors or modules of one model are called in the other.

    A model saved with a head carries its body's prefix ("bert.encoder..."), and one saved without does not. Of all
    first components the one is taken that, put before our names or taken off them, makes most names agree.

    Args:
        names: Of the one model.
        others: Of the other.
    Returns:
        From a name of the one to the name that it would have in the other.
    """
    there = set(others)
    put = {""} | {other.partition(".")[0] + "." for other in there if "." in other}
    take = {name.partition(".")[0] + "." for name in names if "." in name}
    candidates = [("", prefix) for prefix in sorted(put)] + [(prefix, "") for prefix in sorted(take)]
    off, on = max(candidates, key=lambda pair: len({pair[1] + n.removeprefix(pair[0]) for n in names} & there))
    return lambda name: on + name.removeprefix(off)


def is_hub_name(source: str) -> bool:
    """Whether a place may be a repository on the hub: an owner and a name, perhaps with "@" and a revision."""
    return not source.startswith((".", "/", "~")) and source.count("/") == 1


def open_checkpoint(source: str) -> WeightFolder:
    """Open a checkpoint.

    Of a hub repository its safetensors and JSON files are fetched (or found where they were fetched before), no code and
    no pickles.

    Args:
        source: A folder, or a hub name, perhaps with "@" and a revision.
    Returns:
        Its index; the same object while the folder's index has not changed.
    Raises:
        ConfigError: There is no such checkpoint, or it holds no safetensors files.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if not is_hub_name(source):
            raise ConfigError(f"There is no model folder {source!r}.")
        folder = _fetched(source)
    index = folder / INDEX if (folder / INDEX).is_file() else folder / SINGLE
    return _opened(folder, index.stat().st_mtime_ns if index.is_file() else 0)


def read_tensor(source: str, tensor: str, layer: str) -> Tensor:
    """Read a weight of a checkpoint.

    Args:
        source: As `open_checkpoint`.
        tensor: Its name there.
        layer: Who asks, for messages.
    Returns:
        A floating-point tensor, on the CPU, in its stored dtype.
    Raises:
        ConfigError: It is missing, damaged or quantised; or as `open_checkpoint`.
    """
    folder = open_checkpoint(source)
    if tensor not in folder.entries:
        raise ConfigError(f"Checkpoint {source!r} has no weight {tensor!r} for {layer}.")
    try:
        value = folder.load(tensor)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{tensor} of checkpoint {source!r} cannot be read: {error}.") from error
    if not value.is_floating_point() or value.dtype.itemsize < 2:
        raise ConfigError(
            f"Checkpoint {source!r} is quantised itself ({tensor} is {value.dtype}); name the unquantised one."
        )
    return value


@functools.lru_cache(maxsize=4)  # a model's layers ask for theirs one after another
def _opened(folder: Path, changed: int) -> WeightFolder:
    return WeightFolder(folder)


@functools.lru_cache(maxsize=4)
def _fetched(source: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = source.partition("@")
    try:
        patterns = ["*.safetensors", "*.json"]
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the hub client's errors have no common base
        reason = first_line(error)
        raise ConfigError(f"{source!r} is no local folder, and fetching it from the hub failed: {reason}") from error
