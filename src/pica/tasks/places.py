"""Where data is: what a location may be, and which files of a folder hold which split. Reads no data.

A location is a file, a folder, or `hub:OWNER/NAME[/CONFIG][:SPLIT]`. A folder may be laid out as people do (`train.jsonl`,
`dev.tsv`), as data sets on the hub are (`data/train-00000-of-00002.parquet`, `train/0000.parquet`), or be what
`datasets`' `save_to_disk` writes.
"""

import json
import re
from pathlib import Path

from pica.tasks.base import Split

FORMATS = (".json", ".jsonl", ".tsv", ".csv")
"""Text files of rows; each may be compressed by gzip (`.jsonl.gz`)."""
ENDINGS = (*FORMATS, *(f"{ending}.gz" for ending in FORMATS), ".parquet")
KINDS_OF_FILE = "a .json, .jsonl, .tsv or .csv file (or one of these as .gz), a .parquet file"
STEMS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
"""What the files of a split are called."""
HUB = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.\[\]%+-]+))?")
_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"  # what save_to_disk puts into a data set's folder


def is_hub(location: str) -> bool:
    """Whether a data location names a hub data set rather than a file."""
    return location.startswith("hub:")


def ending_of(path: Path) -> str:
    """A file's ending in lower case, with that before `.gz`: ".csv.gz" of "Rows.CSV.gz"."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() + suffix if suffix == ".gz" else suffix


def check_location(location: str) -> str | None:
    """What is wrong with a data location, as far as can be told without reading it; None if nothing is."""
    if location == "embedded":
        return None
    if is_hub(location):
        return None if HUB.fullmatch(location) else f"{location!r} is not of the form hub:OWNER/NAME[/CONFIG][:SPLIT]."
    path = Path(location).expanduser()
    if not path.exists():
        return f"file {location!r} does not exist; give {KINDS_OF_FILE}, a folder, hub:OWNER/NAME or embedded."
    if path.is_dir():
        return None
    if not path.is_file():  # a pipe or a device would be waited for
        return f"{location!r} is neither a file nor a folder; give {KINDS_OF_FILE}."
    if ending_of(path) not in ENDINGS:
        return f"{location!r} has an unknown ending; give {KINDS_OF_FILE}."
    return None


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `datasets`' `save_to_disk`: one data set, or one for each split."""
    return (folder / _SAVED).is_file() or (folder / _SAVED_SPLITS).is_file()


def saved_split(folder: Path, split: Split | None) -> Path | None:
    """Find the saved data set that holds a split; one that was saved without splits is taken for what it is asked for.

    Args:
        folder: See `is_saved`.
        split: None: whatever is there, if it is one.
    Returns:
        Its folder; None where there is no such split.
    """
    if not (folder / _SAVED_SPLITS).is_file():
        return folder
    try:
        there = json.loads((folder / _SAVED_SPLITS).read_text(encoding="utf-8"))["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        there = []
    wanted = STEMS[split] if split else there if len(there) == 1 else ()
    return next((folder / name for name in wanted if name in there), None)


def split_files(folder: Path, split: Split) -> list[Path]:
    """Find the files of a folder that hold a split.

    These are `train.jsonl` (`dev.tsv` for validation), its parts `train-00000-of-00002.parquet`, either also in `data`, or
    all data files of a folder `train`.

    Args:
        folder: Where to look.
        split: Which part is meant.
    Returns:
        The files, in order; none if there are none.
    """
    for stem in STEMS[split]:
        for place in (folder, folder / "data"):
            for ending in ENDINGS:
                if (place / f"{stem}{ending}").is_file():
                    return [place / f"{stem}{ending}"]
            if parts := _data_files(place, f"{stem}-*-of-*"):
                return parts
        if parts := _data_files(folder / stem, "*"):
            return parts
    return []


def _data_files(folder: Path, pattern: str) -> list[Path]:
    if not folder.is_dir() or is_saved(folder):
        return []
    found = (path for path in folder.glob(pattern) if ending_of(path) in ENDINGS and not path.name.startswith("."))
    return sorted(path for path in found if path.is_file())


def inner_splits(folder: Path, split: Split) -> dict[str, list[Path]]:
    """The files of a split in each folder inside a folder, by that folder's name, in alphabetical order."""
    if not folder.is_dir() or is_saved(folder):
        return {}
    inner = {path.name: split_files(path, split) for path in sorted(folder.iterdir()) if path.is_dir()}
    return {name: files for name, files in inner.items() if files}


def has_split(location: str, split: Split) -> bool:
    """Whether a location is a folder with files for this split, its own or in folders inside it."""
    if location == "embedded" or is_hub(location):
        return False
    folder = Path(location).expanduser()
    if not folder.is_dir():
        return False
    if is_saved(folder):
        return (folder / _SAVED_SPLITS).is_file() and saved_split(folder, split) is not None
    return bool(split_files(folder, split) or inner_splits(folder, split))


def data_files(location: str, split: Split) -> list[Path]:
    """All files whose content decides what a split holds; none for what is not on this machine."""
    path = Path(location).expanduser()
    if location == "embedded" or is_hub(location) or not path.exists():
        return []
    if path.is_file():
        return [path]
    if is_saved(path):
        saved = saved_split(path, split)
        return sorted(file for file in saved.rglob("*") if file.is_file()) if saved else []
    return split_files(path, split) or [file for files in inner_splits(path, split).values() for file in files]
