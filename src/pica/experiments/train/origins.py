"""What a run or an analysis began with, in digests, so that it goes on with nothing else.

Texts and pictures are digested whole, as they were read. Of a model, so are the files that say what it is and how it reads
text; of its weights files above 32 MiB each tensor's name, type, shape and place, 4 KiB from the middle of each tensor and
1 MiB spread over the file. Whatever trains, merges, prunes or quantises a model changes nearly all values of a weight and so
shows; a few values changed by hand in a large tensor may not.
"""

import dataclasses
import hashlib
import json
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pica.experiments.recipes.recipe import Recipe

_WHOLE = 32 << 20  # bytes; larger files are sampled
_BLOCK, _BLOCKS = 4096, 256
_NAMES = (
    *("*.safetensors", "*model*.bin", "*config.json", "*index.json", "*.model", "*.py", "*.jinja", "chat_template*"),
    *("token*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
)
_PLACES = ("model.path", "data.train", "data.validation", "data.test")  # what is there counts, not where it is
_FREE = {"name", "output", "trainer.threads", *_PLACES}  # fields that may differ when a run goes on


def origin(recipe: Recipe, splits: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Describe what a run has begun with.

    Args:
        recipe: All settings, classes included.
        splits: Examples of each split, as they were read.
    Returns:
        It as JSON holds it.
    """
    found = {
        "settings": _flat(dataclasses.asdict(recipe)),
        "data": {name: {"count": len(rows), "digest": examples_digest(rows)} for name, rows in splits.items()},
        "model": model_digest(recipe.model.path, recipe.model.revision),
    }
    if recipe.dreambooth.class_pictures:
        folder = Path(recipe.dreambooth.class_pictures)
        found["class pictures"] = {path.name: file_digest(path) for path in _files(folder)}
    return json.loads(json.dumps(found))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two of `origin`, in words; each that `before` has not is no difference."""
    found = []
    for name, was in before.get("data", {}).items():
        if was != (now["data"].get(name)):
            place = now["settings"].get(f"data.{name}") or now["settings"].get("data.train")
            place = place if isinstance(place, str) else ", ".join(place)
            count = f"{was['count']} then, {now['data'][name]['count']} now"
            found.append(f"the {'training' if name == 'train' else name} problems ({count}, from {place!r})")
    found += [f"{file} of the base model" for file in differing_files(before.get("model", {}), now["model"])]
    pictures = now.get("class pictures", {})  # more may have been drawn since
    found += [
        f"{name} of the class" for name, was in before.get("class pictures", {}).items() if pictures.get(name) != was
    ]
    settings = before.get("settings", {})
    for name, value in now["settings"].items():
        if name in settings and name not in _FREE and settings[name] != value:
            found.append(f"{name} ({settings[name]!r} then, {value!r} now)")
    return found


def differing_files(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names that two of `model_digest` do not agree in; none where either is empty, which says nothing."""
    if not before or not now:
        return []
    return [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]


def examples_digest(examples: Sequence[Any]) -> str:
    """Of all that examples hold but for where they stand; of pictures, their files' content."""
    digest = hashlib.sha256()
    for example in examples:
        fields = [field.name for field in dataclasses.fields(example) if field.name not in ("source", "place")]
        digest.update(json.dumps([getattr(example, name) for name in fields], default=str).encode() + b"\n")
    return digest.hexdigest()


def model_digest(location: str, revision: str | None = None) -> dict[str, str]:
    """Digest of each file that decides a model, pipeline or adapter in a folder, or of a model of the hub in the cache."""
    # empty for a model that is not on this machine
    folder = _local(location, revision)
    if folder is None:
        return {}
    found = {path.relative_to(folder).as_posix(): path for path in _model_files(folder)}
    return {name: file_digest(path) for name, path in sorted(found.items())}


def file_digest(path: Path, *, whole: bool = False) -> str:
    """Of a file's content, or, unless the whole is asked for, of samples of a large one."""
    # What has not changed since this process last asked is not read again.
    status = path.stat()
    if (
        time.time_ns() - status.st_mtime_ns < 2_000_000_000
    ):  # it may change again at what its clock shows as the same time
        return _digest(path, status.st_size, whole)
    return _unchanged_digest(path, status.st_size, status.st_mtime_ns, whole)


@cache
def _unchanged_digest(path: Path, size: int, changed: int, whole: bool) -> str:
    return _digest(path, size, whole)


def _digest(path: Path, size: int, whole: bool) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        if whole or size <= _WHOLE:
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()
        digest.update(struct.pack("<Q", size))
        places = [(size - _BLOCK) * index // (_BLOCKS - 1) for index in range(_BLOCKS)]
        if path.suffix == ".safetensors":
            length = struct.unpack("<Q", file.read(8))[0]
            header = file.read(min(length, size))
            digest.update(header)
            places += _middles(header, start=8 + length)
        for place in sorted({place for place in places if 0 <= place < size}):
            file.seek(place)
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _middles(header: bytes, start: int) -> Iterator[int]:
    """Where to read a block of each tensor."""
    try:
        entries = json.loads(header)
        for name, entry in entries.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield start + max(begin, (begin + end - _BLOCK) // 2)
    except (ValueError, TypeError, KeyError, AttributeError):
        return  # damaged: it is for those who load it to say so


def _model_files(folder: Path) -> Iterator[Path]:
    parts = [path for path in folder.iterdir() if path.is_dir()] if (folder / "model_index.json").is_file() else []
    for place in (folder, *parts):
        for path in _files(place):
            if any(fnmatch(path.name, name) for name in _NAMES):
                yield path


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _local(location: str, revision: str | None) -> Path | None:
    if location == "embedded":
        return Path(str(resources.files("pica") / "assets" / "tiny-llama"))
    folder = Path(location).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in ("config.json", "model_index.json", "adapter_config.json"):
        try:
            found = try_to_load_from_cache(location, name, revision=revision)
        except HFValidationError:
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by their dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):  # a section of the recipe
            flat |= {f"{name}.{inner}": found for inner, found in value.items()}
        else:
            flat[name] = value
    return flat
