"""Metrics of classification and regression, by scikit-learn and scipy, each with its standard error.

The libraries are imported when something is measured: the command line's help must not wait for them.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from pica.tasks.base import REGRESSION_METRICS

_RESAMPLES = 1000


def class_metrics(predicted: Sequence[int], gold: Sequence[int], classes: int) -> dict[str, float]:
    """Score predicted classes.

    F1 is that of class 1 where there are two classes, as GLUE has it, else the mean over classes. A Matthews correlation
    that is undefined, because only one class is predicted or there, is 0.

    Args:
        predicted: Class indices, below `classes`.
        gold: The right ones, as many and at least one.
        classes: How many there are.
    Returns:
        "accuracy", "f1" and "matthews".
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    binary: dict[str, Any] = {"average": "binary", "pos_label": 1} if classes == 2 else {"average": "macro"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "only one label": 0 is what is wanted then
        return {
            "accuracy": float(accuracy_score(gold, predicted)),
            "f1": float(f1_score(gold, predicted, zero_division=0.0, **binary)),  # pyright: ignore[reportArgumentType]
            "matthews": float(matthews_corrcoef(gold, predicted)),
        }


def class_stderr(metric: str, predicted: Sequence[int], gold: Sequence[int], classes: int, *, seed: int = 0) -> float:
    """Estimate the uncertainty of one of `class_metrics`.

    A metric of classes only depends on how often each pair (predicted, gold) occurs, so it is those counts that are
    drawn anew: the same distribution as drawing examples, at a cost that does not grow with their number.

    Args:
        metric: "accuracy", "f1" or "matthews".
        predicted: As for `class_metrics`; so are `gold` and `classes`.
        gold: The right classes.
        classes: How many there are.
        seed: Of the samples.
    Returns:
        The standard error: sqrt(p (1 - p) / n) for accuracy, else by 1,000 bootstrap samples.
    """
    first, second = np.asarray(predicted), np.asarray(gold)
    if metric == "accuracy":
        share = float((first == second).mean())
        return float(np.sqrt(share * (1 - share) / len(first)))
    counts = np.bincount(first * classes + second, minlength=classes**2)
    drawn = np.random.default_rng(seed).multinomial(len(first), counts / counts.sum(), size=_RESAMPLES)
    tables = drawn.reshape(_RESAMPLES, classes, classes).astype(float)  # (samples, predicted, gold)
    return float(np.std(f1_of_tables(tables) if metric == "f1" else matthews_of_tables(tables), ddof=1))


def f1_of_tables(tables: np.ndarray) -> np.ndarray:
    """F1 of each confusion matrix (samples, classes, classes), as `class_metrics` has it."""
    right = np.diagonal(tables, axis1=1, axis2=2)
    each = _share(2 * right, tables.sum(1) + tables.sum(2))
    if tables.shape[1] == 2:
        return each[:, 1]
    there = tables.sum(1) + tables.sum(2) > 0  # a class that a sample has lost is no part of its mean
    return _share((each * there).sum(1), there.sum(1))


def matthews_of_tables(tables: np.ndarray) -> np.ndarray:
    """Matthews correlation of each confusion matrix (samples, classes, classes)."""
    total, right = tables.sum((1, 2)), np.trace(tables, axis1=1, axis2=2)
    gold, predicted = tables.sum(1), tables.sum(2)
    spread = (total**2 - (predicted**2).sum(1)) * (total**2 - (gold**2).sum(1))
    return _share(right * total - (predicted * gold).sum(1), np.sqrt(spread))


def _share(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """The quotient, 0 where `below` is."""
    return np.divide(above, below, out=np.zeros_like(above, dtype=float), where=below > 0)


def regression_metrics(predicted: Sequence[float], gold: Sequence[float]) -> dict[str, float]:
    """Pearson's and Spearman's correlation; 0 where one side is constant and none is defined."""
    return _regression_metrics(np.asarray(predicted, dtype=float), np.asarray(gold, dtype=float))


def regression_stderr(metric: str, predicted: Sequence[float], gold: Sequence[float], *, seed: int = 0) -> float:
    """Standard error of one of `regression_metrics`, by 1,000 bootstrap samples of the examples."""
    first, second = np.asarray(predicted, dtype=float), np.asarray(gold, dtype=float)
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(_RESAMPLES):
        rows = generator.integers(0, len(first), len(first))
        values.append(_regression_metrics(first[rows], second[rows])[metric])
    return float(np.std(values, ddof=1))


def _regression_metrics(predicted: Any, gold: Any) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    if len(gold) < 2 or np.ptp(predicted) == 0 or np.ptp(gold) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nearly constant: the value is still the best one there is
        values: list[Any] = [pearsonr(predicted, gold)[0], spearmanr(predicted, gold)[0]]
    return {name: float(np.nan_to_num(value)) for name, value in zip(REGRESSION_METRICS, values)}
