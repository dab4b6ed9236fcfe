"""The records of a comparison's cells as one line a method."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pica.errors import ConfigError

COMPARISON, INDEX = "comparison.yaml", "cells.json"


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


def summarise(folder: Path) -> Summary:
    """Read the output folder of `pica compare`, finished or not.

    Raises:
        ConfigError: It is no such folder, or a file in it is damaged.
    """
    if not (folder / COMPARISON).is_file():
        raise ConfigError(f"{str(folder)!r} holds no {COMPARISON}, so it is no output folder of pica compare.")
    text = (folder / COMPARISON).read_text(encoding="utf-8")
    try:
        content = yaml.safe_load(text)
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        records = [_record(folder, entry) for entry in index["cells"]]
        labels = [row["label"] for row in content["methods"]]
        name, workers = content["name"], index["workers"]
    except FileNotFoundError:
        raise ConfigError(f"{str(folder)!r} holds no finished cell yet; run pica compare first.") from None
    except KeyError as error:
        raise ConfigError(
            f"A file in {str(folder)!r} is damaged (it lacks {error}); run pica compare with the folder again."
        ) from None
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"A file in {str(folder)!r} is damaged ({error}); run pica compare with the folder again."
        ) from None
    rows = [summarise_row(label, [record for record in records if record["label"] == label]) for label in labels]
    first = next((record for record in records if record["status"] == "done"), None)
    base = next((record["base"] for record in records if record.get("base")), None)
    title, description = (content.get(key) or "" for key in ("title", "description"))
    metric = first["result"].get("metric", "accuracy") if first else "score"
    return Summary(name, title, description, content, text, metric, rows, base, records, workers)


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
    """Mean ± standard deviation: shares in percent, other metrics as they are."""
    share = metric in ("accuracy", "f1")
    mean = f"{stat.mean:.1%}" if share else f"{stat.mean:.4f}"
    if stat.deviation is None:
        return mean
    return f"{mean} ± {stat.deviation:.1%}" if share else f"{mean} ± {stat.deviation:.4f}"


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


def _record(folder: Path, entry: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / "cells" / f"{entry['key']}.json"
    if not path.is_file() and entry["status"] == "failed":  # a cell that was not even begun has no file
        return dict(entry)
    return json.loads(path.read_text(encoding="utf-8")) | {"label": entry["label"], "seed": entry["seed"]}
