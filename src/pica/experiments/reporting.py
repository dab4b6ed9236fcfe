"""How a run tells what it is doing. The command line shows it; a library user may pass a reporter of their own."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[..., None]
"""`advance(count=1, note="")`: count more items are done; the note replaces the last one shown."""


class Reporter(Protocol):
    """Receives what a person who watches the run wants to know."""

    def say(self, text: str) -> None:
        """One or more lines that stay."""
        ...

    def bar(self, label: str, total: int) -> AbstractContextManager[Advance]:
        """A progress bar for the length of a `with` block."""
        ...


class Silent:
    """A reporter that drops everything."""

    def say(self, text: str) -> None:
        """Do nothing."""

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Advance]:
        """Do nothing."""

        def advance(count: int = 1, note: str = "") -> None: ...

        yield advance
