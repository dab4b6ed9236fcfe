# pyright: strict
"""Who is best among models that met the same problems, and who ties with it, as files of results have it."""

from dataclasses import dataclass

from pica.experiments.results.documents import Number


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One model in a standing.

    Attributes:
        score: Of the metric, the mean over seeds.
        low, high: Its 95% interval; NaN where it is not known.
        place: "best" where it is best alone, "tie" where it is one of several, else "".
    """

    score: float
    low: Number
    high: Number
    place: str


@dataclass(frozen=True, kw_only=True)
class Behind:
    """By how much one model is behind the best.

    Attributes:
        value: The best model's score less this one's.
        low, high: The difference's interval; NaN where it is not known.
        paired: Whether problem by problem.
        tie: Whether the two are not told apart.
    """

    value: float
    low: Number
    high: Number
    paired: bool
    tie: bool


@dataclass(frozen=True, kw_only=True)
class StandingResult:
    """Models held against the best of them.

    Attributes:
        statement: The result in words.
        metric: What they are judged by; higher is better.
        level: Of the intervals, such as 0.95.
        scores: By the model's name, the highest first.
        behind_the_best: Of all but the best.
    """

    statement: str
    metric: str
    level: float
    scores: dict[str, Placed]
    behind_the_best: dict[str, Behind]
