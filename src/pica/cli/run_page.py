"""`pica train --page`: a reporter that keeps the run's page up to date beside what it shows in the terminal."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from pica.errors import OutputError
from pica.experiments.reporting import Advance, Reporter
from pica.experiments.train.progress import Progress
from pica.report.live_page import write_live_page
from pica.report.run_page import PAGE

_EVERY = 2.0  # seconds between two pages, at least
_SHARE = 20  # a page may take a twentieth of the time


class PageReporter:
    """See `Follower`. A page that cannot be written is said once, and ends no run."""

    def __init__(self, shown: Reporter) -> None:
        """`shown` is told everything too."""
        self._shown, self._said = shown, list[str]()
        self._progress: Progress | None = None
        self._doing, self._next, self._failed = "", 0.0, False

    def say(self, text: str) -> None:
        """See `Reporter.say`."""
        self._shown.say(text)
        self._said.append(text)
        self._write()

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Advance]:
        """See `Reporter.bar`."""
        done, begun = 0, time.monotonic()
        with self._shown.bar(label, total) as advance:

            def told(count: int = 1, note: str = "") -> None:
                nonlocal done
                advance(count, note)
                done += count
                seconds = f"{time.monotonic() - begun:,.0f} s"
                self._doing = ", ".join(part for part in (f"{label}: {done:,} of {total:,}", seconds, note) if part)
                self._write()

            yield told

    def progressed(self, progress: Progress) -> None:
        """See `Follower.progressed`."""
        first, self._progress = self._progress is None, progress
        if first:
            self._shown.say(f"Watch it:   {(progress.folder / PAGE).resolve()} (in a browser; it refreshes itself)")
        self._write(now=first)

    def end(self, why: str) -> None:
        """The run has ended before it was complete."""
        self._doing = why
        self._write(now=True, ended=True)

    def _write(self, *, now: bool = False, ended: bool = False) -> None:
        if self._progress is None or self._failed or not (now or time.monotonic() >= self._next):
            return
        begun = time.monotonic()
        try:
            write_live_page(self._progress, self._doing or "Begins.", self._said, ended=ended)
        except OutputError as error:
            self._failed = True
            self._shown.say(f"warning: the page is not written any more: {error}")
        took = time.monotonic() - begun
        self._next = time.monotonic() + max(_EVERY, _SHARE * took)
