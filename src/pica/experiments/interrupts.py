"""Stopping a run in good order."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


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
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM inside the block into a request to stop at the next chance.

    A second one raises KeyboardInterrupt at once. Outside the main thread, where Python allows no handlers, the
    request is never made.

    Yields:
        Whether it was made.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if request.made:
            raise KeyboardInterrupt
        request.made = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
