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


def add_screen(parser: argparse._ActionsContainer) -> None:
    """Add the options that hold bases against a model's first gradient."""
    parser.add_argument(
        "--screen",
        metavar="DATA",
        help="load the model and say which share of its first gradient on this text each kind of directions holds: .txt, "
        ".jsonl or other rows, a folder, hub:NAME, or embedded",
    )
    parser.add_argument(
        "--calibration",
        metavar="DATA",
        help="with --screen: text for activation and weighted directions too (may be the same; what the gradient is of is "
        "left out)",
    )


def check_screen(screen: str | None, calibration: str | None) -> None:
    """Raise `ConfigError` where there is calibration text and nothing to screen."""
    from pica.errors import ConfigError

    if calibration is not None and screen is None:
        raise ConfigError("--calibration is for --screen; name the text that the gradient is of with --screen.")
