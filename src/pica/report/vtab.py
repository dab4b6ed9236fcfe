"""VTAB-1K's scores of several runs or comparisons, one line a method, with the means of its groups."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from pica.errors import ConfigError
from pica.experiments import output as files
from pica.report.summary import COMPARISON, summarise
from pica.tasks.vtab import VtabTask, group_means


@dataclass
class VtabMethod:
    """One method's top-1 accuracy on the sets that are there.

    Attributes:
        label: A comparison's label, or a run's method and rank.
        scores: Accuracy by set; the mean over seeds in a comparison.
    """

    label: str
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def means(self) -> dict[str, float | None]:
        """See `pica.tasks.vtab.group_means`."""
        return group_means(self.scores)


def read_vtab(folders: Sequence[Path]) -> list[VtabMethod]:
    """Collect the scores of output folders of `pica train` and `pica compare`, each of one set.

    Raises:
        ConfigError: A folder is neither, is unfinished, is of another task, or a method has a set twice.
    """
    methods: dict[str, VtabMethod] = {}
    origin: dict[tuple[str, str], Path] = {}
    for folder in folders:
        name, found = _comparison(folder) if (folder / COMPARISON).is_file() else _run(folder)
        for label, score in found.items():
            if (label, name) in origin:
                raise ConfigError(
                    f"{str(origin[label, name])!r} and {str(folder)!r} both have {label} on {name}; leave one out."
                )
            origin[label, name] = folder
            methods.setdefault(label, VtabMethod(label)).scores[name] = score
    return list(methods.values())


def write_vtab(methods: Sequence[VtabMethod], path: Path) -> None:
    """Write one row a method with every set and every mean; what is not there is empty.

    Raises:
        OutputError: The file can't be written.
    """
    rows = [{"method": method.label, **method.scores, **method.means} for method in methods]
    files.write_csv(path, rows, ("method", *VtabTask.subsets, *methods[0].means))


def _comparison(folder: Path) -> tuple[str, dict[str, float]]:
    summary = summarise(folder)
    base = summary.content.get("base") or {}
    name = _set_of(folder, base.get("task") or {})
    return name, {row.label: row.score.mean for row in summary.rows if row.done}


def _run(folder: Path) -> tuple[str, dict[str, float]]:
    try:
        recipe = yaml.safe_load((folder / files.RESOLVED).read_text(encoding="utf-8"))
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        results = [metrics[kind] for kind in ("adapter", "baseline") if kind in metrics]
        found = {result["title"]: float(result["accuracy"]) for result in results}
        task = recipe["task"]
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name
        raise ConfigError(f"{str(folder)!r} holds no {missing}: it is no finished run or comparison.") from None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"A file in {str(folder)!r} is damaged ({type(error).__name__}: {error}).") from None
    return _set_of(folder, task), found


def _set_of(folder: Path, task: dict[str, object]) -> str:
    if task.get("name") != VtabTask.name:
        raise ConfigError(f"{str(folder)!r} is of task {task.get('name')}, not vtab.")
    return str(task.get("subset"))
