"""Stopping a run in good order."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

_SECONDS_TO_HEED = 0.5


class Interrupted(Exception):
    """The run was stopped by the user; what it had done so far can be continued.

    Attributes:
        checkpoint: Folder of the last checkpoint, itself a loadable adapter; None if no training is under way.
        folder: The run's output folder; None if nothing has been written yet.
        trusted: Whether the run was allowed to run its model's code, which has to be said again when it goes on.
    """

    def __init__(self, *, checkpoint: Path | None = None, folder: Path | None = None, trusted: bool = False) -> None:
        super().__init__("interrupted")
        self.checkpoint, self.folder, self.trusted = checkpoint, folder, trusted


class StopRequest:
    """Whether a signal has asked to stop."""

    def __init__(self) -> None:
        self.made = False


@contextmanager
def raised_until_heeded() -> Iterator[StopRequest]:
    """Make KeyboardInterrupt of SIGINT and SIGTERM inside the block, and raise it anew where a library has dropped it.

    C++ code that calls Python may go on after an error in it, as torch's autograd does. While an interrupt is on its way
    out, through the `finally` of whoever tidies up, none is raised but by another signal.

    Yields:
        Whether there was a signal; a library that is being imported may make another error of the interrupt.
    """
    request, heeded = StopRequest(), _heeded
    anew, reminders, main = False, list[threading.Thread](), threading.main_thread().ident or 0

    def remind(number: int) -> None:
        nonlocal anew
        while not heeded.wait(_SECONDS_TO_HEED):
            anew = True
            if sys.platform == "win32":
                signal.raise_signal(number)
            else:  # to the main thread, so that it wakes where it waits
                signal.pthread_kill(main, number)

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal anew
        reminded, anew = anew, False
        if reminded and _on_its_way():
            return
        if not request.made or heeded.is_set():
            heeded.clear()
            reminders.append(threading.Thread(target=remind, args=(number,), daemon=True))
            reminders[-1].start()
        request.made = True
        raise KeyboardInterrupt

    heeded.clear()
    with _handled_by(handle):
        try:
            yield request
        finally:
            heeded.set()
            for reminder in reminders:
                reminder.join()


def heed() -> None:
    """Say that the last interrupt has done what it was for, where a command goes on after one."""
    _heeded.set()


_heeded = threading.Event()


def _on_its_way() -> bool:
    """Whether the code that a signal has halted is dealing with an interrupt."""
    error = sys.exception()
    while error is not None and not isinstance(error, (KeyboardInterrupt, Interrupted)):
        error = error.__context__
    return error is not None


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM inside the block into a request to stop at the next chance.

    A second one raises KeyboardInterrupt at once. Outside the main thread, where Python allows no handlers, the
    request is never made.

    Yields:
        Whether it was made.
    """
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request.made:
            raise KeyboardInterrupt
        request.made = True

    with _handled_by(handle):
        yield request


@contextmanager
def _handled_by(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Have SIGINT and SIGTERM handled inside the block, but for what whoever began the process has it ignore."""
    before = dict[int, Any]()
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            # Python allows handlers in the main thread only, and cannot put back one that it knows nothing of (None).
            allowed = threading.current_thread() is threading.main_thread()
            if allowed and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handle)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
