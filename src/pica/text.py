"""Text from elsewhere: names from other people's files on their way to a terminal, a page or a spreadsheet, and errors."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Control characters but for tab and line feed, what turns the direction of writing, and halves of characters.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_FORMULA = ("=", "+", "-", "@", "\t")


def visible(text: str) -> str:
    r"""The text with each character that would steer a terminal or hide something written out, as in "\x1b[31m"."""
    return _HIDDEN.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def in_words(name: str) -> str:
    """A measure's name, as it is read: "reward_accuracy" is the reward accuracy."""
    return name.replace("_", " ")


def counted(number: int, noun: str) -> str:
    """A number of things in words, "1 problem" and "1,319 problems"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def csv_text(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Write rows as CSV.

    A text that a spreadsheet would run as a formula has an apostrophe put before it, which makes it text there, and
    control characters are written out, as a lone carriage return would end a row.

    Args:
        rows: Values by column.
        columns: Those to write; a cell is empty where a row has no value.
    Returns:
        The header and a line a row.
    """
    written = io.StringIO()
    writer = csv.DictWriter(written, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return written.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    value = visible(value)
    if not value.startswith(_FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a sentence of ours; its class where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def shortened(text: str, length: int) -> str:
    """A text on one line, of at most `length` characters; what is cut off shows as " ..."."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 4].rstrip() + " ..."
