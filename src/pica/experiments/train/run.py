"""A whole run: measure the base model, train the adapter, measure again, and hold a baseline beside it.

Each phase's result is noted as soon as it is there, so that an interrupted run goes on where it stopped. In several
processes all of them train; the first one alone measures, writes and tells the others what was noted.
"""

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch

import pica
from pica.basis import process_count
from pica.errors import ConfigError, TrainingError
from pica.experiments import distributed
from pica.experiments.adapters import baseline_section, parameter_counts, title_of
from pica.experiments.data import Splits, load_splits, with_classes
from pica.experiments.interrupts import Interrupted
from pica.experiments.measuring import machine, versions
from pica.experiments.methods import changes_base
from pica.experiments.pipelines import make_pipeline
from pica.experiments.recipes.parsing import dump_recipe, load_recipe
from pica.experiments.recipes.recipe import AdapterSection, Recipe, with_absolute_paths
from pica.experiments.reporting import Reporter
from pica.experiments.results.documents import write_result
from pica.experiments.results.run import CURVE, METRICS, Attempt, Measurement, RunMetrics, SplitSizes
from pica.experiments.sharing import write_run_card
from pica.experiments.standings import prediction_files, predictions_file, run_standing
from pica.experiments.train.calibrating import bring_basis
from pica.experiments.train.origins import changes, origin
from pica.experiments.train.phases import Phases
from pica.experiments.train.progress import points_of
from pica.experiments.train.search import Search
from pica.experiments.train.setting import CHECKPOINTS, Setting, attempt_name, pictures_of, refit_name
from pica.experiments.train.trainers import check_optimizer
from pica.experiments.train.training import curve_columns, last_checkpoint
from pica.experiments.watching import check_reports
from pica.files import output as files
from pica.files.place import Place
from pica.foreign_code import FLAG
from pica.tasks import get_task

LEFT_OUT = "left-out.jsonl"
"""File in the output folder that lists the problems that are not used: where each stands, and why."""
# among the phases: in what kind of job they were done, and what the run began with
_LAUNCH, _ORIGIN = "launch", "origin"


@dataclass(frozen=True)
class RunResult:
    """What a finished run left behind.

    Attributes:
        output: Its folder.
        metrics: What it measured. In several processes, only the first knows the standing.
    """

    output: Path
    metrics: RunMetrics


def default_output(recipe: Recipe) -> Path:
    """The recipe's output folder, or one named after it in the current folder."""
    return Path(recipe.output).expanduser() if recipe.output else Path(f"pica-{recipe.name}")


def start(recipe: Recipe, *, reporter: Reporter, overwrite: bool = False, splits: Splits | None = None) -> RunResult:
    """Run a checked recipe from its beginning; `splits` are its examples, where they have been read already.

    Returns:
        The folder and what was measured.
    Raises:
        PicaError: Something in the user's hands is wrong; if found before training, no folder has been made.
        Interrupted: The user stopped the run; `resume` goes on with it.
    """
    distributed.join()
    folder = default_output(recipe)
    with _claimed(folder):
        place = distributed.after_first(lambda: Place(folder, METRICS))
        if distributed.leads():
            files.check_free(folder, overwrite=overwrite)
            place.check(overwrite=overwrite)
        distributed.wait()
        return _guarded(_Run(with_absolute_paths(recipe), place, reporter, resuming=False, splits=splits))


def resume(folder: Path, *, reporter: Reporter, trust_remote_code: bool = False) -> RunResult:
    """Go on with an interrupted run, with the recipe that it was started with.

    `trust_remote_code` has to be given again for a run that was started with it: the folder may be somebody else's.

    Returns:
        As `start`.
    Raises:
        ConfigError: The folder holds no run, or a finished one, or its checkpoint is of another kind of job, or data, model
            or settings are no longer those that it began with, or its model's code was trusted then and is not now.
        PicaError: As `start`.
        Interrupted: As `start`.
    """
    distributed.join()
    with _claimed(folder):
        place = distributed.after_first(lambda: Place(folder, METRICS))
        if place.complete:
            raise ConfigError(
                f"The run in {str(folder)!r} is finished; start another one with --output or --overwrite."
            )
        if not (place.folder / files.RESOLVED).is_file():
            raise ConfigError(f"{str(folder)!r} holds no {files.RESOLVED}, so there is no run to resume.")
        recipe = load_recipe(str(place.folder / files.RESOLVED))
        if recipe.model.trust_remote_code and not trust_remote_code:
            raise ConfigError(
                f"The run in {str(folder)!r} was started with {FLAG}, for Python code that comes with "
                f"{recipe.model.path!r}; if you trust its authors, give {FLAG} with --resume again."
            )
        run = _Run(recipe, place, reporter, resuming=True)
        if _LAUNCH in run.phases and any(run.checkpoints.glob("*/checkpoint-*")):
            distributed.check_same_kind(run.phases.read(_LAUNCH, dict[str, Any]))
        return _guarded(run)


