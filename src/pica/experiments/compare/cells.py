"""One cell of a comparison: a method with one seed, run in a process of its own, and its record."""

import csv
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import signal
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from pica.errors import OutputError, PicaError
from pica.experiments.compare.comparison import Comparison, Row
from pica.experiments.interrupts import Interrupted
from pica.experiments.methods import METHODS
from pica.experiments.recipes.parsing import dump_recipe
from pica.experiments.recipes.recipe import AdapterSection, Recipe, columns_of, places_of, with_absolute_paths
from pica.experiments.reporting import Advance
from pica.experiments.results.comparison import CellHead, CellRecord, DoneCell, FailedCell, read_cell, record_path
from pica.experiments.results.documents import read_result, write_result
from pica.experiments.results.run import CURVE, METRICS, RunMetrics
from pica.experiments.train.origins import file_digest, model_digest
from pica.files import output as files
from pica.tasks import TASKS, Split
from pica.tasks.dreambooth import picture_files
from pica.tasks.pictures import files_of
from pica.tasks.places import data_files

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
"""Of a recipe's data."""

_SECONDS_BETWEEN_NOTES = 0.2
_SECONDS_FOR_ANOTHER = 90.0
_LATER = ("basis_from", "calibration", "calibration_tokens")  # fields of an adapter that earlier records do not have
_WITHOUT_EFFECT = {"name", "output"}  # fields of a recipe that say where results go, not what they are


@dataclass(frozen=True)
class Cell:
    """What one process does: train with each of the rates, keep the best by the validation problems, measure it.

    Attributes:
        row: The method.
        seed: Decides the order of the data and random initial values.
        recipe: All of it.
        key: Digest of the recipe and of the content of the data's and the model's files: equal keys, equal work.
        earlier_key: The same without the model's files, as versions had it that did not look at them.
    """

    row: Row
    seed: int
    recipe: Recipe
    key: str
    earlier_key: str

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.row.label}, seed {self.seed}"


def make_cell(comparison: Comparison, row: Row, seed: int, rates: tuple[float, ...]) -> Cell:
    """The cell of a row and a seed with these learning rates to choose from."""
    recipe = with_absolute_paths(comparison.recipe(row, seed, rates))
    content = {key: value for key, value in dataclasses.asdict(recipe).items() if key not in _WITHOUT_EFFECT}
    if TASKS[recipe.task.name].kind != "text-to-image":
        content.pop("dreambooth")  # records from before this section was there stay good
    for name in _LATER:  # likewise
        if content["adapter"][name] == getattr(AdapterSection, name):
            content["adapter"].pop(name)
    content["trainer"].pop("threads")  # a matter of the machine, as is the number of workers that it follows from
    content["files"] = {name: _data_digests(places_of(recipe.data, name), recipe) for name in SPLITS}
    earlier = _key(content)
    if Path(recipe.model.path).is_dir():  # elsewhere the name, with the revision, stands for what is there
        content["model"]["files"] = model_digest(recipe.model.path)
    return Cell(row, seed, recipe, _key(content), earlier)


def _key(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([CellHead.FORMAT, content], sort_keys=True).encode()).hexdigest()[:20]


def read_record(folder: Path, key: str) -> CellRecord | None:
    """A cell's record, or None if there is none that can be read: the cell is then run again."""
    with suppress(OSError, ValueError):
        return read_cell(record_path(folder, key))
    return None


def failed_record(cell: Cell, reason: str, log: str = "") -> FailedCell:
    """The record of a cell that came to nothing."""
    return FailedCell(**_head(cell), status="failed", error=reason, log=log)


def run_cell(cell: Cell, folder: Path, connection: Connection) -> None:
    """The body of a cell's process: run or go on with its recipe, write its record, tell the parent on the way.

    Standard output and error of the libraries go to a log file beside the run. SIGTERM stops it like Ctrl-C stops a run.

    Raises:
        SystemExit: The run was stopped; it can go on.
    """
    with suppress(AttributeError, OSError):
        os.setpgid(0, 0)  # Ctrl-C is for the parent alone, which then tells its cells once
    signal.signal(signal.SIGTERM, _interrupt)
    work = folder / "work" / cell.key
    log = work / "log.txt"
    reporter = _Messenger(connection)
    try:
        with files.translated_write_errors(work):
            work.mkdir(parents=True, exist_ok=True)
            _redirect(log)
        reporter.send(("begun", cell.label))
        # A comparison that was killed leaves its cells to find out, at their next message, and to end.
        with files.claimed(work, patience=_SECONDS_FOR_ANOTHER):
            record = _run(cell, work / "run", reporter)
    except (KeyboardInterrupt, Interrupted, BrokenPipeError):
        raise SystemExit(130) from None  # resumable; nothing is recorded
    except OutputError as error:  # the disk's fault and no result of the method: it would hit every cell
        _send_last(connection, ("stop", str(error)))
        return
    except PicaError as error:
        record = failed_record(cell, str(error))
    except BaseException as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        record = failed_record(cell, reason, log=tail(log))
    try:
        write_result(record_path(folder, cell.key), record)
    except OutputError as error:
        _send_last(connection, ("stop", str(error)))
        return
    shutil.rmtree(work, ignore_errors=True)
    _send_last(connection, ("done", record.status))


