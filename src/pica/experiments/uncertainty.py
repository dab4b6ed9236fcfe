"""How sure a score is, and which methods the test problems and seeds tell apart from the best one.

Methods are held against each other on the same problems and, where they share them, the same seeds: the difference of two
scores is drawn anew 5,000 times, from problems and seeds drawn with replacement (a paired bootstrap), and two methods are
told apart if 95% of the draws lie on one side of zero. Known corrections keep it from being too sure of little:

- One seed less than there are is drawn, which makes the variance of a mean over few seeds unbiased (Rao and Wu, 1988).
- Shares of right answers have two made-up problems beside the real ones, each solved by one of the two methods alone
  (Bonett and Price, 2012): without them four problems that only one method solves would count as a difference.
- Of means over the tokens of conversations, of which there may be few, the limits lie further out: by Student's t instead of
  the normal distribution, and by the factor that makes the variance over conversations unbiased.

Where the outcome of each problem has not been kept, the two methods' own intervals are combined (Newcombe's method for
proportions); as that ignores that both met the same problems, it tells fewer apart.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import stdtrit

from pica.experiments.outcomes import POOLED, Outcomes, resampled, scores_of
from pica.experiments.results.standing import Behind, Placed, StandingResult
from pica.tasks.base import ANSWER_METRICS
from pica.text import counted, in_words

LEVEL = 0.95  # of every interval here

SHARES = (*ANSWER_METRICS, "f1", "token_accuracy", "chosen_likelier")
"""Metrics that are shown in percent."""

_Z = 1.959963984540054  # the normal quantile of LEVEL
_FEW = 10  # right or wrong answers; with fewer, a score ± its standard error would reach beyond what is possible
_ROUNDING = 1e-9


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's interval of a share of `count`: never empty, never below 0 or above 1; `count` need not be whole."""
    middle = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def score_interval(
    metric: str, score: float, stderr: float, examples: int, deviation: float | None = None, seeds: int = 1
) -> tuple[float, float]:
    """The 95% interval of a score, of test problems and, where there are several, of seeds.

    Args:
        metric: Its name.
        score: Mean over seeds.
        stderr: Standard error over the test problems, of one seed.
        examples: Number of test problems.
        deviation: Standard deviation over seeds; None for one seed.
        seeds: How many.

    Returns:
        Two numbers that are no numbers if the score or its standard error is none.
    """
    if not (math.isfinite(score) and (math.isfinite(stderr) or (metric in ANSWER_METRICS and examples > 0))):
        return math.nan, math.nan
    if metric in ANSWER_METRICS and examples > 0 and 0 <= score <= 1:
        # Of several data sets the standard error is not that of one share; a count that has it serves as well.
        spread = score * (1 - score)
        counts = spread / stderr**2 if stderr > 0 and spread > 0 else examples
        low, high = wilson(score, max(1.0, min(counts, examples)))
    else:
        low, high = score - _Z * stderr, score + _Z * stderr
    of_seeds = _Z * (deviation or 0.0) / math.sqrt(seeds)
    low, high = score - math.hypot(score - low, of_seeds), score + math.hypot(high - score, of_seeds)
    least = {**dict.fromkeys(ANSWER_METRICS, 0.0), "f1": 0.0, "matthews": -1.0, "pearson": -1.0, "spearman": -1.0}.get(
        metric, -math.inf
    )
    return max(least, low), min(1.0 if least > -math.inf else math.inf, high)


def near_the_end(metric: str, score: float, examples: int | None) -> bool:
    """Whether so few answers are right, or wrong, that a standard error says too little: Wilson's interval is shown then."""
    return metric in ANSWER_METRICS and bool(examples) and min(score, 1 - score) * (examples or 0) < _FEW


def shown(metric: str, score: float) -> str:
    """A score: shares in percent, others as they are."""
    return f"{score:.1%}" if metric in SHARES else f"{score:.4f}"


def shown_interval(metric: str, interval: tuple[float, float]) -> str:
    """An interval such as 83.9–87.2%."""
    low, high = interval
    return f"{100 * low:.1f}–{high:.1%}" if metric in SHARES else f"{low:.4f} to {high:.4f}"


