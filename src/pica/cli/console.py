"""What a run shows: bars and notes on standard error, results on standard output."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from pica.cli import first_process
from pica.cli.show import columns
from pica.experiments.reporting import Advance
from pica.text import visible

_SHARE = 0.1  # without a terminal a line is written each time this much of the work is done


class VisibleConsole(Console):
    """A console on which what stands in a text steers nothing: only its own colours and movements reach the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich's, with control characters in text written out."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def table_console() -> Console:
    """Console for tables on standard output."""
    return VisibleConsole(highlight=False, soft_wrap=True, width=columns())


def print_sentences(console: Console, text: str) -> None:
    """Print text as it is; on a terminal, which would break its lines anywhere, they are broken between words."""
    console.print(text, markup=False, soft_wrap=not console.is_terminal)


class _Bar(Progress):
    """A bar with its note below, where there is room for all of it."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, then the note in a line of its own."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(f"  {task.fields['note']}", no_wrap=True, overflow="ellipsis")


class ConsoleReporter:
    """Shows notes and bars to a person, on standard error."""

    def __init__(self) -> None:
        self.console = VisibleConsole(stderr=True, highlight=False, soft_wrap=True, quiet=not first_process())

    def say(self, text: str) -> None:
        """Print lines that stay."""
        print_sentences(self.console, text)

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Advance]:
        """A bar on a terminal, a line now and then in a log file."""
        show = self._live_bar if self.console.is_terminal else self._lines
        with show(label, total) as advance:
            yield advance

    @contextmanager
    def _live_bar(self, label: str, total: int) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with _Bar(*columns, console=self.console) as progress:
            task = progress.add_task(label, total=total, note="")

            def advance(count: int = 1, note: str = "") -> None:
                progress.update(task, advance=count, note=note)

            yield advance

    @contextmanager
    def _lines(self, label: str, total: int) -> Iterator[Advance]:
        done, shown, begun = 0, 0, time.monotonic()
        first: tuple[int, float] | None = None  # what was done in the first call may have been done long before

        def advance(count: int = 1, note: str = "") -> None:
            nonlocal done, shown, first
            done += count
            now = time.monotonic()
            if first is None:
                first = done, now
            if count and (done >= total or done - shown >= _SHARE * total):
                shown = done
                since, began = first
                left = f"{(now - began) / (done - since) * (total - done):.0f} s left" if since < done < total else ""
                said = [f"{label}: {done}/{total}", f"{now - begun:.0f} s", left, note]
                self.say(", ".join(part for part in said if part))

        yield advance


class _NoteHandler(logging.Handler):
    """Shows warnings of this package as notes."""

    def __init__(self, reporter: ConsoleReporter) -> None:
        super().__init__(logging.WARNING)
        self._reporter, self._shown = reporter, set[str]()

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.levelname.lower()}: {record.getMessage()}"
        if text not in self._shown:  # a run loads the model several times, and it warns each time
            self._shown.add(text)
            self._reporter.say(text)


def reporter() -> ConsoleReporter:
    """A reporter for a command, with this package's warnings routed to it."""
    made = ConsoleReporter()
    package = logging.getLogger("pica")
    package.handlers = [_NoteHandler(made)]
    package.propagate = False

    def show(message: Warning | str, category: type[Warning], filename: str, *place: object) -> None:
        package.warning("%s", message)

    warnings.showwarning = show  # where in our source a warning was given is nothing to a user
    return made


def quiet_libraries() -> None:
    """Turn off bars and notes of the libraries underneath, whose messages name nothing a user of ours wrote.

    `datasets`, which takes a second to import and which few commands need, reads from the environment what it is to say.
    """
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    import transformers
    from transformers import dynamic_module_utils

    for library in ("transformers", "trl", "peft"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # it then refuses where it would ask whether to run a model's code
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if "datasets" in sys.modules:
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity_error()


@contextmanager
def loading() -> Iterator[ConsoleReporter]:
    """Show that the libraries imported in the block take their seconds.

    Where PEFT is among them, it knows the package's methods from then on: the command line's start has left that out.

    Yields:
        A reporter for the command, which stays of use after the block.
    Raises:
        ConfigError: The device that was asked for is not there.
    """
    made = reporter()
    with made.console.status("Loading libraries"):
        yield made
        quiet_libraries()
        if "peft" in sys.modules:
            import pica

            pica.register()
        check_device()


def check_device() -> None:
    """Raise `ConfigError` where a device was asked for that is not there, before anything is read or written."""
    if os.environ.get("PICA_DEVICE", "cpu") != "cpu":
        from pica.experiments.models import device

        device()
