"""Other libraries' errors inside our sentences."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