@dataclass(frozen=True)
class Contender:
    """A method as it is held against the others.

    Attributes:
        label: Its name.
        score: Mean over seeds.
        interval: See `score_interval`.
        runs: Outcomes by seed; None where they were not kept.
    """

    label: str
    score: float
    interval: tuple[float, float]
    runs: Mapping[int, Outcomes | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """The best method's score less another's.

    Attributes:
        value: On the seeds that both have.
        low, high: Its 95% interval.
        paired: Whether problem by problem.
        seeds: How many both have, if paired.
    """

    value: float
    low: float
    high: float
    paired: bool
    seeds: int = 0

    @property
    def tie(self) -> bool:
        """Whether the two are not told apart."""
        return self.value <= 0 or not self.low > _ROUNDING  # also where the uncertainty is not known


@dataclass(frozen=True)
class Standing:
    """Who is best, and who is not told apart from it.

    Attributes:
        metric: Higher is better.
        best: The contender with the highest score.
        differences: The best's score less each other one's, by label.
        contenders: All, the highest score first.
    """

    metric: str
    best: Contender
    differences: Mapping[str, Difference]
    contenders: Sequence[Contender]

    @property
    def top(self) -> list[Contender]:
        """The best one and all that tie with it, the highest score first."""
        return [one for one in self.contenders if one is self.best or self.differences[one.label].tie]

    def place(self, label: str) -> str:
        """ "best" (alone), "tie" (one of several), or ""."""
        top = [one.label for one in self.top]
        return "" if label not in top else "best" if len(top) == 1 else "tie"

    def statement(self, what: str = "") -> str:
        """The result in one sentence, and how far it is to be trusted in another; `what` is compared, the metric if ""."""
        what = what or in_words(self.metric)
        names = [f"{one.label} ({shown(self.metric, one.score)})" for one in self.top]
        if len(self.contenders) == 1:
            return f"{what.capitalize()}: {names[0]}."
        if len(names) == 1:
            first = f"Highest {what}: {names[0]}, ahead of every other method."
        elif len(names) == len(self.contenders):
            first = f"Highest {what}: a tie of {'both' if len(names) == 2 else f'all {len(names)}'}: {listed(names)}."
        else:
            first = f"Highest {what}: a tie of {listed(names)}."
        return f"{first} {self.basis()}"

    def result(self) -> StandingResult:
        """As files have it."""
        scores = {
            one.label: Placed(
                score=one.score,
                low=one.interval[0],
                high=one.interval[1],
                place=self.place(one.label),
            )
            for one in self.contenders
        }
        behind = {
            label: Behind(value=one.value, low=one.low, high=one.high, paired=one.paired, tie=one.tie)
            for label, one in self.differences.items()
        }
        return StandingResult(
            statement=self.statement(), metric=self.metric, level=LEVEL, scores=scores, behind_the_best=behind
        )

    def basis(self) -> str:
        """What the statement rests on."""
        paired = [difference for difference in self.differences.values() if difference.paired]
        if not paired:
            return (
                "The outcome of each test problem was not kept, so this compares the methods' separate 95% intervals; a "
                "paired test may tell more of them apart."
            )
        problems = next(run.shape[1] for run in self.best.runs.values() if run is not None)
        what = "test conversation" if self.metric in POOLED else "test problem"
        fewest, most = min(one.seeds for one in paired), max(one.seeds for one in paired)
        seeds = "one seed" if most == 1 else f"{most} seeds" if fewest == most else f"{fewest} to {most} seeds"
        text = f"95% paired bootstrap, {counted(problems, what)}, {seeds}."
        if most == 1:
            text += " Another seed may order them otherwise."
        if len(paired) < len(self.differences):
            text += " Where outcomes were not kept: separate 95% intervals."
        return text


def finite(value: float) -> float | None:
    """A number as JSON has it: None for what is no number."""
    return value if math.isfinite(value) else None


def listed(names: Sequence[str]) -> str:
    """A, B and C; with semicolons where a name has a comma of its own."""
    between = "; " if any("," in name for name in names) else ", "
    return (f"{between.strip()} and " if between == "; " else " and ").join(
        filter(None, [between.join(names[:-1]), *names[-1:]])
    )


def standing(metric: str, contenders: Sequence[Contender]) -> Standing | None:
    """Hold the contenders against the best of them; None if there is none with a score."""
    usable = sorted((one for one in contenders if math.isfinite(one.score)), key=lambda one: -one.score)
    if not usable:
        return None
    best = usable[0]
    shapes = {run.shape for one in usable for run in one.runs.values() if run is not None}
    drawn = {shape: _Draws(shape, usable) for shape in shapes}
    differences = {}
    for other in usable[1:]:
        common = [
            seed for seed, run in best.runs.items() if run is not None and _shape(other.runs.get(seed)) == run.shape
        ]
        if common:
            runs = [(best.runs[seed], other.runs[seed]) for seed in common]
            differences[other.label] = drawn[_shape(runs[0][0]) or ()].difference(runs)
        else:
            differences[other.label] = _combined(best, other)
    return Standing(metric, best, differences, usable)


def loss_change(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> str:
    """Say how the loss changed on the same conversations.

    Args:
        before: Lines of a file of predictions on conversations.
        after: Those of another model, on the same conversations.
    Returns:
        A sentence with the difference and its 95% interval.
    """
    pairs = [(old, new) for old, new in zip(before, after) if None not in (old["loss"], new["loss"])]
    if not pairs:
        return "The held-out loss is no number on any conversation."
    runs = [_losses(side) for side in zip(*pairs)]
    change = _Draws(runs[0].shape, [Contender("", 0.0, (0.0, 0.0), {0: run}) for run in runs]).difference(
        [(runs[1], runs[0])]
    )
    changed = f"The held-out loss changes by {change.value:+.4f} nats a token"
    if len(pairs) == 1:
        return f"{changed} on one conversation; two or more are needed to say how sure that is."
    lower = sum(new["loss"] < old["loss"] for old, new in pairs)
    told = ", which may be chance" if change.low <= 0 <= change.high else ""
    return (
        f"{changed} (95%: {change.low:+.4f} to {change.high:+.4f}, paired bootstrap, {len(pairs):,} test conversations)"
        f"{told}; it is lower in {lower:,} of {len(pairs):,}."
    )


def _losses(rows: Sequence[Mapping[str, Any]]) -> Outcomes:
    summed, tokens = np.array([[row["loss"] * row["tokens"], row["tokens"]] for row in rows], dtype=float).T
    return Outcomes("token_loss", summed, tokens, (len(rows),))


def _shape(run: Outcomes | None) -> tuple[Any, ...] | None:
    return None if run is None else run.shape


def _combined(best: Contender, other: Contender) -> Difference:
    """From the two intervals: a limit of a difference lies as far from it as the root of the limits' squared distances."""
    value = best.score - other.score
    low = value - math.hypot(best.score - best.interval[0], other.interval[1] - other.score)
    high = value + math.hypot(best.interval[1] - best.score, other.score - other.interval[0])
    return Difference(value, low, high, paired=False)


class _Draws:
    """Scores of all models that were measured alike, on the same bootstrap samples of their problems."""

    def __init__(self, shape: Any, contenders: Sequence[Contender]) -> None:
        self._students = _students(shape[1]) if shape[0] in POOLED else None
        runs = [run for one in contenders for run in one.runs.values() if _shape(run) == shape]
        self._runs: dict[int, Outcomes] = {id(run): run for run in runs if run is not None}
        self._scores, self._favour = resampled(list(self._runs.values()), shape[2])
        self._places = {key: place for place, key in enumerate(self._runs)}

    def difference(self, pairs: Sequence[tuple[Outcomes | None, Outcomes | None]]) -> Difference:
        """Of two models, given for each seed."""
        first, second = ([self._places[id(run)] for run in side] for side in zip(*pairs))
        drawn = self._scores[first] - self._scores[second]  # (seeds, resamples)
        value = _mean_score([self._runs[id(one)] for one, _ in pairs]) - _mean_score(
            [self._runs[id(other)] for _, other in pairs]
        )
        seeds = len(pairs)
        if seeds > 1:
            generator = np.random.default_rng(1)
            which = generator.integers(0, seeds, (seeds - 1, drawn.shape[1]))
            drawn = np.take_along_axis(drawn, which, axis=0)
        low, high = map(float, np.quantile(drawn.mean(0) + self._favour, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
        if self._students is not None:
            low, high = value - self._students * (value - low), value + self._students * (high - value)
        return Difference(value, low, high, paired=True, seeds=seeds)


def _students(count: int) -> float:
    """How much further out limits lie than the draws of `count` conversations put them; of two or more."""
    return float(stdtrit(count - 1, (1 + LEVEL) / 2)) / _Z * math.sqrt(count / (count - 1)) if count > 1 else math.nan


def _mean_score(runs: Sequence[Outcomes]) -> float:
    return float(np.mean([scores_of(run, np.ones((1, len(run.predicted)), np.float32), run.groups)[0] for run in runs]))
