"""Numbers in text: finding the one that is the answer, and comparing two of them exactly."""

import re
from fractions import Fraction

# A minus is a sign only where it touches the number and can't be a subtraction: "16-12" and "16 - 12" hold 16 and 12.
# A thousands comma needs groups of three, so "1, 2 and 3" stays three numbers; a full stop needs a digit after it.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\].%$])[-\u2212])?"
    r"[$\u20ac\u00a3]?(?P<inner>(?<=[$\u20ac\u00a3])[-\u2212])?"
    r"(?P<number>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
    r"(?P<over>/\d+(?![\d/]))?"
)
_LONGEST = 40  # characters; a model stuck in a loop writes thousands of digits, which is no answer and slow to parse


def find_numbers(text: str) -> list[str]:
    """All numbers of a text in plain form ("$1,200.50" -> "1200.50"), in order; percent signs are dropped."""
    found = []
    for match in _NUMBER.finditer(text):
        number = match["number"].replace(",", "") + (match["over"] or "")
        if len(number) <= _LONGEST:
            found.append(("-" if match["sign"] or match["inner"] else "") + number)
    return found


def whole_number(text: str) -> str | None:
    """The number that is all of a text, apart from a currency or percent sign and a final full stop; else None."""
    text = text.strip().rstrip(".").rstrip("%").rstrip()
    match = _NUMBER.fullmatch(text)
    return find_numbers(text)[0] if match and len(text) <= _LONGEST else None


def after_marker(text: str, markers: tuple[str, ...]) -> str | None:
    """Find what follows a marker.

    Args:
        text: Generated or gold text.
        markers: Phrases that announce the answer, the most telling first; case is ignored. Of several places of one
            marker the first counts, because a model that does not stop goes on to invent further problems.
    Returns:
        The rest of its line; None where no marker has anything after it.
    """
    for marker in markers:
        for match in re.finditer(re.escape(marker), text, flags=re.IGNORECASE):
            # What follows a line break is another statement, except straight after the marker.
            if line := text[match.end() :].lstrip().split("\n", 1)[0].strip():
                return line
    return None


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` (or `\fbox{...}`), braces matched; None if there is none that is closed."""
    for match in reversed(list(re.finditer(r"\\(?:boxed|fbox)\s*\{", text))):
        depth = 1
        for position in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[match.end() : position].strip() or None
    return None


def answer_in(text: str, markers: tuple[str, ...]) -> str | None:
    """Read the number that a text gives as its answer.

    Args:
        text: Generated or gold text.
        markers: As for `after_marker`.
    Returns:
        The first number after a marker. Where there is none, the last number of the text: the usual reading of a model
        that was never shown the markers. None for a text without numbers.
    """
    line = after_marker(text, markers)
    if line is not None and (numbers := find_numbers(line)):
        return numbers[0]
    numbers = find_numbers(text)
    return numbers[-1] if numbers else None


def same_number(first: str | None, second: str | None, *, tolerance: Fraction = Fraction(0)) -> bool:
    """Whether two plain numbers have the same value: "4" and "4.0" do, "0.33" and "1/3" only with tolerance."""
    left, right = _value(first), _value(second)
    return left is not None and right is not None and abs(left - right) <= tolerance


def _value(number: str | None) -> Fraction | None:
    top, _, bottom = (number or "").partition("/")
    try:
        return Fraction(top) / Fraction(bottom) if bottom else Fraction(top)
    except (ValueError, ZeroDivisionError):
        return None