def tail(log: Path, lines: int = 30) -> str:
    """The end of a log file."""
    with suppress(OSError):
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
    return ""


def _run(cell: Cell, run: Path, reporter: "_Messenger") -> DoneCell:
    # Here and not above: the parent makes cells as well, and has no use for torch.
    from pica.experiments.measuring import machine, versions
    from pica.experiments.standings import predictions_file, read_outcomes, read_rows
    from pica.experiments.train.run import resume, start

    package = logging.getLogger("pica")
    package.handlers, package.propagate = [_WarningSender(reporter)], False
    begun = time.time()
    recipe = dataclasses.replace(cell.recipe, output=str(run))
    metrics = _finished(run)
    if metrics is None and (run / files.RESOLVED).is_file():
        metrics = resume(run, reporter=reporter, trust_remote_code=recipe.model.trust_remote_code).metrics
    elif metrics is None:
        shutil.rmtree(run, ignore_errors=True)
        metrics = start(recipe, reporter=reporter).metrics
    return DoneCell(
        **_head(cell),
        status="done",
        base=metrics.base,
        result=metrics.adapter,
        outcomes=read_outcomes(run, metrics),
        losses=_losses(read_rows(run / predictions_file("adapter"))),
        curve=_curve(run, metrics.adapter.learning_rate),
        problems=metrics.problems,
        versions=versions(),
        machine=machine(),
        finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        wall_seconds=round(time.time() - begun, 1),
    )


def _head(cell: Cell) -> dict[str, Any]:
    """The fields of `CellHead`."""
    shown = dataclasses.replace(cell.recipe, output=None)
    head = CellHead(
        key=cell.key,
        label=cell.row.label,
        seed=cell.seed,
        family=METHODS[cell.recipe.adapter.method].family,
        recipe=dataclasses.asdict(shown),
        recipe_yaml=dump_recipe(shown),
    )
    return vars(head)


def _finished(run: Path) -> RunMetrics | None:
    with suppress(OSError, ValueError):
        return read_result(RunMetrics, run / METRICS)
    return None


def _losses(rows: Sequence[Mapping[str, Any]]) -> list[tuple[float, int]]:
    """[loss in nats, tokens] of each test problem's gold answer, in their order; none for tasks that do not tell."""
    # a class counts as one token
    return [(row["loss"], row.get("tokens", 1)) for row in rows] if all("loss" in row for row in rows) else []


def _curve(run: Path, rate: float) -> list[list[int | float]]:
    """[step, loss] of the chosen rate's training."""
    with open(run / CURVE, encoding="utf-8", newline="") as file:
        rows: Iterator[Mapping[str, str]] = csv.DictReader(file)
        chosen = [row for row in rows if float(row["peak_rate"]) == rate]
    final = [row for row in chosen if row["run"].endswith("-refit")] or chosen
    return [[int(row["step"]), float(row["loss"])] for row in final if row["loss"]]


def _data_digests(places: Sequence[str], recipe: Recipe) -> Any:
    """`_data_digest` of the place of a split, or of each of several; None where there is none."""
    found = [_data_digest(place, recipe) for place in places]
    return found if len(found) > 1 else next(iter(found), None)


def _data_digest(place: str, recipe: Recipe) -> Any:
    """Of a data file's content, or by name of each file that a folder has for a split; None for other places."""
    path = Path(place)
    if place == "embedded" or not path.exists():
        return None
    if TASKS[recipe.task.name].kind == "image-classification":
        pictures = {file for split in SPLITS for file in files_of(place, split, columns_of(recipe.data.columns, split))}
        return {os.path.relpath(file, path): file_digest(file, whole=True) for file in pictures}
    if TASKS[recipe.task.name].kind == "text-to-image":
        return {file.name: file_digest(file, whole=True) for file in picture_files(path)}
    if path.is_file():
        return file_digest(path, whole=True)
    found = [file for split in SPLITS for file in data_files(place, split)]
    return {file.relative_to(path).as_posix(): file_digest(file, whole=True) for file in found}


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _redirect(log: Path) -> None:
    """Send both output streams, also what C libraries write, to a file."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def _send_last(connection: Connection, message: tuple[Any, ...]) -> None:
    with suppress(OSError):
        connection.send(message)
        connection.close()


class _Messenger:
    """A reporter that tells the parent process what the cell is doing."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._sent = connection, 0.0

    def send(self, message: tuple[Any, ...]) -> None:
        """Send now. A parent that is gone ends the cell, which can be continued."""
        self._connection.send(message)

    def say(self, text: str) -> None:
        """Only progress and warnings are for the parent."""

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Advance]:
        """Progress of one step of the cell."""
        done = 0

        def advance(count: int = 1, note: str = "") -> None:
            nonlocal done
            done += count
            now = time.monotonic()
            if now - self._sent >= _SECONDS_BETWEEN_NOTES or done >= total:
                self._sent = now
                self.send(("progress", label, done, total, note))

        yield advance


class _WarningSender(logging.Handler):
    """Passes this package's warnings to the parent."""

    def __init__(self, messenger: _Messenger) -> None:
        super().__init__(logging.WARNING)
        self._messenger = messenger

    def emit(self, record: logging.LogRecord) -> None:
        self._messenger.send(("warning", record.getMessage()))