def _claimed(folder: Path) -> contextlib.AbstractContextManager[None]:
    """The first process's claim to the output folder counts for all of the job."""
    return files.claimed(folder) if distributed.leads() else contextlib.nullcontext()


def _guarded(run: "_Run") -> RunResult:
    try:
        return run.execute()
    except (KeyboardInterrupt, Interrupted):
        checkpoints = [last_checkpoint(folder) for folder in (run.folder / CHECKPOINTS).glob("*")]
        latest = max((path for path in checkpoints if path), key=lambda path: path.stat().st_mtime, default=None)
        begun = (run.folder / files.RESOLVED).is_file() and run.begun
        raise Interrupted(
            checkpoint=latest,
            folder=run.place.target if begun else None,
            trusted=run.recipe.model.trust_remote_code,
        ) from None


class _Run:
    """One recipe on its way."""

    def __init__(
        self, recipe: Recipe, place: Place, reporter: Reporter, *, resuming: bool, splits: Splits | None = None
    ) -> None:
        self.recipe, self.place, self.folder, self.reporter = recipe, place, place.folder, reporter
        self.task = get_task(recipe.task.name)
        self.checkpoints = self.folder / CHECKPOINTS
        self.phases = Phases(self.checkpoints / "phases.json", read=resuming)
        self.begun = resuming
        self._read_before = splits

    def execute(self) -> RunResult:
        """Do every phase that is not done yet, and write the results."""
        check_optimizer(self.recipe.trainer.optimizer)
        check_reports(self.recipe.trainer.report_to)
        if self.recipe.trainer.threads is not None:
            torch.set_num_threads(self.recipe.trainer.threads)
        self.splits = self._read_before or load_splits(self.recipe, self.task, bar=self.reporter.bar)
        self._check_origin()
        recipe = self.recipe = with_classes(self.recipe, self.splits)
        pipeline = make_pipeline(recipe)
        rows = pipeline.encode(self.splits.train)
        setting = Setting(
            recipe, self.folder, self.reporter, self.phases, self.splits, pipeline, rows, self.place.target
        )
        self.reporter.say(self._described())
        for line in (about := pipeline.describe(self.splits.train)):
            self.reporter.say(line)
        # The adapter is put on before anything is measured: a wrong target must show now, not after minutes.
        model = None if "adapter" in self.phases else setting.adapted(recipe.adapter)
        if model is not None:
            for line in _parameters(model, recipe.adapter):
                self.reporter.say(line)
        self._begin()
        bring_basis(model, self.folder)
        distributed.wait()
        setting.log.show()
        pipeline.prepare(model, self.folder, self.reporter)

        base = self._base(setting, model) if recipe.evaluate_base else None
        rates = recipe.trainer.learning_rates or [recipe.trainer.learning_rate]
        adapter = Search(setting, "adapter", recipe.adapter).fit(rates, model)
        model = baseline = None  # the baseline loads its own copy, and two would not fit everywhere
        if recipe.baseline.method is not None:
            section = baseline_section(recipe.baseline, recipe.adapter)
            baseline = Search(setting, "baseline", section).fit(recipe.baseline.learning_rates, None)
        metrics = RunMetrics(
            name=recipe.name,
            seed=recipe.trainer.seed,
            model=recipe.model.path,
            task=recipe.task.name,
            problems=SplitSizes(**{name: len(examples) for name, examples in self._examples().items()}),
            versions=versions(),
            machine=machine(),
            processes=process_count(),
            base=base,
            adapter=adapter,
            baseline=baseline,
        )
        if distributed.leads():
            metrics = self._complete(setting, metrics, about)
        return RunResult(self.place.target, metrics)

    def _examples(self) -> dict[str, Sequence[Any]]:
        return {name: getattr(self.splits, name) for name in ("train", "validation", "test")}

    def _described(self) -> str:
        counts = {name: len(examples) for name, examples in self._examples().items()}
        listed = f"; {len(self.splits.left_out)} left out, listed in {LEFT_OUT}" if self.splits.left_out else ""
        return "Problems: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count) + listed

    def _begin(self) -> None:
        """Make the folder, or see that the run goes on with what it began with."""
        if not self.begun:
            if distributed.leads():
                files.create(self.folder, dump_recipe(self.recipe))
                if left_out := [dataclasses.asdict(each) for each in self.splits.left_out]:
                    files.write_jsonl(self.folder / LEFT_OUT, left_out)
            self.begun = True
            self.phases.done(_LAUNCH, distributed.kind, dict[str, Any])
        if _ORIGIN not in self.phases:
            self.phases.done(_ORIGIN, self._origin, dict[str, Any])
        elif not Path(self.recipe.model.path).exists():  # on the hub, where loading has brought what is there now
            self._check_origin()

    def _origin(self) -> dict[str, Any]:
        return origin(self.recipe, self._examples())

    def _check_origin(self) -> None:
        """Raise `ConfigError`, in all processes, if this run began with other data, another model or other settings."""
        if _ORIGIN not in self.phases:
            return
        before = self.phases.read(_ORIGIN, dict[str, Any])
        if found := distributed.in_first(lambda: changes(before, self._origin())):
            raise ConfigError(
                f"The run in {str(self.place.target)!r} cannot go on, since this has changed: {'; '.join(found)}. Put it "
                "back as it was, or begin anew with --overwrite or another --output."
            )

    def _base(self, setting: Setting, model: peft.PeftModel | None) -> Measurement:
        """Measure the model without an adapter; `model` carries one that can be turned off, if there is a model yet."""
        if "base" in self.phases:
            return self.phases.read("base", Measurement)
        return self.phases.done("base", lambda: self._measure_base(setting, model), Measurement)

    def _measure_base(self, setting: Setting, model: peft.PeftModel | None) -> Measurement:
        chosen = setting.pipeline.load_base() if model is None or changes_base(self.recipe.adapter) else model
        without = chosen.disable_adapter() if chosen is model else contextlib.nullcontext()  # pyright: ignore[reportCallIssue]
        with without:
            found = setting.evaluate(chosen, "Base model: answering")
        if not math.isfinite(found.loss):
            raise TrainingError(
                f"The base model's loss on the test problems is {found.loss}, so there is nothing to train; check its "
                "weights and model.dtype."
            )
        setting.report("Base model", found, predictions_file("base"))
        return found.measurement()

    def _complete(self, setting: Setting, metrics: RunMetrics, about: Sequence[str]) -> RunMetrics:
        """Write what is made of all phases; `metrics` and what comes to it at the end."""
        self._write_curves(metrics)
        titles = {pictures_of(file): title for file, title in _titles(metrics)}
        missing = setting.pipeline.finish(self.folder, self.splits.train, titles)
        for score, reason in missing.items():
            self.reporter.say(f"{score}: not measured: {reason}")
        found = run_standing(self.folder, metrics)
        metrics = dataclasses.replace(
            metrics, not_measured=dict(missing), standing=found.result() if found is not None else None
        )
        write_run_card(self.folder / "adapter", self.recipe, metrics, about)
        write_result(self.folder / METRICS, metrics)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        self.place.done()
        return metrics

    def _write_curves(self, metrics: RunMetrics) -> None:
        """All loss curves in one table; metrics.json has their first and last points."""
        rows = []
        for name, trained in metrics.trained.items():
            keys = [attempt_name(name, one.learning_rate) for one in trained.candidates]
            for key in dict.fromkeys([*keys, refit_name(name)] if trained.refit else keys):
                attempt = self.phases.read(key, Attempt)
                rows += points_of(key, trained.method, attempt.result.learning_rate, attempt.curve)
        files.write_csv(self.folder / CURVE, rows, curve_columns(rows))


def _parameters(model: peft.PeftModel, section: AdapterSection) -> Iterator[str]:
    """What is trained, in lines."""
    if section.method in ("pica", "svft"):
        yield str(pica.coverage(model))
    count = parameter_counts(model)
    head = f", {count.head:,} of them in the new head" if count.head else ""
    yield (
        f"Trainable parameters ({title_of(section)}): {count.trainable:,} "
        f"of {count.total:,} ({count.trainable / count.total:.3%}){head}"
    )


def _titles(metrics: RunMetrics) -> Iterator[tuple[str, str]]:
    """The predictions file of each model, and what it is called."""
    for kind, file in prediction_files(metrics).items():
        yield file, metrics.trained[kind].title if kind in metrics.trained else "before"
