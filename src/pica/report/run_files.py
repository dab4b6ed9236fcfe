"""What the folder of a finished run holds, read for its page."""

import csv
from dataclasses import dataclass
from pathlib import Path

from pica.experiments.results.documents import read_result
from pica.experiments.results.run import CURVE, METRICS, RunMetrics
from pica.experiments.standings import prediction_files, read_rows
from pica.files.output import RESOLVED
from pica.report.answers import Rows


@dataclass(frozen=True)
class RunFiles:
    """The files that every finished run has.

    Attributes:
        metrics: What it measured.
        recipe: Text of the whole recipe.
        curve: Rows of loss_curve.csv.
    """

    metrics: RunMetrics
    recipe: str
    curve: list[dict[str, str]]


def read_run(folder: Path) -> RunFiles:
    """Read the files of a run.

    Returns:
        What is in them.
    Raises:
        OSError: One is missing.
        ValueError: One is damaged.
    """
    with open(folder / CURVE, encoding="utf-8", newline="") as file:
        curve = list(csv.DictReader(file))
    return RunFiles(read_result(RunMetrics, folder / METRICS), (folder / RESOLVED).read_text(encoding="utf-8"), curve)


def read_predictions(folder: Path, metrics: RunMetrics) -> dict[str, Rows]:
    """Read the answers of a run.

    Returns:
        The lines of the predictions files by "base", "adapter" and "baseline", of those that were measured.
    Raises:
        OSError: One is missing.
        ValueError: One is damaged.
    """
    return {kind: read_rows(folder / name) for kind, name in prediction_files(metrics).items()}
