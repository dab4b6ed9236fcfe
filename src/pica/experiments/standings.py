"""Which of a run's models is best, by the predictions that the run has left."""

from pathlib import Path
from typing import Any

from pica.experiments.outcomes import Outcomes, kept_outcomes
from pica.experiments.results.comparison import KeptOutcomes
from pica.experiments.results.run import Measurement, RunMetrics
from pica.experiments.uncertainty import Contender, Standing, score_interval, standing
from pica.files.documents import parse_json

BASE = "base model"
"""What the model without training is called."""


def predictions_file(kind: str, method: str | None = None) -> str:
    """Name of the file with the predictions of a run's base, adapter or baseline (which is named with its method)."""
    return f"predictions-{kind}-{method}.jsonl" if kind == "baseline" else f"predictions-{kind}.jsonl"


def prediction_files(metrics: RunMetrics) -> dict[str, str]:
    """The `predictions_file` of each of base, adapter and baseline that a run has measured."""
    methods = {kind: result.method for kind, result in metrics.trained.items()}
    return {kind: predictions_file(kind, methods.get(kind)) for kind in metrics.models}


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read one predictions file.

    Returns:
        Its lines.
    Raises:
        OSError: It is missing.
        ValueError: It is damaged.
    """
    return [parse_json(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def run_standing(folder: Path, metrics: RunMetrics) -> Standing | None:
    """Hold base model, adapter and baseline of a run against each other, on the problems that all of them answered.

    Args:
        folder: Holds the predictions files.
        metrics: What the run measured.

    Returns:
        None where there is nothing to compare: one model only, or pictures instead of answers.
    """
    if len(metrics.models) < 2 or metrics.task == "dreambooth":
        return None
    kept = read_outcomes(folder, metrics)
    contenders = [contender(_label(kind, metrics), result, kept.get(kind)) for kind, result in metrics.models.items()]
    return standing(metrics.adapter.metric, contenders)


def contender(label: str, result: Measurement, kept: KeptOutcomes | None) -> Contender:
    """One model that was measured once."""
    interval = score_interval(result.metric, result.score, result.stderr, result.examples)
    return Contender(label, result.score, interval, {0: Outcomes.read(result.metric, kept)})


def read_outcomes(folder: Path, metrics: RunMetrics) -> dict[str, KeptOutcomes]:
    """`kept_outcomes` of base, adapter and baseline, from the predictions files of a run; without those that have none."""
    found = {}
    for kind, name in prediction_files(metrics).items():
        file = folder / name
        if file.is_file() and (kept := kept_outcomes(metrics.models[kind].metric, read_rows(file))):
            found[kind] = kept
    return found


def _label(kind: str, metrics: RunMetrics) -> str:
    if kind == "base":
        return BASE
    title = metrics.trained[kind].title
    titles = [result.title for result in metrics.trained.values()]
    return f"{title} ({kind})" if titles.count(title) == 2 else title
