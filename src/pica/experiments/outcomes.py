"""What each model did on each test problem, and its score on problems drawn anew."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pica.experiments.results.comparison import KeptOutcomes
from pica.tasks.base import ANSWER_METRICS, REGRESSION_METRICS
from pica.tasks.metrics import f1_of_tables, matthews_of_tables

RESAMPLES = 5000
POOLED = ("token_accuracy", "token_loss")
"""Metrics that are a mean over the tokens of all conversations; conversations are drawn, not tokens."""
_AT_ONCE = 4_000_000  # counts of drawn problems in memory


@dataclass(frozen=True, eq=False)
class Outcomes:
    """What one trained model did on each test problem.

    Attributes:
        metric: Name of the metric that the task is judged by.
        predicted: Of shape (problems,): whether right (accuracy; 0.5: neither), a class index (f1, matthews), a number, or
            a sum over the tokens of a conversation (`POOLED`).
        gold: Class indices, numbers, or counts of tokens, of the same shape; None for accuracy.
        groups: Number of problems of each data set, in their order; accuracy is the mean over data sets.
        classes: Number of classes (f1, matthews).
    """

    metric: str
    predicted: np.ndarray
    gold: np.ndarray | None = None
    groups: tuple[int, ...] = ()
    classes: int = 0

    @property
    def shape(self) -> tuple[Any, ...]:
        """Equal for two models only if they were measured alike."""
        tokens = float(self.gold.sum()) if self.metric in POOLED and self.gold is not None else 0.0
        return (self.metric, len(self.predicted), self.groups, tokens)

    @classmethod
    def read(cls, metric: str, kept: KeptOutcomes | None) -> "Outcomes | None":
        """From what `kept_outcomes` made; None if that is None."""
        if kept is None:
            return None
        if kept.correct is not None:
            right = np.array([0.5 if mark == "=" else float(mark) for mark in kept.correct], dtype=np.float32)
            return cls(metric, right, None, tuple(kept.groups) or (len(right),))
        predicted, gold = np.asarray(kept.predicted), np.asarray(kept.gold)
        return cls(metric, predicted, gold, (len(gold),), kept.classes)

    @classmethod
    def joined(cls, parts: Sequence["Outcomes | None"]) -> "Outcomes | None":
        """Of several sets whose accuracies' mean is the score; None unless each of them was kept."""
        known = [part for part in parts if part is not None and part.metric == "accuracy"]
        if len(known) < len(parts):
            return None
        sizes = tuple(len(part.predicted) for part in known)
        return cls("accuracy", np.concatenate([part.predicted for part in known]), None, sizes)


def kept_outcomes(metric: str, rows: Sequence[Mapping[str, Any]]) -> KeptOutcomes | None:
    """What a record keeps of a file of predictions, so that methods can be held against each other problem by problem.

    Args:
        metric: Name of the metric that the task is judged by.
        rows: The file's lines.

    Returns:
        None for predictions that are no answers (drawn pictures).
    """
    if metric in ANSWER_METRICS and rows and all("correct" in row for row in rows):
        parts: dict[str, str] = {}
        for row in rows:
            name = row.get("group", "")
            parts[name] = parts.get(name, "") + ("=" if row["correct"] is None else "01"[bool(row["correct"])])
        groups = [len(part) for part in parts.values()] if len(parts) > 1 else []
        return KeptOutcomes(correct="".join(parts.values()), groups=groups)
    if metric == "token_accuracy" and rows and all("tokens" in row for row in rows):
        right = [round(row["token_accuracy"] * row["tokens"]) for row in rows]
        return KeptOutcomes(predicted=right, gold=[row["tokens"] for row in rows])
    if metric in REGRESSION_METRICS and rows and all("predicted" in row for row in rows):
        predicted, gold = ([float(row[key]) for row in rows] for key in ("predicted", "gold"))
        return KeptOutcomes(predicted=predicted, gold=gold)
    if metric in ("f1", "matthews") and rows and all("probabilities" in row for row in rows):
        places = {name: index for index, name in enumerate(rows[0]["probabilities"])}
        predicted, gold = ([places[str(row[key])] for row in rows] for key in ("predicted", "gold"))
        return KeptOutcomes(predicted=predicted, gold=gold, classes=len(places))
    return None


def resampled(runs: Sequence[Outcomes], groups: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw the problems of some runs anew.

    Problems are drawn within their data set. For accuracy each data set has two more that a difference of scores counts as
    +1 and as -1.

    Returns:
        Scores (runs, resamples), and what the made-up problems add to a difference, (resamples,).
    """
    made_up = 2 if runs[0].metric in ANSWER_METRICS else 0
    generator = np.random.default_rng(0)
    scores, favours = [], []
    done, step = 0, max(1, _AT_ONCE // sum(groups))
    while done < RESAMPLES:
        size = min(step, RESAMPLES - done)
        counts, favour = [], np.zeros(size)
        for group in groups:
            drawn = generator.integers(0, group + made_up, (size, group + made_up))
            drawn += np.arange(size)[:, None] * (group + made_up)
            found = np.bincount(drawn.ravel(), minlength=size * (group + made_up)).reshape(size, -1)
            counts.append(found[:, :group])
            if made_up:
                favour += (found[:, group] - found[:, group + 1]) / (group + made_up) / len(groups)
        weights = np.concatenate(counts, axis=1).astype(np.float32)
        sizes = [group + made_up for group in groups]
        scores.append(np.stack([scores_of(run, weights, sizes) for run in runs]))
        favours.append(favour)
        done += size
    return np.concatenate(scores, axis=1), np.concatenate(favours)


def scores_of(run: Outcomes, weights: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The metric of each sample; `weights` (samples, problems) says how often a problem is in it."""
    if run.gold is None:
        ends = list(itertools.accumulate(run.groups))
        parts = [
            (weights[:, end - group : end] @ run.predicted[end - group : end]).astype(float) / size  # exact counts
            for group, end, size in zip(run.groups, ends, sizes)
        ]
        return np.mean(parts, axis=0)
    if run.metric in POOLED:
        return (weights @ run.predicted).astype(float) / (weights @ run.gold)
    if run.metric in ("f1", "matthews"):
        pairs = np.zeros((len(run.gold), run.classes**2), np.float32)
        pairs[np.arange(len(run.gold)), run.predicted * run.classes + run.gold] = 1
        tables = (weights @ pairs).astype(float).reshape(-1, run.classes, run.classes)
        return (f1_of_tables if run.metric == "f1" else matthews_of_tables)(tables)
    sides = (run.predicted, run.gold)
    first, second = (_ranks(weights, side) if run.metric == "spearman" else side[None] for side in sides)
    return _correlation(weights, first, second)


def _ranks(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Each problem's rank in each sample, equal values sharing their mean rank: (samples, problems)."""
    _, place, sizes = np.unique(values, return_inverse=True, return_counts=True)
    starts = np.cumsum(sizes) - sizes
    counts = np.add.reduceat(weights[:, np.argsort(values, kind="stable")], starts, axis=1)
    return (counts.cumsum(1) - (counts - 1) / 2)[:, place]


def _correlation(weights: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pearson's, 0 where one side is constant; the sides are (1 or samples, problems)."""
    total = weights.sum(1, keepdims=True)

    def centred(side: np.ndarray) -> np.ndarray:
        return side - (weights * side).sum(1, keepdims=True) / total

    one, other = centred(first), centred(second)
    both, left, right = ((weights * product).sum(1) for product in (one * other, one * one, other * other))
    below = np.sqrt(left * right)
    return np.divide(both, below, out=np.zeros_like(both), where=below > 0)
