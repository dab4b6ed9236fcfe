"""Processes of their own for tests.

The server that a comparison has forks them, which takes a moment; to import the libraries anew takes seconds.
"""

import os
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from pica.experiments.compare.processes import context


def start(function: Callable[..., Any], *arguments: Any, said: Path, **variables: str) -> BaseProcess:
    """Call a function of a module in another process.

    Args:
        function: Found by its name in the other process.
        arguments: Pickled.
        said: File for what it prints, errors too.
        variables: Of the environment, beside this process's.
    Returns:
        The process, whose status is 0, 1 after an exception, or what `sys.exit` got.
    """
    process: BaseProcess = context().Process(
        target=_call, args=(function, arguments, {**os.environ, **variables}, said)
    )
    process.start()
    return process


def console_script(*arguments: str) -> None:
    """`pica` with these arguments."""
    import _pica_entry

    sys.argv = ["pica", *arguments]
    sys.exit(_pica_entry.main())


def _call(function: Callable[..., Any], arguments: tuple[Any, ...], environment: Mapping[str, str], said: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    function(*arguments)
