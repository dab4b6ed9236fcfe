"""Results on standard output. Commands write by `show` and by the consoles of `pica.cli.console`, never by `print`."""

import sys

from pica.text import visible


def show(text: object = "", *, end: str = "\n", flush: bool = False) -> None:
    """Print a text in which names from files may stand; what would steer the terminal is written out."""
    print(visible(str(text)), end=end, flush=flush)  # noqa: T201 - the one place


def say(text: str) -> None:
    """One line about the command itself, on standard error."""
    print(visible(f"pica: {text}"), file=sys.stderr, flush=True)  # noqa: T201 - the other place
