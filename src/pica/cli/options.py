"""Options that several commands have."""

import argparse
import re
import shutil
import textwrap
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

from pica.errors import ConfigError
from pica.foreign_code import FLAG


def command_parser(
    name: str, description: str, epilog: str = "", *, usage: str | None = None, options_at: int = 24
) -> argparse.ArgumentParser:
    """Make a command's parser, whose help is no wider than the terminal.

    Args:
        name: Of the command, without pica.
        description: Text before the options; see `fitted`.
        epilog: Text after them, likewise.
        usage: Where argparse's own would not do.
        options_at: Column at which the help of an option begins at the latest.
    Returns:
        The parser, without options yet.
    """

    def formatter(prog: str) -> argparse.HelpFormatter:
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=options_at)

    return argparse.ArgumentParser(
        prog=f"pica {name}",
        usage=usage,
        description=fitted(description),
        epilog=fitted(epilog),
        formatter_class=formatter,
    )


def fitted(text: str) -> str:
    """Lay out a text for the width of the terminal.

    Lines that are not indented are sentences, broken anywhere. An indented line is an example, or a row of a table: what
    follows two spaces or more is a note, which goes below where one of its paragraph has no room; a command is broken so
    that a shell takes it still.

    Args:
        text: Paragraphs, with an empty line between two.
    Returns:
        The same words in lines that fit.
    """
    width = shutil.get_terminal_size().columns
    return "\n\n".join("\n".join(_lines(paragraph, width)) for paragraph in text.strip("\n").split("\n\n"))


_ROW = re.compile(r"(?P<indent> +)(?P<head>\S.*?)(?P<gap>  +)(?P<note>\S.*)")


def _lines(paragraph: str, width: int) -> Iterator[str]:
    below = any(len(line) > width for line in paragraph.splitlines() if line.startswith(" "))
    sentences: list[str] = []
    for line in paragraph.splitlines():
        if not line.startswith(" "):
            sentences.append(line)
            continue
        yield from _filled(sentences, width)
        row = _ROW.fullmatch(line)
        if not below:
            yield line
        elif row is None:
            yield from _continued(line, width)
        else:
            yield from _continued(row["indent"] + row["head"], width)
            yield from textwrap.wrap(row["note"], width, initial_indent="      ", subsequent_indent="      ")
    yield from _filled(sentences, width)


def _filled(sentences: list[str], width: int) -> list[str]:
    """The lines gathered so far as sentences, which are taken out of the list."""
    lines = textwrap.wrap(" ".join(sentences), width, break_long_words=False, break_on_hyphens=False)
    sentences.clear()
    return lines


def _continued(command: str, width: int) -> Iterator[str]:
    """A command, broken before an option where it is too long, as a shell takes it."""
    begins = 8  # beyond the indent
    while len(command) > width:
        cut = max(command.rfind(" -", begins, width - 1), 0) or command.find(" -", begins)
        if cut < 0:
            break
        yield f"{command[:cut]} \\"
        command = "      " + command[cut + 1 :]
    yield command


class Words(NamedTuple):
    """What follows a command that takes a recipe's fields as options.

    Attributes:
        reference: The word that is no option: a file, or the name of what is built in.
        overrides: Fields and their texts.
        options: The command's own, by name without dashes: True, or a text.
    """

    reference: str | None
    overrides: list[tuple[str, Any]]
    options: dict[str, Any]


def split_words(
    arguments: Sequence[str],
    *,
    noun: str,
    flags: Collection[str],
    valued: Collection[str] = (),
    optional: Collection[str] = (),
    is_field: Callable[[str], bool],
    advice: str,
) -> Words:
    """Tell a command's own options from a recipe's fields.

    Args:
        arguments: As the shell gave them.
        noun: What the reference is to, for errors.
        flags: Options without a value.
        valued: Options with one; -o is short for --output.
        optional: Options that may have one, and have the text "" where they do not.
        is_field: Whether another option may be a recipe's field.
        advice: What to read about options.
    Returns:
        The words, sorted.
    Raises:
        ConfigError: An option is unknown or has no value, or there are two references.
    """
    reference: str | None = None
    overrides: list[tuple[str, Any]] = []
    options: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        given, equals, value = token.partition("=")
        name = "--output" if given == "-o" else given
        key = name.removeprefix("--").replace("-", "_")
        if token in flags:
            options[key] = True
        elif name in optional:
            follows = bool(rest) and not rest[0].startswith("-")
            options[key] = value if equals else rest.pop(0) if follows else ""
        elif not token.startswith("-"):
            if reference is not None:
                raise ConfigError(f"One {noun} at a time: found {reference!r} and {token!r}.")
            reference = token
        elif name in valued or is_field(name):
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise ConfigError(f"Option {given} needs a value.")
                value = rest.pop(0)
            if name in valued:
                options[key] = value
            else:
                overrides.append((name.removeprefix("--"), value))
        else:
            raise ConfigError(f"Unknown option {given}; {advice}")
    return Words(reference, overrides, options)


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
    if calibration is not None and screen is None:
        raise ConfigError("--calibration is for --screen; name the text that the gradient is of with --screen.")
