# pyright: strict
"""What a comparison leaves: the record of each cell, which cells there are, and one line of numbers a method."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal, cast

from pica.experiments.results.documents import Document, Number, parse_result
from pica.experiments.results.run import Machine, Measurement, SplitSizes, Trained
from pica.experiments.results.standing import StandingResult
from pica.files.documents import DocumentError, read_json

CELLS, INDEX, NUMBERS = "cells", "cells.json", "results.json"
"""In a comparison's folder: the folder of the cells' records, the `CellIndex`, and the `ComparisonResult`."""
COMPARISON = "comparison.yaml"
"""File that marks a folder as a comparison's."""


def record_path(folder: Path, key: str) -> Path:
    """Where a cell's record is."""
    return folder / CELLS / f"{key}.json"


@dataclass(frozen=True, kw_only=True)
class KeptOutcomes:
    """What a model did on each test problem, briefly; see `pica.experiments.outcomes.Outcomes`.

    Attributes:
        correct: Of tasks whose answers are right or wrong: a 1 or a 0 for each.
        groups: Number of problems of each data set, where there are several.
        predicted, gold: Of other tasks: a class's index or a number for each.
        classes: How many there are.
    """

    correct: str | None = None
    groups: list[int] = field(default_factory=list[int])
    predicted: Sequence[int | float] = ()
    gold: Sequence[int | float] = ()
    classes: int = 0


@dataclass(frozen=True, kw_only=True)
class CellHead:
    """What the records of all cells have.

    Attributes:
        key: Digest of the recipe and the data; see `pica.experiments.compare.cells.Cell`.
        label: What the comparison calls the method.
        seed: Of the training.
        family: Methods of one family share a colour.
        recipe: All fields, with the grid of learning rates.
        recipe_yaml: The same as a file.
    """

    FORMAT: ClassVar[int] = 1

    key: str
    label: str
    seed: int
    family: str
    recipe: Document
    recipe_yaml: str


@dataclass(frozen=True, kw_only=True)
class DoneCell(CellHead):
    """The record of a cell that measured its method.

    Attributes:
        status: Tells it from a failed one.
        base: The model without an adapter, where the recipe asks for it.
        result: The method's.
        outcomes: By "base" and "adapter"; versions before there were paired tests kept none.
        losses: Nats and tokens of each test problem's gold answer, in their order (a class counts as one token); empty for
            tasks that do not tell, and in versions before these were kept.
        curve: Step and loss of the chosen rate's training.
        problems: How much data there was.
        versions, machine: As in a run's metrics.
        finished: When, in UTC.
        wall_seconds: How long the cell took, libraries and model included.
    """

    status: Literal["done"]
    base: Measurement | None = None
    result: Trained
    outcomes: dict[str, KeptOutcomes] = field(default_factory=dict[str, KeptOutcomes])
    losses: list[tuple[Number, int]] = field(default_factory=list[tuple[Number, int]])
    curve: list[list[int | float]]
    problems: SplitSizes
    versions: dict[str, str]
    machine: Machine
    finished: str
    wall_seconds: float


@dataclass(frozen=True, kw_only=True)
class FailedCell(CellHead):
    """The record of a cell that came to nothing.

    Attributes:
        status: Tells it from a done one.
        error: Why.
        log: The end of what its process printed.
    """

    status: Literal["failed"]
    error: str
    log: str = ""


CellRecord = DoneCell | FailedCell


def parse_cell(document: Document) -> CellRecord:
    """The record of a cell from what stands in its file.

    Args:
        document: JSON values.
    Returns:
        The record.
    Raises:
        DocumentError: It is none.
    """
    return parse_result(FailedCell if document.get("status") == "failed" else DoneCell, document)


def read_cell(path: Path) -> CellRecord:
    """The record of a cell from its file.

    Args:
        path: The file.
    Returns:
        The record.
    Raises:
        OSError: It cannot be read.
        DocumentError: It is none.
    """
    document = read_json(path)
    if not isinstance(document, dict):
        raise DocumentError(f"{path}: it is no object of fields")
    try:
        return parse_cell(cast(Document, document))
    except DocumentError as error:
        raise DocumentError(f"{path}: {error}") from None


@dataclass(frozen=True, kw_only=True)
class CellEntry:
    """A cell that has ended, as the index has it: `error` is why it failed, and one that was not begun has no record."""

    label: str
    seed: int
    key: str
    status: Literal["done", "failed"]
    error: str | None = None


def entry_of(record: CellRecord) -> CellEntry:
    """A record's line in the index."""
    error = record.error if isinstance(record, FailedCell) else None
    return CellEntry(label=record.label, seed=record.seed, key=record.key, status=record.status, error=error)


@dataclass(frozen=True, kw_only=True)
class CellIndex:
    """The content of cells.json: which of the records are the comparison's, and how many cells ran at a time."""

    FORMAT: ClassVar[int] = 1

    workers: int
    cells: list[CellEntry]


@dataclass(frozen=True, kw_only=True)
class UnmeasuredRow:
    """A method of which no cell is done.

    Attributes:
        label: What the comparison calls it.
        seeds_done, seeds_failed: Numbers of cells.
        failures: Why they failed; "" where none did.
    """

    label: str
    seeds_done: int
    seeds_failed: int
    failures: str


@dataclass(frozen=True, kw_only=True)
class MeasuredRow:
    """A method in numbers, over the seeds that are done; None or NaN for what is not known.

    Attributes:
        label, seeds_done, seeds_failed, failures: As of an `UnmeasuredRow`.
        method: Name of the method in a recipe.
        metric: What the score is of.
        score_mean, score_sd: Mean and standard deviation (n - 1) over seeds.
        score_stderr: Standard error over the test problems, of one seed.
        score_low, score_high: 95% interval of test problems and seeds.
        place: "best", "tie" or "".
        behind_best: The best method's score less this one's; `behind_best_low` and `behind_best_high` are its interval, and
            `behind_best_paired` says whether it was found problem by problem.
        loss_mean, loss_sd: On the test problems.
        parameters, head_parameters: Trained ones of the method, and of a new head.
        learning_rate: The chosen one.
        rate_at_edge: "lowest" or "highest" if that is the end of a grid of several, else "".
        train_seconds_mean: Of one training.
        step_seconds: Median of an optimizer step.
        peak_memory_mib: During training.
        adapter_bytes: Of the saved adapter.
    """

    label: str
    seeds_done: int
    seeds_failed: int
    method: str
    metric: str
    score_mean: Number
    score_sd: float | None
    score_stderr: Number
    score_low: Number
    score_high: Number
    place: str
    behind_best: Number
    behind_best_low: Number
    behind_best_high: Number
    behind_best_paired: bool | None
    loss_mean: Number
    loss_sd: float | None
    parameters: int
    head_parameters: int
    learning_rate: float
    rate_at_edge: str
    train_seconds_mean: Number
    step_seconds: Number
    peak_memory_mib: Number
    adapter_bytes: int
    failures: str


@dataclass(frozen=True, kw_only=True)
class ComparisonResult:
    """The content of results.json.

    Attributes:
        name: Of the comparison.
        base: The model without training, where it was measured.
        rows: One a method, in the comparison's order.
        standing: Who is best; None where nothing has finished.
    """

    FORMAT: ClassVar[int] = 1

    name: str
    base: Measurement | None = None
    rows: list[MeasuredRow | UnmeasuredRow]
    standing: StandingResult | None = None
