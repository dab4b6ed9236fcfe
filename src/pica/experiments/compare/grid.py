"""All cells of a comparison, each in a process of its own, several at a time; finished ones are not run again.

Several of these may work on one folder at the same time, also on machines that share it: each claims what it runs.
"""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from pathlib import Path
from typing import Any, Protocol

from pica.errors import InUseError, OutputError
from pica.experiments.compare.cells import Cell, failed_record, make_cell, read_record, run_cell, tail
from pica.experiments.compare.comparison import Comparison, Row, dump_comparison
from pica.experiments.compare.processes import context, cores, death, sigterm_as_interrupt
from pica.experiments.interrupts import Interrupted
from pica.experiments.results.comparison import (
    COMPARISON,
    INDEX,
    CellIndex,
    CellRecord,
    DoneCell,
    FailedCell,
    entry_of,
    record_path,
)
from pica.experiments.results.documents import write_result
from pica.files import output as files
from pica.files.documents import read_yaml

_SECONDS_BETWEEN_LOOKS = 5.0  # at cells that other processes are running
_SECONDS_TO_PREPARE = 2.0  # another process holds the folder for a moment
_SECONDS_TO_STOP = 90.0  # a cell finishes its optimizer step and writes a checkpoint


class Watcher(Protocol):
    """Is told how the grid goes."""

    def begun(self, worker: int, cell: Cell) -> None:
        """A worker has taken a cell."""
        ...

    def progress(self, worker: int, label: str, done: int, total: int, note: str) -> None:
        """A step of a worker's cell, such as a training, has got this far."""
        ...

    def ended(self, worker: int, cell: Cell, record: CellRecord) -> None:
        """A cell is done or has failed."""
        ...

    def grid(self, done: int, failed: int, total: int) -> None:
        """So many of all cells are finished, of which some have failed."""
        ...

    def warn(self, text: str) -> None:
        """Something that a person should know."""
        ...


@dataclass
class _Worker:
    number: int
    cell: Cell
    process: Any
    connection: connection.Connection
    claim: contextlib.ExitStack
    stop: str | None = None


@dataclass
class _RowState:
    """How far a row is."""

    row: Row
    runs: bool  # else only what earlier runs left of it is taken
    chosen: float | None = None
    failed: str | None = None
    waiting: list[int] = field(default_factory=list)  # seeds that nobody has begun


def run_grid(
    comparison: Comparison,
    rows: Sequence[Row],
    folder: Path,
    *,
    workers: int,
    watcher: Watcher,
    retry_failed: bool = False,
) -> list[CellRecord]:
    """Run what is not finished yet.

    The first seed tries each learning rate of the row's grid and keeps the best on the validation problems; the other
    seeds take that one.

    What other processes that work on the same folder are running is waited for and not run here, until it is finished or
    they have gone.

    Args:
        comparison: What to compare.
        rows: Which of its rows to run; of the others, what earlier runs left is taken.
        folder: Where the records are; another run of the same comparison may have left some.
        workers: Cells at a time; each gets its share of the cores as threads unless the comparison sets trainer.threads.
        watcher: Is told how it goes.
        retry_failed: Run failed cells again.
    Returns:
        The records of all cells that there are, row by row.
    Raises:
        OutputError: The folder is another comparison's, or can't be written.
        Interrupted: The user stopped; finished cells are kept, those under way go on from their last checkpoint.
    """
    with sigterm_as_interrupt():
        with files.claimed(folder, patience=_SECONDS_TO_PREPARE):
            prepare(comparison, folder)
        grid = _Grid(comparison, rows, folder, workers, watcher, retry_failed)
        try:
            grid.run()
        except KeyboardInterrupt:
            raise Interrupted(folder=folder) from None
        finally:
            grid.stop()
    return grid.in_order()


def prepare(comparison: Comparison, folder: Path) -> None:
    """Make the folder, or check that it holds the same comparison.

    Raises:
        OutputError: It is a file or holds something else.
    """
    marker = folder / COMPARISON
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"Output folder {str(folder)!r} is a file; choose another name with --output.")
    if not files.is_empty(folder) and not marker.is_file():
        raise OutputError(
            f"Output folder {str(folder)!r} is not empty and holds no comparison; choose another with --output."
        )
    if (other := _name_in(marker)) not in (None, comparison.name):
        raise OutputError(
            f"Output folder {str(folder)!r} holds the comparison {other!r}, whose page would be replaced; choose another "
            "with --output."
        )
    files.write_text(marker, dump_comparison(comparison))


