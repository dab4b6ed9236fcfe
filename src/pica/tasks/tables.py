"""Rows of tab- and comma-separated files, with the line each begins at."""

import csv
import io
from collections.abc import Collection, Iterator
from typing import Any

from pica.errors import DataError

ENDINGS = (".tsv", ".csv")


def table_rows(text: str, place: str, *, tabs: bool, names: Collection[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows by column name; by column number ("1", "2", ...) where the file has no header.

    Args:
        text: The whole file. In a tab-separated one quotation marks are ordinary characters, as in the files that data
            sets are published in; in a comma-separated one they enclose cells.
        place: What the file is called in messages.
        tabs: Whether cells are separated by tabs, not commas.
        names: The first row is a header if it holds one of these, whatever the case; they are then spelt as here.

    Raises:
        DataError: A row has another number of cells than the first one.
    """
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    # Lines must end with a line feed only: the csv module takes other separators of str.splitlines for text, as it should.
    reader = csv.reader(io.StringIO(text.replace("\r\n", "\n"), newline="\n"), **options)
    columns: list[str] | None = None
    known = {name.casefold(): name for name in names}
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{place}, line {line}: not valid {'TSV' if tabs else 'CSV'} ({error}).") from None
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if columns is None:
            header = [known.get(cell.strip().casefold(), cell.strip()) for cell in cells]
            if set(header) & set(names):
                if len(set(header)) < len(header):
                    raise DataError(f"{place}, line {line}: two columns have the same name.")
                columns = header
                continue
            columns = [str(number) for number in range(1, len(cells) + 1)]
        if len(cells) != len(columns):
            raise DataError(f"{place}, line {line}: {len(cells)} cells where the first row has {len(columns)}.")
        yield line, dict(zip(columns, cells))
