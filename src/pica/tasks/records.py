"""Rows as tasks take them: fields by any of their usual names, as text that a tokenizer can read."""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pica.errors import DataError
from pica.tasks.base import Split
from pica.tasks.rows import kind_of, read_rows

_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Record:
    """One row: its fields, and where it stands ("train.jsonl, line 7")."""

    fields: Mapping[str, Any]
    place: str

    def label(self, *names: str) -> str:
        """Read a field as the name of a class, see `class_name`.

        Args:
            names: Accepted field names, the preferred one first.
        Returns:
            What the first of them that the row has says.
        Raises:
            DataError: It is missing, empty, NaN, or neither text, a number nor true or false.
        """
        value = next((self.fields[name] for name in names if self.fields.get(name) is not None), None)
        known = isinstance(value, bool) or (isinstance(value, float) and math.isfinite(value))
        name = class_name(value if known else self.text(*names))
        if name.lower().lstrip("+-") == "nan":
            raise DataError(f"{self.place}: label {name!r} is no value; give the row a label, or remove it.")
        return name

    def text(self, *names: str, required: bool = True, filled: bool = True) -> str:
        """Read a field as text.

        Args:
            names: Accepted field names, the preferred one first.
            required: Whether a row without any of them is an error; otherwise it gives "".
            filled: Whether a field with nothing but white space is an error.
        Returns:
            What the first of them that the row has says; a number as `str` writes it.
        Raises:
            DataError: The field is missing or empty where that is not allowed, or is neither text nor a number.
        """
        for name in names:
            value = self.fields.get(name)
            if value is None:
                continue
            finite = not isinstance(value, float) or math.isfinite(value)
            if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not finite:
                raise DataError(f"{self.place}: field {name!r} must be text, found {kind_of(value)}.")
            text = str(value)
            if filled and not text.strip():
                raise DataError(f"{self.place}: field {name!r} is empty.")
            _check_whole(text, f"{self.place}: field {name!r}")
            return text
        if not required:
            return ""
        wanted = " or ".join(repr(name) for name in names)
        there = ", ".join(repr(name) for name in self.fields) or "no fields"
        if null := [name for name in names if name in self.fields]:
            raise DataError(f"{self.place}: field {null[0]!r} is null; give it a value, or remove the row.")
        raise DataError(
            f"{self.place}: field {wanted} is missing (the row has {shown(there, quoted=False, length=300)}). "
            "If the file uses other names, map them with data.columns."
        )


def read_records(
    location: str, split: Split | None = None, *, names: Collection[str] = (), headed: bool = False
) -> list[Record]:
    """Read all rows of a location; see `pica.tasks.rows.read_rows`, also for the arguments.

    Returns:
        The rows, at least one.
    Raises:
        DataError: As there, or there are no rows.
    """
    records = [Record(row.fields, row.place) for row in read_rows(location, split, names=names, headed=headed)]
    if not records:
        raise DataError(f"{location}: the {'data set' if location.startswith('hub:') else 'file'} holds no rows.")
    return records


def class_name(value: Any) -> str:
    """Name the class of a label: equal values have equal names, however a file writes them.

    Args:
        value: Text, a number, or true or false.
    Returns:
        "1" for 1, 1.0, "1" and "1.00"; "0" for -0.0; "true" for true, "True" and "TRUE". Other text only loses the white
        space around it: "01" is not "1".
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if text.lower() in ("true", "false"):
        return text.lower()
    if number := _NUMBER.fullmatch(text):
        sign, whole, part = number["sign"], number["whole"], (number["part"] or "").rstrip("0")
        digits = f"{whole}.{part}" if part else whole
        return f"-{digits}" if sign == "-" and digits.strip("0.") else digits
    return text


_NUMBER = re.compile(r"(?P<sign>[+-]?)(?P<whole>\d+)(?:\.(?P<part>\d*))?", re.ASCII)


def shown(text: str, *, quoted: bool = True, length: int = _SHOWN) -> str:
    """A value for a message, of a length that leaves it readable."""
    cut = text if len(text) <= length else f"{text[:length]}..."
    return repr(cut) if quoted else cut


def _check_whole(text: str, what: str) -> None:
    """Raise `DataError` on half a character (a lone surrogate): no tokenizer takes one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise DataError(
            f"{what} holds half of a character (\\u{ord(half):04x} without its other half); write the whole character, or "
            "remove the row."
        ) from None
