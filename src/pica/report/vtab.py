"""VTAB-1K's scores of several runs or comparisons, one line a method, with the means of its groups."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pica.errors import ConfigError
from pica.experiments.methods import METHODS
from pica.experiments.outcomes import Outcomes
from pica.experiments.results.comparison import COMPARISON, KeptOutcomes
from pica.experiments.results.documents import read_result
from pica.experiments.results.run import METRICS, RunMetrics, Trained
from pica.experiments.standings import read_outcomes
from pica.experiments.uncertainty import Contender, Standing, score_interval, standing
from pica.files import output as files
from pica.files.documents import read_yaml
from pica.report.summary import Stat, summarise
from pica.tasks.vtab import GROUPS, VtabTask, group_means


@dataclass
class VtabMethod:
    """One method's top-1 accuracy on the sets that are there.

    Attributes:
        label: A comparison's label, or a run's method and rank.
        family: Methods of one family share a colour; "" if it is not known.
        parameters: Trained ones of the method, without the head; None if they are not known, or not the same on all sets.
        stats: Accuracy by set, over the seeds of a comparison.
        contenders: The same as it is held against other methods.
    """

    label: str
    family: str = ""
    parameters: int | None = None
    stats: dict[str, Stat] = field(default_factory=dict)
    contenders: dict[str, Contender] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, float]:
        """Accuracy by set; the mean over seeds in a comparison."""
        return {name: stat.mean for name, stat in self.stats.items()}

    @property
    def means(self) -> dict[str, float | None]:
        """See `pica.tasks.vtab.group_means`."""
        return group_means(self.scores)

    def reaches(self) -> dict[str, tuple[float, float]]:
        """How far the 95% interval of each of `means` that is there reaches below and above it."""
        groups = {
            group: _of_mean([self._reach(name) for name in sets])
            for group, sets in GROUPS.items()
            if self.means[group] is not None
        }
        if self.means["all sets"] is None:
            return groups
        everything = _of_mean([self._reach(name) for name in VtabTask.subsets])
        return {**groups, "all sets": everything, "all groups": _of_mean(list(groups.values()))}

    def _reach(self, name: str) -> tuple[float, float]:
        one = self.contenders[name]
        return one.score - one.interval[0], one.interval[1] - one.score

    def overall(self) -> Contender | None:
        """The mean over all nineteen sets, as it is held against other methods; None if one is missing."""
        if not self.contenders.keys() >= set(VtabTask.subsets):
            return None
        sets = [self.contenders[name] for name in VtabTask.subsets]
        score = sum(one.score for one in sets) / len(sets)
        low, high = _of_mean([self._reach(name) for name in VtabTask.subsets])
        seeds = set.intersection(*(set(one.runs) for one in sets))
        runs = {seed: Outcomes.joined([one.runs[seed] for one in sets]) for seed in sorted(seeds)}
        return Contender(self.label, score, (score - low, score + high), runs)


def _of_mean(reaches: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """How far the interval of a mean reaches, from those of its independent terms."""
    low, high = (math.hypot(*side) / len(reaches) for side in zip(*reaches))
    return low, high


def read_vtab(folders: Sequence[Path]) -> list[VtabMethod]:
    """Collect the scores of output folders of `pica train` and `pica compare`, each of one set.

    Returns:
        A method each, in the order in which they come up.
    Raises:
        ConfigError: A folder is neither, is unfinished, is of another task, or a method has a set twice.
    """
    methods: dict[str, VtabMethod] = {}
    origin: dict[tuple[str, str], Path] = {}
    for folder in folders:
        name, found = _comparison(folder) if (folder / COMPARISON).is_file() else _run(folder)
        for method in found:
            label = method.label
            if (label, name) in origin:
                raise ConfigError(
                    f"{str(origin[label, name])!r} and {str(folder)!r} both have {label} on {name}; leave one out."
                )
            origin[label, name] = folder
            kept = methods.setdefault(label, method)
            kept.stats |= method.stats
            kept.contenders |= method.contenders
            kept.parameters = kept.parameters if kept.parameters == method.parameters else None
    return list(methods.values())


def overall_standing(methods: Sequence[VtabMethod]) -> Standing | None:
    """Who is best by the mean over all nineteen sets, of the methods that have all."""
    return standing("accuracy", [one for method in methods if (one := method.overall()) is not None])


WHAT = "mean of all nineteen sets"
"""What `overall_standing` compares."""


def write_vtab(methods: Sequence[VtabMethod], path: Path) -> None:
    """Write one row a method with every set and every mean; what is not there is empty.

    Raises:
        OutputError: The file can't be written.
    """
    files.write_csv(path, flat_vtab(methods), columns_of(methods))


def flat_vtab(methods: Sequence[VtabMethod]) -> list[dict[str, object]]:
    """One row a method: its name, its score on each set that is there, and every mean."""
    return [{"method": method.label, **method.scores, **method.means} for method in methods]


def columns_of(methods: Sequence[VtabMethod]) -> list[str]:
    """The columns of `flat_vtab`, in their order."""
    return ["method", *VtabTask.subsets, *methods[0].means]


def _comparison(folder: Path) -> tuple[str, list[VtabMethod]]:
    summary = summarise(folder)
    base = summary.content.get("base") or {}
    name = _set_of(folder, base.get("task") or {})
    done = [row for row in summary.rows if row.done]
    return name, [
        VtabMethod(row.label, row.family, row.parameters, {name: row.score}, {name: row.contender("accuracy")})
        for row in done
    ]


def _run(folder: Path) -> tuple[str, list[VtabMethod]]:
    try:
        recipe = read_yaml(folder / files.RESOLVED)
        metrics = read_result(RunMetrics, folder / METRICS)
        name = _set_of(folder, recipe["task"])
        kept = read_outcomes(folder, metrics)
        return name, [_of_result(name, result, kept.get(kind)) for kind, result in metrics.trained.items()]
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name
        raise ConfigError(f"{str(folder)!r} holds no {missing}: it is no finished run or comparison.") from None
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"A file in {str(folder)!r} is damaged ({type(error).__name__}: {error}).") from None


def _of_result(name: str, result: Trained, kept: KeptOutcomes | None) -> VtabMethod:
    method = METHODS.get(result.method)
    trained = result.parameters.trainable - result.parameters.head
    score = result.scores["accuracy"]
    interval = score_interval("accuracy", score, result.stderr, result.examples)
    held = Contender(result.title, score, interval, {0: Outcomes.read("accuracy", kept)})
    return VtabMethod(result.title, method.family if method else "", trained, {name: Stat.of([score])}, {name: held})


def _set_of(folder: Path, task: dict[str, object]) -> str:
    if task.get("name") != VtabTask.name:
        raise ConfigError(f"{str(folder)!r} is of task {task.get('name')}, not vtab.")
    return str(task.get("subset"))
