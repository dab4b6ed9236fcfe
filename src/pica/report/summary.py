"""The records of a comparison's cells as one line a method."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pica.errors import ConfigError
from pica.experiments.outcomes import Outcomes
from pica.experiments.uncertainty import (
    Contender,
    Standing,
    finite,
    score_interval,
    shown,
    shown_interval,
    standing,
)
from pica.files.documents import read_json, read_yaml

COMPARISON, INDEX = "comparison.yaml", "cells.json"
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
    done: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    rate: float = math.nan
    edge: str | None = None
    candidates: list[dict[str, Any]] = field(default_factory=list)
    score: Stat = NOTHING
    stderr: float = math.nan
    examples: int = 0
    interval: tuple[float, float] = (math.nan, math.nan)
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
        return [score_of(record["result"]) for record in self.done]

    def contender(self, metric: str) -> Contender:
        """What it brings to a standing."""
        runs = {record["seed"]: _outcomes(record, "adapter", metric) for record in self.done}
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
        records: Every cell's record.
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
    base: dict[str, Any] | None
    records: list[dict[str, Any]]
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

    Raises:
        ConfigError: It is no such folder, or a file in it is damaged.
    """
    if not (folder / COMPARISON).is_file():
        raise ConfigError(f"{str(folder)!r} holds no {COMPARISON}, so it is no output folder of pica compare.")
    try:
        content = read_yaml(folder / COMPARISON)
        text = (folder / COMPARISON).read_text(encoding="utf-8")
        index = read_json(folder / INDEX)
        records = [_record(folder, entry) for entry in index["cells"]]
        labels = [row["label"] for row in content["methods"]]
        name, workers = content["name"], index["workers"]
        rows = [summarise_row(label, [record for record in records if record["label"] == label]) for label in labels]
        first = next((record for record in records if record["status"] == "done"), None)
        base = next((record["base"] for record in records if record.get("base")), None)
        title, description = (content.get(key) or "" for key in ("title", "description"))
        metric = first["result"].get("metric", "accuracy") if first else "score"
        contenders = [row.contender(metric) for row in rows if row.done]
        if base is not None:
            contenders.append(_base_contender(metric, base, records))
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
    return Summary(name, title, description, content, text, metric, rows, base, records, workers, contenders)


def _base_contender(metric: str, base: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> Contender:
    """The model without training: the same with every seed."""
    found = next((kept for record in records if (kept := _outcomes(record, "base", metric)) is not None), None)
    interval = score_interval(metric, score_of(base), base.get("stderr", math.nan), base.get("examples", 0))
    runs = {record["seed"]: found for record in records if record["status"] == "done"}
    return Contender(WITHOUT_TRAINING, score_of(base), interval, runs)


def _outcomes(record: Mapping[str, Any], kind: str, metric: str) -> Outcomes | None:
    """Of a cell's adapter or base; None in records from before outcomes were kept."""
    return Outcomes.read(metric, (record.get("outcomes") or {}).get(kind))


def summarise_row(label: str, records: Sequence[Mapping[str, Any]]) -> RowSummary:
    """One method's line from its cells' records, the first seed's first."""
    row = RowSummary(label)
    row.done = [dict(record) for record in records if record["status"] == "done"]
    row.failures = [record["error"] for record in records if record["status"] == "failed"]
    if not row.done:
        return row
    results = [record["result"] for record in row.done]
    chooser = max(results, key=lambda result: len(result["candidates"]))
    row.family = row.done[0]["family"]
    row.method, row.rate = chooser["method"], chooser["learning_rate"]
    row.candidates = [
        {key: candidate.get(key) for key in ("learning_rate", "validation_loss", "validation_score", "failed")}
        for candidate in chooser["candidates"]
    ]
    rates = sorted(candidate["learning_rate"] for candidate in row.candidates)
    if len(rates) > 1:
        row.edge = {rates[0]: "lowest", rates[-1]: "highest"}.get(row.rate)
    row.score = Stat.of([score_of(result) for result in results])
    row.stderr = statistics.fmean(_number(result["stderr"]) for result in results)
    row.examples = int(results[0].get("examples", 0))
    metric = results[0].get("metric", "accuracy")
    row.interval = score_interval(
        metric, row.score.mean, row.stderr, row.examples, row.score.deviation, row.score.count
    )
    row.loss = Stat.of([result["loss"] for result in results])
    counts = results[0]["parameters"]
    row.head = counts.get("head", 0)
    row.parameters = counts["trainable"] - row.head
    row.seconds = Stat.of([result["training"]["seconds"] for result in results])
    steps = [result["training"]["step_seconds"] for result in results if result["training"]["step_seconds"]]
    row.step = statistics.median(steps) if steps else math.nan
    # A process that trained several times has memory of its earlier trainings; those that trained once are preferred.
    alone = [result for result in results if len(result["candidates"]) == 1] or results
    row.memory = Stat.of([peak_of(result) for result in alone])
    row.file_bytes = results[0]["file_bytes"]
    return row


def score_of(result: Mapping[str, Any]) -> float:
    """The task's metric."""
    return _number(result.get("score", result.get("accuracy")))


def _number(value: float | None) -> float:
    """NaN for what is undefined, such as a correlation with constant predictions, and so is null in a file."""
    return math.nan if value is None else value


def peak_of(result: Mapping[str, Any]) -> float:
    """Peak memory in MiB: the GPU's where there is one, else the process's."""
    peaks = result["training"]["peak_memory"]
    return peaks.get("gpu", peaks["host"])


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


def flat_rows(summary: Summary) -> list[dict[str, Any]]:
    """The summary as rows of numbers, for CSV and JSON."""
    rows = []
    for row in summary.rows:
        line: dict[str, Any] = {"label": row.label, "seeds_done": len(row.done), "seeds_failed": len(row.failures)}
        if row.done:
            line |= {
                "method": row.method,
                "metric": summary.metric,
                "score_mean": row.score.mean,
                "score_sd": row.score.deviation,
                "score_stderr": row.stderr,
                "score_low": finite(row.interval[0]),
                "score_high": finite(row.interval[1]),
                "place": summary.standing.place(row.label) if summary.standing else "",
                **_behind(summary.standing, row.label),
                "loss_mean": row.loss.mean,
                "loss_sd": row.loss.deviation,
                "parameters": row.parameters,
                "head_parameters": row.head,
                "learning_rate": row.rate,
                "rate_at_edge": row.edge or "",
                "train_seconds_mean": row.seconds.mean,
                "step_seconds": None if math.isnan(row.step) else row.step,
                "peak_memory_mib": row.memory.mean,
                "adapter_bytes": row.file_bytes,
            }
        line["failures"] = "; ".join(row.failures)
        rows.append(line)
    return rows


def _behind(held: Standing | None, label: str) -> dict[str, Any]:
    """By how much a method is behind the best, with the 95% interval; the best one itself by nothing."""
    behind = held.differences.get(label) if held else None
    return {
        "behind_best": behind.value if behind else 0.0,
        "behind_best_low": finite(behind.low) if behind else None,
        "behind_best_high": finite(behind.high) if behind else None,
        "behind_best_paired": behind.paired if behind else None,
    }


def _record(folder: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / "cells" / f"{entry['key']}.json"
    if not path.is_file() and entry["status"] == "failed":  # a cell that was not even begun has no file
        return dict(entry)
    return read_json(path) | {"label": entry["label"], "seed": entry["seed"]}
