"""Rows of tab- and comma-separated files, with the line each begins at."""

import csv
import io
from collections.abc import Collection, Iterator
from typing import Any

from pica.errors import DataError

_LONGEST_CELL = 2**31 - 1  # the csv module's own limit is 131,072 characters
_DELIMITERS = (",", ";", "\t")  # spreadsheets set to a language with decimal commas write semicolons


def table_rows(
    text: str, place: str, *, tabs: bool, names: Collection[str], headed: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read a table.

    Args:
        text: The whole file. In a tab-separated one quotation marks are ordinary characters, as in the files that data
            sets are published in, unless the rows only come out even with cells in quotation marks; in a
            comma-separated one they enclose cells.
        place: What the file is called in messages.
        tabs: Whether cells are separated by tabs, not commas.
        names: The first row is a header if it holds one of these, whatever the case; they are then spelt as here.
        headed: The first row is a header in any case.
    Yields:
        The line in the file and the cells, by column name; by column number ("1", "2", ...) where there is no header.
    Raises:
        DataError: A row has another number of cells than the first one, or is the header again.
    """
    # Lines must end with a line feed only: the csv module takes other separators of str.splitlines for text, as it should.
    text = text.replace("\r\n", "\n")
    known = {name.casefold(): name for name in names}

    def spelt(cells: list[str]) -> list[str]:
        return [known.get(cell.strip().casefold(), cell.strip()) for cell in cells]

    columns: list[str] | None = None
    header: list[str] | None = None
    for line, cells in _tabs(text, place) if tabs else _commas(text, place, known):
        if columns is None:
            header = spelt(cells)
            if headed or set(header) & set(names):
                if twice := [name for name in header if name in names and header.count(name) > 1]:
                    raise DataError(f"{place}, line {line}: two columns have the same name {twice[0]!r}.")
                columns = header
                continue
            header, columns = None, [str(number) for number in range(1, len(cells) + 1)]
        if len(cells) != len(columns):
            raise DataError(f"{place}, line {line}: {len(cells)} cells where the first row has {len(columns)}.")
        if header is not None and spelt(cells) == header:
            raise DataError(f"{place}, line {line}: repeats the header; remove the line.")
        yield line, dict(zip(columns, cells))


def _commas(text: str, place: str, known: Collection[str]) -> Iterator[tuple[int, list[str]]]:
    first = next((line for line in text.split("\n") if line.strip()), "")
    for delimiter in _DELIMITERS:
        if any(cell.strip().strip('"').casefold() in known for cell in first.split(delimiter)):
            return _cells(text, place, "CSV", delimiter=delimiter, strict=True)
    return _cells(text, place, "CSV", strict=True)


def _tabs(text: str, place: str) -> Iterator[tuple[int, list[str]]]:
    rows = list(_cells(text, place, "TSV", delimiter="\t", quoting=csv.QUOTE_NONE))
    if '"' in text and not _even(rows):
        try:
            enclosed = list(_cells(text, place, "TSV", delimiter="\t", strict=True))
        except DataError:
            return iter(rows)
        rows = enclosed if _even(enclosed) else rows
    return iter(rows)


def _even(rows: list[tuple[int, list[str]]]) -> bool:
    return len({len(cells) for _, cells in rows}) == 1


def _cells(text: str, place: str, kind: str, **options: Any) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, with their lines."""
    reader = csv.reader(io.StringIO(text, newline="\n"), **options)
    while True:
        line = reader.line_num + 1
        before = csv.field_size_limit(_LONGEST_CELL)  # it is the whole process's: not left changed between two rows
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{place}, line {line}: not valid {kind} ({error}).") from None
        finally:
            csv.field_size_limit(before)
        if cells is None:
            return
        if any(cell.strip() for cell in cells):
            yield line, cells
