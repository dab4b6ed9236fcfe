"""Results on standard output. Commands write by `show` and by the consoles of `pica.cli.console`, never by `print`."""

import os
import shutil
import sys
import textwrap
from collections.abc import Mapping

from pica.text import visible

WIDE = 160
"""Columns of a table that goes to a file or a pipe, where nothing has to be cut off."""


def columns() -> int:
    """Columns that a table on standard output may take: the terminal's, or `COLUMNS`; many in a file."""
    terminal = (sys.stdout is not None and sys.stdout.isatty()) or "COLUMNS" in os.environ
    return shutil.get_terminal_size().columns if terminal else WIDE


def show_rows(rows: Mapping[str, str], *, indent: int = 0) -> None:
    """Print a name and a text a row; a long text goes on below itself."""
    begins = indent + max(map(len, rows)) + 2
    for name, text in rows.items():
        head = (" " * indent + name).ljust(begins)
        show(textwrap.fill(text, columns(), initial_indent=head, subsequent_indent=" " * begins))


def show(text: object = "", *, end: str = "\n", flush: bool = False) -> None:
    """Print a text in which names from files may stand; what would steer the terminal is written out."""
    print(visible(str(text)), end=end, flush=flush)  # noqa: T201 - the one place


def say(text: str) -> None:
    """One line about the command itself, on standard error."""
    print(visible(f"pica: {text}"), file=sys.stderr, flush=True)  # noqa: T201 - the other place
