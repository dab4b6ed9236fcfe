"""The records of a comparison's cells as one line a method."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pica.errors import ConfigError
from pica.experiments.outcomes import Outcomes
from pica.experiments.results.comparison import (
    COMPARISON,
    INDEX,
    CellEntry,
    CellIndex,
    CellRecord,
    ComparisonResult,
    DoneCell,
    MeasuredRow,
    UnmeasuredRow,
    read_cell,
    record_path,
)
from pica.experiments.results.documents import read_result
from pica.experiments.results.run import Candidate, FailedCandidate, Measurement
from pica.experiments.uncertainty import (
    Contender,
    Standing,
    score_interval,
    shown,
    shown_interval,
    standing,
)
from pica.files.documents import read_yaml

WITHOUT_TRAINING = "the model without training"


@dataclass(frozen=True)
class Stat:
    """Mean and standard deviation (n - 1 in the denominator; None for a single value) of one number over seeds."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Stat":
        """Of one or more values; not finite ones make the mean not finite."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


NOTHING = Stat(math.nan, None, 0)


@dataclass
class RowSummary:
    """One method.

    Attributes:
        label: What the comparison calls it.
        method: Name of the method in a recipe.
        family: Methods of one family share a colour.
        done: Records of finished cells, in the order of the seeds.
        failures: Reasons of the cells that failed.
        rate: The learning rate that the first seed chose.
        edge: "lowest" or "highest" if that is the end of a grid of several, else None.
        candidates: Rate, validation loss, validation score or failure of each rate tried.
        score: The task's metric on the test problems, over seeds.
        stderr: Mean standard error of the score over the test problems.
        examples: Number of test problems.
        interval: 95% interval of the score, of test problems and seeds.
        sets: The score of each of several test sets, over seeds, by name.
        loss: On the test problems, over seeds.
        parameters: Trained ones of the method; a new head is not counted.
        head: Trained parameters of a new head.
        seconds: Of one training.
        step: Median seconds of an optimizer step.
        memory: Peak MiB during training.
        file_bytes: Of the saved adapter, the head included.
    """

    label: str
    method: str = ""
    family: str = ""
    done: list[DoneCell] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    rate: float = math.nan
    edge: str | None = None
    candidates: list[Candidate | FailedCandidate] = field(default_factory=list)
    score: Stat = NOTHING
    stderr: float = math.nan
    examples: int = 0
    interval: tuple[float, float] = (math.nan, math.nan)
    sets: dict[str, Stat] = field(default_factory=dict)
    loss: Stat = NOTHING
    parameters: int = 0
    head: int = 0
    seconds: Stat = NOTHING
    step: float = math.nan
    memory: Stat = NOTHING
    file_bytes: int = 0

    @property
    def scores(self) -> list[float]:
        """The metric of each finished seed."""
        return [record.result.score for record in self.done]

    def contender(self, metric: str) -> Contender:
        """What it brings to a standing."""
        runs = {record.seed: _outcomes(record, "adapter", metric) for record in self.done}
        return Contender(self.label, self.score.mean, self.interval, runs)


@dataclass
class Summary:
    """A comparison's results.

    Attributes:
        name, title, description: As the comparison's file has them.
        content: That file as read.
        text: That file as it stands.
        metric: Name of the task's metric; higher is better.
        rows: One a method, in the file's order.
        base: Measurements of the model without training, if there are any.
        records: Every cell's record; of cells that were not begun what the index says of them.
        workers: Cells that ran at a time.
        contenders: The finished methods, and the model without training if it was measured.
    """

    name: str
    title: str
    description: str
    content: dict[str, Any]
    text: str
    metric: str
    rows: list[RowSummary]
    base: Measurement | None
    records: list[CellRecord | CellEntry]
    workers: int
    contenders: list[Contender]

    @cached_property
    def standing(self) -> Standing | None:
        """The contenders against the best of them; None if nothing has finished."""
        return standing(self.metric, self.contenders)

    @property
    def one_seed(self) -> bool:
        """Whether no method has finished more than one seed."""
        return max((len(row.done) for row in self.rows), default=0) == 1


def summarise(folder: Path) -> Summary:
    """Read the output folder of `pica compare`, finished or not.

    Returns:
        What its cells say so far.
    Raises:
        ConfigError: It is no such folder, or a file in it is damaged.
    """
    if not (folder / COMPARISON).is_file():
        raise ConfigError(f"{str(folder)!r} holds no {COMPARISON}, so it is no output folder of pica compare.")
    try:
        content = read_yaml(folder / COMPARISON)
        text = (folder / COMPARISON).read_text(encoding="utf-8")
        index = read_result(CellIndex, folder / INDEX)
        records = [_record(folder, entry) for entry in index.cells]
        labels = [row["label"] for row in content["methods"]]
        name = content["name"]
        rows = [summarise_row(label, [record for record in records if record.label == label]) for label in labels]
        done = [record for record in records if isinstance(record, DoneCell)]
        base = next((record.base for record in done if record.base is not None), None)
        title, description = (content.get(key) or "" for key in ("title", "description"))
        metric = done[0].result.metric if done else "score"
        contenders = [row.contender(metric) for row in rows if row.done]
        if base is not None:
            contenders.append(_base_contender(metric, base, done))
    except FileNotFoundError:
        raise ConfigError(f"{str(folder)!r} holds no finished cell yet; run pica compare first.") from None
    except KeyError as error:
        raise ConfigError(
            f"A file in {str(folder)!r} is damaged (it lacks {error}); run pica compare with the folder again."
        ) from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"A file in {str(folder)!r} is damaged ({error}); run pica compare with the folder again."
        ) from None
    return Summary(name, title, description, content, text, metric, rows, base, records, index.workers, contenders)


def _base_contender(metric: str, base: Measurement, records: Sequence[DoneCell]) -> Contender:
    """The model without training: the same with every seed."""
    found = next((kept for record in records if (kept := _outcomes(record, "base", metric)) is not None), None)
    interval = score_interval(metric, base.score, base.stderr, base.examples)
    return Contender(WITHOUT_TRAINING, base.score, interval, {record.seed: found for record in records})


def _outcomes(record: DoneCell, kind: str, metric: str) -> Outcomes | None:
    """Of a cell's adapter or base; None in records from before outcomes were kept."""
    return Outcomes.read(metric, record.outcomes.get(kind))


