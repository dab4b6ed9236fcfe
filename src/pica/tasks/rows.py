"""From a data location to rows, each with the file and the line it stands at. The only place that reads data files.

A row is what a file has: named fields with values of any type. What a task makes of them is `pica.tasks.records`' work.
"""

import gzip
import json
import math
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pica.errors import ConfigError, DataError
from pica.files.documents import parse_json, parse_json_at
from pica.foreign_code import code_options
from pica.tasks.base import Split
from pica.tasks.places import (
    HUB,
    STEMS,
    check_location,
    ending_of,
    inner_splits,
    is_hub,
    is_saved,
    saved_split,
    split_files,
)
from pica.tasks.tables import table_rows

_BATCH = 1000  # rows of a parquet file that are in memory at a time


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        fields: Its values by name.
        file: Path of the file, or the location of a data set that is none.
        number: The line that it begins at, from 1; in files without lines, or with a single one, that of the row.
        unit: What `number` counts, "line" or "row".
    """

    fields: Mapping[str, Any]
    file: str
    number: int
    unit: str = "line"

    @property
    def place(self) -> str:
        """For messages: "train.jsonl, line 7"."""
        return f"{self.file}, {self.unit} {self.number}"


def read_rows(
    location: str, split: Split | None = None, *, names: Collection[str] = (), headed: bool = False
) -> Iterator[Row]:
    """Read a file, the files of a split in a folder, a saved data set, or one on the hub.

    Args:
        location: Where the data is, see `pica.tasks.places`.
        split: Which files of a folder are meant.
        names: Column names that tell a table's header from its first row; without a header columns are "1", "2", ...
        headed: A table's first row is its header, whatever it says.
    Returns:
        The rows, read one by one.
    Raises:
        DataError: It is missing, not UTF-8, not valid JSON, or a row is not an object; with the line number.
    """
    if problem := check_location(location):
        raise DataError(problem[0].upper() + problem[1:])
    if is_hub(location):
        return _of_data_set(load_hub(location), location)
    path = Path(location).expanduser()
    if not path.is_dir():
        return read_file(path, names=names, headed=headed)
    if is_saved(path):
        return _of_saved(path, split)
    files = split_files(path, split) if split else []
    if not files:
        raise DataError(f"{location!r} is a folder without {_missing(path, split)}; give a file.")
    return (row for file in files for row in read_file(file, names=names, headed=headed))


def read_file(path: Path, *, names: Collection[str] = (), headed: bool = False) -> Iterator[Row]:
    """The rows of one file; see `read_rows`."""
    ending = ending_of(path)
    if ending == ".parquet":
        yield from _of_parquet(path)
        return
    text, kind, unit = _text(path), ending.removesuffix(".gz"), "line"
    if kind in (".tsv", ".csv"):
        rows = table_rows(text, str(path), tabs=kind == ".tsv", names=names, headed=headed)
    else:
        # A .json file with an object a line is no JSON, but usual.
        lines = kind == ".jsonl" or text.lstrip()[:1] == "{"
        rows = _lines(text, path) if lines else _array(text, path)
        if not lines and "\n" not in text.strip():  # as json.dump writes a list: its lines tell no row from another
            rows, unit = ((number, value) for number, (_, value) in enumerate(rows, start=1)), "row"
    for number, value in rows:
        if not isinstance(value, dict):
            raise DataError(f"{path}, {unit} {number}: expected an object with named fields, found {kind_of(value)}.")
        yield Row(value, str(path), number, unit)


def load_hub(location: str) -> Any:
    """Load one split of a hub data set.

    Args:
        location: "hub:", the name, perhaps a configuration and a split; see `pica.tasks.places`.
    Returns:
        A `datasets.Dataset`; of the split "train" where none is named.
    Raises:
        DataError: It cannot be had.
        ConfigError: The location is not of the right form.
    """
    import datasets

    match = HUB.fullmatch(location)
    if match is None:
        raise ConfigError(f"{location!r} is not of the form hub:OWNER/NAME[/CONFIG][:SPLIT].")
    options: Any = code_options()
    try:
        return datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train", **options)
    except Exception as error:  # the library raises many kinds; all mean that the data could not be had
        raise DataError(f"{location}: could not be loaded ({type(error).__name__}: {error}).") from error


def kind_of(value: Any) -> str:
    """A value's type in words."""
    words = {list: "a list", str: "text", type(None): "null", bool: "true or false", dict: "an object"}
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}, which is no value"
    return words.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)


def _missing(folder: Path, split: Split | None) -> str:
    if split is None:
        return "data file"
    named = f"a {' or '.join(f'{stem}.jsonl' for stem in STEMS[split])} (or .json, .tsv, .csv, .gz, .parquet)"
    inner = inner_splits(folder, split)
    return f"{named} of its own, but with {', '.join(inner)} in it, which have one" if inner else named


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not a whole gzip file ({error}).") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text ({error.reason}).") from None
    if (place := text.find("\0")) >= 0:
        line = text.count("\n", 0, place) + 1
        raise DataError(
            f"{path}, line {line}: holds a NUL character; the file is damaged, or UTF-16: save it as UTF-8."
        )
    return text


def _of_parquet(path: Path) -> Iterator[Row]:
    from pyarrow import parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(_BATCH):
            for fields in batch.to_pylist():
                number += 1
                yield Row(fields, str(path), number, "row")
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        NotImplementedError,
    ) as error:  # pyarrow's errors are of these kinds
        lines = str(error).splitlines() or [type(error).__name__]
        raise DataError(f"{path}: not a readable .parquet file ({lines[0]}).") from error


def _of_saved(folder: Path, split: Split | None) -> Iterator[Row]:
    import datasets

    saved = saved_split(folder, split)
    if saved is None:
        raise DataError(f"{str(folder)!r} is a saved data set without a split {' or '.join(STEMS[split or 'train'])}.")
    try:
        rows = datasets.Dataset.load_from_disk(str(saved))
    except Exception as error:  # datasets and pyarrow raise many kinds; all mean that the folder is no good
        lines = str(error).splitlines() or [type(error).__name__]
        raise DataError(f"{saved}: the saved data set cannot be read ({lines[0]}).") from error
    return _of_data_set(rows, str(saved))


def _of_data_set(rows: Any, place: str) -> Iterator[Row]:
    return (Row(dict(fields), place, number, "row") for number, fields in enumerate(rows, start=1))


def _lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """Rows of a JSON-lines text with their line numbers; blank lines are skipped."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = parse_json(line, long_integers=True)
            except json.JSONDecodeError as error:
                hint = "" if ".jsonl" in path.name.lower() else "; expected a list of rows, or one object a line"
                raise DataError(
                    f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}{hint})."
                ) from None
            yield number, value


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
        raise fail(position, "expected a list of rows, or one object a line")
    position, line, counted = skip(position + 1), 1, 0
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = parse_json_at(text, position, long_integers=True)
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
