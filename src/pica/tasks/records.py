"""Records from a data file or a hub data set, each with the place it stands at, so that an error can name it.

Files are JSON lists (`.json`), JSON lines (`.jsonl`) and tab- or comma-separated tables (`.tsv`, `.csv`). A folder stands
for the file in it that is named after the split.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pica.documents import parse_json, parse_json_at
from pica.errors import ConfigError, DataError
from pica.foreign_code import code_options
from pica.tasks.base import Split
from pica.tasks.tables import ENDINGS as TABLES
from pica.tasks.tables import table_rows

ENDINGS = (".json", ".jsonl", *TABLES)
KINDS_OF_FILE = "a .json, .jsonl, .tsv or .csv file"
_STEMS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
_HUB = re.compile(r"hub:(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.\[\]%+-]+))?")


@dataclass(frozen=True)
class Record:
    """One row: its fields, and where it stands ("train.jsonl, line 7")."""

    fields: Mapping[str, Any]
    place: str

    def text(self, *names: str, required: bool = True, filled: bool = True) -> str:
        """The first of these fields that the row has, as text.

        Args:
            names: Accepted field names, the preferred one first.
            required: Whether a row without any of them is an error; otherwise it gives "".
            filled: Whether a field with nothing but white space is an error.

        Raises:
            DataError: The field is missing or empty where that is not allowed, or is neither text nor a number.
        """
        for name in names:
            value = self.fields.get(name)
            if value is None:
                continue
            if not isinstance(value, (str, int, float)) or isinstance(value, bool):
                raise DataError(f"{self.place}: field {name!r} must be text, found {_kind(value)}.")
            if filled and not str(value).strip():
                raise DataError(f"{self.place}: field {name!r} is empty.")
            return str(value)
        if not required:
            return ""
        wanted = " or ".join(repr(name) for name in names)
        there = ", ".join(repr(name) for name in self.fields) or "no fields"
        raise DataError(
            f"{self.place}: field {wanted} is missing (the row has {there}). "
            "If the file uses other names, map them with data.columns."
        )


def is_hub(location: str) -> bool:
    """Whether a data location names a hub data set rather than a file."""
    return location.startswith("hub:")


def check_location(location: str) -> str | None:
    """What is wrong with a data location, as far as can be told without reading it; None if nothing is."""
    if location == "embedded":
        return None
    if is_hub(location):
        return None if _HUB.fullmatch(location) else f"{location!r} is not of the form hub:OWNER/NAME[/CONFIG][:SPLIT]."
    path = Path(location).expanduser()
    if not path.exists():
        return f"file {location!r} does not exist; give {KINDS_OF_FILE}, a folder, hub:OWNER/NAME or embedded."
    if path.is_dir():
        return None
    if not path.is_file():  # a pipe or a device would be waited for
        return f"{location!r} is neither a file nor a folder; give {KINDS_OF_FILE}."
    if path.suffix not in ENDINGS:
        return f"{location!r} has an unknown ending; give {KINDS_OF_FILE}."
    return None


def split_file(folder: Path, split: Split) -> Path | None:
    """The file of a folder that is named after a split (`train.jsonl`; `dev.tsv` for validation); None if there is none."""
    for stem in _STEMS[split]:
        for ending in ENDINGS:
            if (folder / f"{stem}{ending}").is_file():
                return folder / f"{stem}{ending}"
    return None


def split_files(folder: Path, split: Split) -> dict[str, Path]:
    """The file of a split in each folder inside a folder, by that folder's name, in alphabetical order."""
    if not folder.is_dir():
        return {}
    inner = {path.name: split_file(path, split) for path in sorted(folder.iterdir()) if path.is_dir()}
    return {name: file for name, file in inner.items() if file is not None}


def has_split(location: str, split: Split) -> bool:
    """Whether a location is a folder with a file for this split, its own or in folders inside it."""
    if location == "embedded" or is_hub(location):
        return False
    folder = Path(location).expanduser()
    return folder.is_dir() and (split_file(folder, split) is not None or bool(split_files(folder, split)))


def read_records(location: str, split: Split | None = None, *, names: Collection[str] = ()) -> list[Record]:
    """Read a file, the file of a split in a folder, or a hub data set.

    Args:
        location: Where the data is.
        split: Which file of a folder is meant.
        names: Column names that tell a table's header from its first row; without a header columns are "1", "2", ...

    Raises:
        DataError: It is missing, empty, not UTF-8, not valid JSON, or a row is not an object; with the line number.
    """
    if problem := check_location(location):
        raise DataError(problem[0].upper() + problem[1:])
    if is_hub(location):
        rows = load_hub(location)
        return [Record(dict(row), f"{location}, row {number}") for number, row in enumerate(rows, start=1)]
    path = Path(location).expanduser()
    if path.is_dir():
        found = split_file(path, split) if split else None
        if found is None:
            named = " or ".join(f"{stem}.jsonl" for stem in _STEMS[split]) if split else "data file"
            raise DataError(f"{location!r} is a folder without a {named} (or .json, .tsv, .csv); give a file.")
        path = found
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text ({error.reason}).") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    if path.suffix in TABLES:
        rows = table_rows(text, str(path), tabs=path.suffix == ".tsv", names=names)
    else:
        rows = _lines(text, path) if path.suffix == ".jsonl" else _array(text, path)
    records = []
    for line, value in rows:
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {line}: expected an object with named fields, found {_kind(value)}.")
        records.append(Record(value, f"{path}, line {line}"))
    if not records:
        raise DataError(f"{path}: the file holds no rows.")
    return records


def _lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON-lines text with their line numbers; blank lines are skipped."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno})."
                ) from None


def _array(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON list with the line each begins at. Decoded one by one, since json.loads keeps no positions."""
    blank = re.compile(r"\s*")

    def skip(position: int) -> int:
        match = blank.match(text, position)
        return match.end() if match else position

    def fail(position: int, message: str) -> DataError:
        return DataError(f"{path}, line {text.count(chr(10), 0, position) + 1}: not valid JSON ({message}).")

    position = skip(0)
    if position == len(text):
        return
    if text[position] != "[":
        raise fail(position, "expected a list of rows; a file with one object a line must end in .jsonl")
    position, line, counted = skip(position + 1), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = parse_json_at(text, position)
        except json.JSONDecodeError as error:
            raise fail(error.pos, error.msg) from None
        yield line, value
        position = skip(end)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            raise fail(position, "expected ',' or ']' after a row; the file may be cut short")
    if skip(position + 1) != len(text):
        raise fail(skip(position + 1), "text after the end of the list")


def load_hub(location: str) -> Any:
    """One split of a hub data set (default split: train).

    Raises:
        DataError: It cannot be had.
        ConfigError: The location is not of the right form.
    """
    import datasets

    match = _HUB.fullmatch(location)
    if match is None:
        raise ConfigError(f"{location!r} is not of the form hub:OWNER/NAME[/CONFIG][:SPLIT].")
    try:
        return datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train", **code_options())
    except Exception as error:  # the library raises many kinds; all mean that the data could not be had
        raise DataError(f"{location}: could not be loaded ({type(error).__name__}: {error}).") from error


def _kind(value: Any) -> str:
    return {list: "a list", str: "text", type(None): "null", bool: "true or false", dict: "an object"}.get(
        type(value), "a number"
    )