def _name_in(marker: Path) -> Any:
    """Name of the comparison that a folder is of; None if there is none that can be read."""
    try:
        content = read_yaml(marker)
    except (OSError, ValueError):
        return None
    return content.get("name") if isinstance(content, dict) else None


class _Grid:
    def __init__(
        self, comparison: Comparison, rows: Sequence[Row], folder: Path, workers: int, watcher: Watcher, retry: bool
    ) -> None:
        self._comparison, self._folder, self._watcher, self._retry = comparison, folder, watcher, retry
        self._size, self._context = workers, context()
        self._threads = max(1, cores() // workers)
        self._workers: dict[int, _Worker] = {}
        self._rows = [_RowState(row, row in rows, waiting=list(comparison.seeds)) for row in comparison.rows]
        self._warned = set[str]()
        self._elsewhere = False  # whether other processes are running cells of ours
        self.records: dict[tuple[str, int], CellRecord] = {}
        self._total = len(rows) * len(comparison.seeds)

    def run(self) -> None:
        """Until nothing is left to do."""
        self._tell()
        while True:
            self._fill()
            if self._workers:
                self._listen()
            elif self._elsewhere:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            else:
                break
        self._take_over()
        self._write_index()

    def in_order(self) -> list[CellRecord]:
        """The records, row by row and seed by seed."""
        order = [(state.row.label, seed) for state in self._rows for seed in self._comparison.seeds]
        return [self.records[key] for key in order if key in self.records]

    def stop(self) -> None:
        """Ask the cells under way to stop in good order, and see that they do."""
        for worker in self._workers.values():
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(worker.process.pid, signal.SIGTERM)
        until = time.monotonic() + _SECONDS_TO_STOP
        try:
            for worker in self._workers.values():
                while worker.process.is_alive() and time.monotonic() < until:
                    with contextlib.suppress(EOFError, OSError):  # a full pipe would hold it up
                        while worker.connection.poll(0.05):
                            worker.connection.recv()
                    worker.process.join(0.05)
        finally:  # also on a second Ctrl-C
            for worker in self._workers.values():
                worker.process.kill()
                worker.process.join()
                worker.claim.close()
            self._workers.clear()

    def _fill(self) -> None:
        """Give every free worker a cell, and take over the records that are there."""
        while len(self._workers) < self._size:
            found = self._next()
            if found is None:
                return
            self._start(*found)

    def _next(self) -> tuple[Cell, contextlib.ExitStack] | None:
        """The next cell to run, and the claim on it. Rows' first seeds go first: the others wait for their learning rate."""
        busy: list[tuple[_RowState, int]] = []
        try:
            return self._claimed_next(busy)
        finally:
            self._elsewhere = bool(busy)
            for state, seed in reversed(busy):
                state.waiting.insert(0, seed)

    def _claimed_next(self, busy: list[tuple[_RowState, int]]) -> tuple[Cell, contextlib.ExitStack] | None:
        """The same; cells that other processes are running are taken out of the waiting ones and listed in `busy`."""
        while True:
            found = self._take()
            if found is None:
                return None
            state, cell = found
            if state.failed:
                reason = f"Not run: {state.failed}"
                self._ended(state, cell, failed_record(cell, reason))
                continue
            if (record := self._finished(cell, state)) is not None:
                self._ended(state, cell, record)
            elif not state.runs:
                state.waiting.clear()
            elif (claim := self._claim(cell)) is None:
                busy.append((state, cell.seed))
            elif (record := self._finished(cell, state)) is not None:  # between the look and the claim
                claim.close()
                self._ended(state, cell, record)
            else:
                return cell, claim

    def _finished(self, cell: Cell, state: _RowState) -> CellRecord | None:
        """A cell's record, unless it failed and is to be run again."""
        record = read_record(self._folder, cell.key) or read_record(self._folder, cell.earlier_key)
        if record is None or (isinstance(record, FailedCell) and self._retry and state.runs):
            return None
        return dataclasses.replace(record, label=cell.row.label)  # the label is no part of the key

    def _claim(self, cell: Cell) -> contextlib.ExitStack | None:
        """Hold a cell until the stack is closed, or this process is gone; None where another process has it."""
        stack = contextlib.ExitStack()
        try:
            stack.enter_context(files.claimed(record_path(self._folder, cell.key)))
        except InUseError:
            return None
        return stack

    def _take_over(self) -> None:
        """Take what other processes have finished of rows that this one did not run."""
        first = self._comparison.seeds[0]
        for state in self._rows:
            for seed in self._comparison.seeds:
                rates = state.row.learning_rates if seed == first else (state.chosen,) if state.chosen else ()
                if rates and (state.row.label, seed) not in self.records:
                    cell = make_cell(self._comparison, state.row, seed, rates)
                    if (record := self._finished(cell, state)) is not None:
                        self._ended(state, cell, record)

    def _take(self) -> tuple[_RowState, Cell] | None:
        first = self._comparison.seeds[0]
        for state in self._rows:
            if first in state.waiting:
                state.waiting.remove(first)
                return state, make_cell(self._comparison, state.row, first, state.row.learning_rates)
        for state in self._rows:
            rate = state.chosen or (state.row.learning_rates[0] if state.failed else None)
            if state.waiting and rate is not None:
                return state, make_cell(self._comparison, state.row, state.waiting.pop(0), (rate,))
        return None

    def _start(self, cell: Cell, claim: contextlib.ExitStack) -> None:
        if cell.recipe.trainer.threads is None:
            trainer = dataclasses.replace(cell.recipe.trainer, threads=self._threads)
            cell = dataclasses.replace(cell, recipe=dataclasses.replace(cell.recipe, trainer=trainer))
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=run_cell, args=(cell, self._folder, theirs), daemon=False)
        process.start()
        theirs.close()
        number = next(n for n in range(self._size) if n not in self._workers)
        self._workers[number] = _Worker(number, cell, process, ours, claim)
        self._watcher.begun(number, cell)

    def _listen(self) -> None:
        """Wait for news from any worker."""
        sources = {worker.connection: worker for worker in self._workers.values()}
        for ready in connection.wait(list(sources), timeout=1.0):
            worker = sources[ready]  # pyright: ignore[reportArgumentType]
            try:
                message = worker.connection.recv()
            except (EOFError, OSError):
                self._left(worker)
                continue
            if message[0] == "progress":
                self._watcher.progress(worker.number, *message[1:])
            elif message[0] == "warning" and message[1] not in self._warned:
                self._warned.add(message[1])
                self._watcher.warn(f"{worker.cell.label}: {message[1]}")
            elif message[0] == "stop":
                worker.stop = message[1]

    def _left(self, worker: _Worker) -> None:
        """A cell's process is over."""
        worker.process.join()
        del self._workers[worker.number]
        cell, status = worker.cell, worker.process.exitcode
        if worker.stop:
            raise OutputError(worker.stop)
        if status == 130:  # somebody stopped this process alone
            raise KeyboardInterrupt
        record = read_record(self._folder, cell.key) if status == 0 else None
        if record is None:
            log = self._folder / "work" / cell.key / "log.txt"
            record = failed_record(cell, death(status), log=tail(log))
            write_result(record_path(self._folder, cell.key), record)
        worker.claim.close()
        self._watcher.ended(worker.number, cell, record)
        state = next(state for state in self._rows if state.row is cell.row)
        self._ended(state, cell, record)

    def _ended(self, state: _RowState, cell: Cell, record: CellRecord) -> None:
        self.records[cell.row.label, cell.seed] = record
        if cell.seed == self._comparison.seeds[0]:
            if isinstance(record, DoneCell):
                state.chosen = record.result.learning_rate
            else:
                state.failed = f"the cell that chooses the learning rate failed ({record.error})"
        self._tell()

        self._write_index()

    def _write_index(self) -> None:
        """Which cells the report is made of: the folder may hold others, of recipes since changed."""
        write_result(self._folder / INDEX, CellIndex(workers=self._size, cells=list(map(entry_of, self.in_order()))))

    def _tell(self) -> None:
        wanted = {state.row.label for state in self._rows if state.runs}
        ended = [record.status for (label, _), record in self.records.items() if label in wanted]
        self._watcher.grid(len(ended), ended.count("failed"), self._total)