def summarise_row(label: str, records: Sequence[CellRecord | CellEntry]) -> RowSummary:
    """One method's line from its cells' records, the first seed's first."""
    row = RowSummary(label)
    row.done = [record for record in records if isinstance(record, DoneCell)]
    row.failures = [record.error or "" for record in records if not isinstance(record, DoneCell)]
    if not row.done:
        return row
    results = [record.result for record in row.done]
    chooser = max(results, key=lambda result: len(result.candidates))
    row.family = row.done[0].family
    row.method, row.rate, row.candidates = chooser.method, chooser.learning_rate, chooser.candidates
    rates = sorted(candidate.learning_rate for candidate in row.candidates)
    if len(rates) > 1:
        row.edge = {rates[0]: "lowest", rates[-1]: "highest"}.get(row.rate)
    row.score = Stat.of([result.score for result in results])
    row.stderr = statistics.fmean(result.stderr for result in results)
    row.examples, metric = results[0].examples, results[0].metric
    row.interval = score_interval(
        metric, row.score.mean, row.stderr, row.examples, row.score.deviation, row.score.count
    )
    row.sets = {
        name: Stat.of([result.groups[name].accuracy for result in results if name in result.groups])
        for name in results[0].groups
    }
    row.loss = Stat.of([result.loss for result in results])
    row.head = results[0].parameters.head
    row.parameters = results[0].parameters.trainable - row.head
    row.seconds = Stat.of([result.training.seconds for result in results])
    steps = [result.training.step_seconds for result in results if result.training.step_seconds]
    row.step = statistics.median(steps) if steps else math.nan
    # A process that trained several times has memory of its earlier trainings; those that trained once are preferred.
    alone = [result for result in results if len(result.candidates) == 1] or results
    row.memory = Stat.of([result.training.peak for result in alone])
    row.file_bytes = results[0].file_bytes
    return row


def shown_mean(metric: str, stat: Stat) -> str:
    """Mean ± standard deviation over seeds: shares in percent, other metrics as they are."""
    mean = shown(metric, stat.mean)
    return mean if stat.deviation is None else f"{mean} ± {shown(metric, stat.deviation)}"


def shown_row(metric: str, row: RowSummary) -> str:
    """Mean ± standard deviation over seeds; of one seed the 95% interval of the test problems, in brackets."""
    if row.score.deviation is None and all(map(math.isfinite, row.interval)):
        return f"{shown(metric, row.score.mean)} ({shown_interval(metric, row.interval)})"
    return shown_mean(metric, row.score)


SPREADS = "± standard deviation over seeds; in brackets, with one seed, the 95% interval of the test problems"
"""What `shown_row` shows."""


def result_of(summary: Summary) -> ComparisonResult:
    """The summary in numbers."""
    held = summary.standing
    rows = [_measured(summary, row) if row.done else _unmeasured(row) for row in summary.rows]
    return ComparisonResult(
        name=summary.name, base=summary.base, rows=rows, standing=held.result() if held is not None else None
    )


def _unmeasured(row: RowSummary) -> UnmeasuredRow:
    return UnmeasuredRow(
        label=row.label,
        seeds_done=len(row.done),
        seeds_failed=len(row.failures),
        failures="; ".join(row.failures),
    )


def _measured(summary: Summary, row: RowSummary) -> MeasuredRow:
    held = summary.standing
    behind = held.differences.get(row.label) if held else None  # the best one itself is behind by nothing
    return MeasuredRow(
        **vars(_unmeasured(row)),
        method=row.method,
        metric=summary.metric,
        score_mean=row.score.mean,
        score_sd=row.score.deviation,
        score_stderr=row.stderr,
        score_low=row.interval[0],
        score_high=row.interval[1],
        place=held.place(row.label) if held else "",
        behind_best=behind.value if behind else 0.0,
        behind_best_low=behind.low if behind else math.nan,
        behind_best_high=behind.high if behind else math.nan,
        behind_best_paired=behind.paired if behind else None,
        loss_mean=row.loss.mean,
        loss_sd=row.loss.deviation,
        parameters=row.parameters,
        head_parameters=row.head,
        learning_rate=row.rate,
        rate_at_edge=row.edge or "",
        train_seconds_mean=row.seconds.mean,
        step_seconds=row.step,
        peak_memory_mib=row.memory.mean,
        adapter_bytes=row.file_bytes,
    )


def _record(folder: Path, entry: CellEntry) -> CellRecord | CellEntry:
    path = record_path(folder, entry.key)
    if not path.is_file() and entry.status == "failed":  # a cell that was not even begun has no file
        return entry
    return replace(read_cell(path), label=entry.label, seed=entry.seed)
