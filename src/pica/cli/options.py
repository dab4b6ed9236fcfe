"""Options that several commands have."""

import argparse

from pica.foreign_code import FLAG


def add_trust(parser: argparse._ActionsContainer) -> None:
    """Add the option that allows a model's own code; only the command line of this very call can give it."""
    parser.add_argument(
        FLAG, action="store_true", help="run Python code that comes with the base model; only for authors you trust"
    )


MOST = 2**31 - 1
"""What the whole numbers of the libraries underneath hold."""


def whole(text: str) -> int:
    """A whole number of any sign, for argparse; what is too small is for the command to say."""
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not -MOST <= value <= MOST:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number of at most {MOST}")
    return value


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or not 1 <= whole(text) <= MOST:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number of at least 1")
    return int(text)
