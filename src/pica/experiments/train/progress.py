"""What a run has to show while it goes on: the points of its curves, and its samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pica.experiments import distributed
from pica.experiments.adapters import baseline_section, title_of
from pica.experiments.recipes.recipe import Recipe
from pica.experiments.reporting import Reporter
from pica.experiments.results.run import Attempt
from pica.experiments.train.training import curve_of
from pica.experiments.watching import Samples
from pica.files.output import write_jsonl
from pica.text import shortened

SAMPLES = "samples.jsonl"
"""File in the output folder with the answers that were given as training went on."""


@dataclass(frozen=True)
class Progress:
    """A run so far.

    Attributes:
        folder: The run's, which may have another name until the run is complete.
        recipe: All settings.
        titles: What the trained methods are called, "adapter" and "baseline".
        curve: The points of loss_curve.csv.
        samples: The lines of samples.jsonl.
    """

    folder: Path
    recipe: Recipe
    titles: Mapping[str, str]
    curve: Sequence[Mapping[str, Any]]
    samples: Samples


@runtime_checkable
class Follower(Reporter, Protocol):
    """A reporter that wants to know more than notes and bars."""

    def progressed(self, progress: Progress) -> None:
        """There is something new: at first a folder, then points and samples."""
        ...


class RunLog:
    """Keeps what there is to show, writes the samples, and tells a reporter that follows."""

    def __init__(self, folder: Path, recipe: Recipe, attempts: Mapping[str, Attempt], reporter: Reporter) -> None:
        """`attempts` are the trainings before a resume, by the names of their phases."""
        self._folder, self._recipe, self._reporter = folder, recipe, reporter
        self._follower = reporter if isinstance(reporter, Follower) and distributed.leads() else None
        self._sections = {"adapter": recipe.adapter}
        if recipe.baseline.method is not None:
            self._sections["baseline"] = baseline_section(recipe.baseline, recipe.adapter)
        self._samples: dict[str, Samples] = {name: one.samples for name, one in attempts.items() if one.samples}
        self._curves = {name: self._points(name, one.result.learning_rate, one.curve) for name, one in attempts.items()}

    def logged(self, key: str, rate: float, history: list[dict[str, Any]]) -> None:
        """The training `key` has new points in its trainer's log."""
        if self._follower is not None:  # the whole log is gone through, and nobody else looks at what is made of it
            self._curves[key] = self._points(key, rate, curve_of(history))
            self.show()

    def sampled(self, key: str, rows: Samples, new: Samples) -> None:
        """Write the samples of all trainings so far, in their order, and show those of `key` that are new."""
        self._samples[key] = rows
        write_jsonl(self._folder / SAMPLES, self._listed())
        for row in new:
            prompt, answer = (shortened(row[name], 60) for name in ("prompt", "answer"))
            self._reporter.say(f"  step {row['step']}: {prompt} -> {answer}")
        self.show()

    def show(self) -> None:
        """Tell the first process's reporter, if it follows."""
        if self._follower is None:
            return
        titles = {name: title_of(section) for name, section in self._sections.items()}
        curve = [point for points in self._curves.values() for point in points]
        self._follower.progressed(Progress(self._folder, self._recipe, titles, curve, self._listed()))

    def _points(self, key: str, rate: float, curve: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return points_of(key, self._sections[key.partition("-")[0]].method, rate, curve)

    def _listed(self) -> Samples:
        return [{"run": name, **row} for name, of_run in self._samples.items() for row in of_run]


def points_of(key: str, method: str, rate: float, curve: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The points of the training `key` as loss_curve.csv has them: with its run, its method and its highest rate."""
    peak = {"run": key.partition("-lr")[0], "method": method, "peak_rate": rate}
    return [{**peak, **point} for point in curve]
