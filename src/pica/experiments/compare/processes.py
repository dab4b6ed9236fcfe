"""How a comparison starts processes, names their ends, and is stopped itself."""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PRELOADED = "_pica_cells"
"""Module that the server which cells are forked from loads, when it starts."""


def context() -> Any:
    """How processes are made.

    A server process with the libraries loaded forks one for each cell, which begins in an instant and has memory of its
    own. Where there is a GPU, or no fork, each starts anew: a CUDA context does not survive a fork.

    Returns:
        One of multiprocessing's contexts.
    """
    gpu = any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd"))
    if gpu or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    return context


def cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def death(status: int | None) -> str:
    if status is not None and status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        hint = "; the system does that when memory runs out" if name == "SIGKILL" else ""
        return f"The process was ended by {name}{hint}."
    return f"The process ended with status {status} and left no record."


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM stop the grid like Ctrl-C, also for callers other than the command line.

    Only the first does anything: who ends a process group, such as timeout(1), sends two, and the second must not keep the
    cells from stopping in good order.
    """
    stopping = False

    def handle(number: int, frame: Any) -> None:
        nonlocal stopping
        if not stopping:
            stopping = True
            raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, handle)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
