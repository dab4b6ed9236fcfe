"""Whether two final answers are the same: numbers, fractions, tuples, intervals, expressions, units left out.

The careful comparison is math-verify's, which parses LaTeX (with a grammar; nothing of a text is run as code) and compares
with sympy. It is imported when two answers that differ as text are compared.
"""

import contextlib
import logging
import re

_LONGEST = 300  # characters; what a model stuck in a loop writes is no answer and slow to parse
_SECONDS = 5  # a tower of powers takes for ever
_SPACES = re.compile(r"\\[!,;: ]|\\quad|\\qquad|~|\s+")
_UNIT = re.compile(r"\\(?:text|mbox|mathrm)\{\s*[^{}]*\}\s*(?:\^\{?\\?\w*\}?)?$")
_MARK_UP = ((r"\left", ""), (r"\right", ""), ("dfrac", "frac"), ("tfrac", "frac"), (r"\$", ""), ("$", ""), (r"\%", ""))


def plain(answer: str) -> str:
    """An answer without what does not change it: dollar signs, spaces, `\\left`, sizes of fractions, units, a full stop."""
    text = answer.strip().rstrip(".").strip()
    for mark, other in _MARK_UP:
        text = text.replace(mark, other)
    text = text.replace("%", "").replace(r"^\circ", "").replace(r"^{\circ}", "")
    short = _UNIT.sub("", text).strip()
    text = short or text  # an answer that is nothing but words is no unit
    text = re.sub(r"\\(?:text|mbox|mathrm|textbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    return _SPACES.sub("", text)


def same_text(first: str | None, second: str | None) -> bool:
    """Whether two answers are the same text once `plain`: the comparison that papers on MATH use, in the main."""
    return first is not None and second is not None and plain(first) == plain(second) != ""


def same_value(first: str | None, second: str | None) -> bool:
    """Whether two answers are the same text, or have the same value by math-verify (on the main thread only)."""
    # its time limit needs the main thread; elsewhere, and for what it cannot parse, only texts are compared
    if first is None or second is None:
        return False
    if same_text(first, second):
        return True
    if max(len(first), len(second)) > _LONGEST:
        return False
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # what can't be parsed is an answer that is not right
    extraction = (LatexExtractionConfig(),)
    with contextlib.suppress(Exception):  # parser and sympy raise many kinds; all mean that no equality was found
        parsed = [
            parse(f"${text.strip().strip('$')}$", extraction_config=extraction, parsing_timeout=_SECONDS)
            for text in (second, first)
        ]
        return all(parsed) and bool(verify(parsed[0], parsed[1], timeout_seconds=_SECONDS))
    return False
