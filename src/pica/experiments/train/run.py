"""A whole run: measure the base model, train the adapter, measure again, and hold a baseline beside it.

Each phase's result is noted as soon as it is there, so that an interrupted run goes on where it stopped. In several
processes all of them train; the first one alone measures, writes and tells the others what was noted.
"""

import contextlib
import dataclasses
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch

import pica
from pica.basis import alone, process_count
from pica.errors import ConfigError, TrainingError
from pica.experiments import distributed
from pica.experiments.adapters import baseline_section, parameter_counts, size_of, title_of
from pica.experiments.data import load_splits, with_classes
from pica.experiments.evaluate.evaluation import Evaluation, shown_score
from pica.experiments.interrupts import Interrupted
from pica.experiments.measuring import machine, versions
from pica.experiments.methods import changes_base
from pica.experiments.models import device
from pica.experiments.pipelines import AnsweringPipeline, PicturePipeline, make_pipeline
from pica.experiments.recipes.parsing import dump_recipe, load_recipe
from pica.experiments.recipes.recipe import AdapterSection, Recipe, with_absolute_paths
from pica.experiments.reporting import Reporter
from pica.experiments.sharing import write_run_card
from pica.experiments.standings import prediction_files, predictions_file, run_standing
from pica.experiments.train.origins import changes, origin
from pica.experiments.train.phases import Phases
from pica.experiments.train.trainers import check_optimizer
from pica.experiments.train.training import Training, last_checkpoint, train
from pica.experiments.watching import Samples, Watch, check_reports
from pica.files import output as files
from pica.files.place import Place
from pica.foreign_code import FLAG
from pica.tasks import get_task
from pica.text import shortened

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Folder inside the output folder that holds what an unfinished run needs to go on."""
LOGS = "logs"
"""Folder inside the output folder for what `trainer.report_to` writes."""
SAMPLES = "samples.jsonl"
"""File in the output folder with the answers that were given as training went on."""
LEFT_OUT = "left-out.jsonl"
"""File in the output folder that lists the problems that are not used: where each stands, and why."""
# among the phases: in what kind of job they were done, and what the run began with
_LAUNCH, _ORIGIN = "launch", "origin"
_FINISHED = "metrics.json"


@dataclass(frozen=True)
class RunResult:
    """What a finished run left behind.

    Attributes:
        output: Its folder.
        metrics: The content of metrics.json.
    """

    output: Path
    metrics: dict[str, Any]


def default_output(recipe: Recipe) -> Path:
    """The recipe's output folder, or one named after it in the current folder."""
    return Path(recipe.output).expanduser() if recipe.output else Path(f"pica-{recipe.name}")


def start(recipe: Recipe, *, reporter: Reporter, overwrite: bool = False) -> RunResult:
    """Run a checked recipe from its beginning.

    Raises:
        PicaError: Something in the user's hands is wrong; if found before training, no folder has been made.
        Interrupted: The user stopped the run; `resume` goes on with it.
    """
    distributed.join()
    folder = default_output(recipe)
    with _claimed(folder):
        place = distributed.after_first(lambda: Place(folder, _FINISHED))
        if distributed.leads():
            files.check_free(folder, overwrite=overwrite)
            place.check(overwrite=overwrite)
        distributed.wait()
        return _guarded(_Run(with_absolute_paths(recipe), place, reporter, resuming=False))


def resume(folder: Path, *, reporter: Reporter, trust_remote_code: bool = False) -> RunResult:
    """Go on with an interrupted run, with the recipe that it was started with.

    `trust_remote_code` has to be given again for a run that was started with it: the folder may be somebody else's.

    Raises:
        ConfigError: The folder holds no run, or a finished one, or its checkpoint is of another kind of job, or data, model
            or settings are no longer those that it began with, or its model's code was trusted then and is not now.
        PicaError, Interrupted: As `start`.
    """
    distributed.join()
    with _claimed(folder):
        place = distributed.after_first(lambda: Place(folder, _FINISHED))
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
            distributed.check_same_kind(run.phases[_LAUNCH])
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


def preference(candidate: Mapping[str, Any]) -> tuple[float, float]:
    """Orders trained candidates, the best first: by validation score where the task has a cheap one, else by loss.

    A value that is no number (None, once it is noted) comes last: compared as it is, it would win or lose by its place in
    the list.
    """
    score, loss = candidate["validation_score"], candidate["validation_loss"]
    return -score if _is_number(score) else math.inf, loss if _is_number(loss) else math.inf


def _is_number(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _phase(name: str, rate: float) -> str:
    """Of training with one rate: no two rates have the same, also where six digits do not tell them apart."""
    short = f"{rate:g}"
    return f"{name}-lr{short if float(short) == rate else repr(rate)}"


class _Run:
    """One recipe on its way."""

    def __init__(self, recipe: Recipe, place: Place, reporter: Reporter, *, resuming: bool) -> None:
        self.recipe, self.place, self.folder, self.reporter = recipe, place, place.folder, reporter
        self.task = get_task(recipe.task.name)
        self.checkpoints = self.folder / CHECKPOINTS
        self.phases = Phases(self.checkpoints / "phases.json", read=resuming)
        self.begun = resuming
        self._samples: dict[str, Samples] = {
            name: noted["training"]["samples"]
            for name, noted in self.phases.items()
            if name not in ("adapter", "baseline") and noted.get("training", {}).get("samples")
        }

    def execute(self) -> RunResult:
        """Do every phase that is not done yet, and write the results."""
        check_optimizer(self.recipe.trainer.optimizer)
        check_reports(self.recipe.trainer.report_to)
        if self.recipe.trainer.threads is not None:
            torch.set_num_threads(self.recipe.trainer.threads)
        self.splits = load_splits(self.recipe, self.task, bar=self.reporter.bar)
        self._check_origin()
        recipe = self.recipe = with_classes(self.recipe, self.splits)
        self.pipeline = make_pipeline(recipe)
        if isinstance(self.pipeline, PicturePipeline) and distributed.launched():
            raise ConfigError(f"Task {recipe.task.name} trains in one process; start it without a launcher.")
        self.rows = self.pipeline.encode(self.splits.train)
        counts = {name: len(getattr(self.splits, name)) for name in ("train", "validation", "test")}
        left_out = [dataclasses.asdict(each) for each in self.splits.left_out]
        listed = f"; {len(left_out)} left out, listed in {LEFT_OUT}" if left_out else ""
        self.reporter.say(
            "Problems: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count) + listed
        )
        for line in (about := self.pipeline.describe(self.splits.train)):
            self.reporter.say(line)
        # The adapter is put on before anything is measured: a wrong target must show now, not after minutes.
        model = None if "adapter" in self.phases else self._adapted(recipe.adapter)
        if model is not None:
            self._describe(model, recipe.adapter)
        if not self.begun:
            if distributed.leads():
                files.create(self.folder, dump_recipe(recipe))
                if left_out:
                    files.write_jsonl(self.folder / LEFT_OUT, left_out)
            self.begun = True
            self.phases.done(_LAUNCH, distributed.kind)
        if _ORIGIN not in self.phases:
            self.phases.done(_ORIGIN, self._origin)
        elif not Path(recipe.model.path).exists():  # on the hub, where loading has brought what is there now
            self._check_origin()
        distributed.wait()
        if isinstance(self.pipeline, PicturePipeline):
            self.pipeline.prepare(model, self.folder, self.reporter)

        metrics: dict[str, Any] = {
            "name": recipe.name,
            "seed": recipe.trainer.seed,
            "model": recipe.model.path,
            "task": recipe.task.name,
            "problems": counts,
            "versions": versions(),
            "machine": machine(),
            **({"processes": process_count()} if process_count() > 1 else {}),
        }
        if recipe.evaluate_base:
            metrics["base"] = self._base(model)
        rates = recipe.trainer.learning_rates or [recipe.trainer.learning_rate]
        metrics["adapter"] = self._fit("adapter", recipe.adapter, rates, model)
        model = None  # the baseline loads its own copy, and two would not fit everywhere
        if recipe.baseline.method is not None:
            section = baseline_section(recipe.baseline, recipe.adapter)
            metrics["baseline"] = self._fit("baseline", section, recipe.baseline.learning_rates, None)
        if distributed.leads():
            self._write_curves(metrics)
            if isinstance(self.pipeline, PicturePipeline):
                self._finish_pictures(self.pipeline, metrics)
            if found := run_standing(self.folder, metrics):
                metrics["standing"] = found.summary()
            write_run_card(self.folder / "adapter", recipe, metrics, about)
            files.write_json(self.folder / _FINISHED, metrics)
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            self.place.done()
        return RunResult(self.place.target, files.plain(metrics))

    def _origin(self) -> dict[str, Any]:
        return origin(self.recipe, {name: getattr(self.splits, name) for name in ("train", "validation", "test")})

    def _check_origin(self) -> None:
        """Raise `ConfigError`, in all processes, if this run began with other data, another model or other settings."""
        if _ORIGIN not in self.phases:
            return
        if found := distributed.in_first(lambda: changes(self.phases[_ORIGIN], self._origin())):
            raise ConfigError(
                f"The run in {str(self.place.target)!r} cannot go on, since this has changed: {'; '.join(found)}. Put it "
                "back as it was, or begin anew with --overwrite or another --output."
            )

    def _adapted(self, section: AdapterSection) -> peft.PeftModel:
        return self.pipeline.adapt(section, seed=self.recipe.trainer.seed)

    def _describe(self, model: peft.PeftModel, section: AdapterSection) -> None:
        if section.method in ("pica", "svft"):
            self.reporter.say(str(pica.coverage(model)))
        count = parameter_counts(model)
        head = f", {count['head']:,} of them in the new head" if count["head"] else ""
        self.reporter.say(
            f"Trainable parameters ({title_of(section)}): {count['trainable']:,} "
            f"of {count['total']:,} ({count['trainable'] / count['total']:.3%}){head}"
        )

    def _base(self, model: peft.PeftModel | None) -> dict[str, Any]:
        """Measure the model without an adapter; `model` carries one that can be turned off, if there is a model yet."""
        if "base" in self.phases:
            return self.phases["base"]
        return self.phases.done("base", lambda: self._measure_base(model))

    def _measure_base(self, model: peft.PeftModel | None) -> dict[str, Any]:
        chosen = self.pipeline.load_base() if model is None or changes_base(self.recipe.adapter) else model
        without = chosen.disable_adapter() if chosen is model else contextlib.nullcontext()  # pyright: ignore[reportCallIssue]
        with without:
            found = self._evaluate(chosen, "Base model: answering")
        if not math.isfinite(found.loss):
            raise TrainingError(
                f"The base model's loss on the test problems is {found.loss}, so there is nothing to train; check its "
                "weights and model.dtype."
            )
        self._report("Base model", found, predictions_file("base"))
        return found.summary()

    def _fit(
        self, name: str, section: AdapterSection, rates: Sequence[float], model: peft.PeftModel | None
    ) -> dict[str, Any]:
        """Train with each rate, keep the best on the validation problems, and measure it as read back from its file."""
        if name in self.phases:
            return self.phases[name]
        title = title_of(section)
        candidates = []
        for rate in rates:
            key = _phase(name, rate)
            if key not in self.phases:
                try:
                    everything = self.recipe.data.refit and len(rates) == 1  # nothing to choose: at once on all
                    label = f"{title}, rate {rate:g}"
                    self._try(key, section, rate, model or self._adapted(section), label, everything=everything)
                except TrainingError as error:
                    if len(rates) == 1:
                        raise
                    logger.warning("Learning rate %g is out: %s", rate, error)
                    failed = {"learning_rate": rate, "failed": str(error)}
                    self.phases.done(key, lambda: failed)  # noqa: B023 - called at once
                model = None
            candidates.append(self.phases[key])
        usable = [candidate for candidate in candidates if "failed" not in candidate]
        if not usable:
            raise TrainingError(f"None of the learning rates {list(rates)} trained; add lower ones.")
        best = min(usable, key=preference)
        if len(rates) > 1:
            quality = "lowest validation loss" if best["validation_score"] is None else "best validation score"
            self.reporter.say(f"{title}: learning rate {best['learning_rate']:g} has the {quality}")
        key = _phase(name, best["learning_rate"])
        final = best
        if self.recipe.data.refit and len(rates) > 1:
            key = f"{name}-refit"
            if key not in self.phases:
                label = f"{title}, rate {best['learning_rate']:g}, validation problems too"
                self._try(key, section, best["learning_rate"], self._adapted(section), label, everything=True)
            final = self.phases[key]
        return self.phases.done(name, lambda: self._measure(name, title, section, key, candidates, best, final))

    def _measure(
        self,
        name: str,
        title: str,
        section: AdapterSection,
        key: str,
        candidates: list[dict[str, Any]],
        best: dict[str, Any],
        final: dict[str, Any],
    ) -> dict[str, Any]:
        """Measure the adapter of `key` as read back from its file, and put it where it belongs."""
        written = self.checkpoints / key / "adapter"
        adapted = self._read(written)
        found = self._evaluate(adapted, f"{title}: answering")
        if not math.isfinite(found.loss):
            self._discard(key)
            raise TrainingError(
                f"{title}: the trained model's loss on the test problems is {found.loss}, so no adapter was written; lower "
                "the learning rate."
            )
        self._report(title, found, predictions_file(name, section.method))
        with files.atomic_folder(self.folder / name) as partial:
            shutil.copytree(written, partial, dirs_exist_ok=True)
            self.pipeline.accompany(partial)
        return {
            "method": section.method,
            "title": title,
            **size_of(section),
            **{key: best[key] for key in ("learning_rate", "parameters", "validation_loss", "validation_score")},
            **found.summary(),
            "training": final["training"],
            "file_bytes": (written / "adapter_model.safetensors").stat().st_size,
            "candidates": candidates,
            **({"refit": True} if final is not best else {}),
        }

    def _read(self, adapter: Path) -> peft.PeftModel:
        with alone():  # the other processes are waiting
            return self.pipeline.read(adapter)

    def _try(
        self,
        key: str,
        section: AdapterSection,
        rate: float,
        model: peft.PeftModel,
        label: str,
        *,
        everything: bool = False,
    ) -> None:
        """One full training; with `everything` on the validation problems too, which then measure nothing."""
        place = self.checkpoints / key
        whole = parameter_counts(model)
        training = train(
            model,
            self.pipeline,
            self.pipeline.encode([*self.splits.train, *self.splits.validation]) if everything else self.rows,
            self.recipe.trainer,
            learning_rate=rate,
            checkpoints=place,
            adapter=place / "adapter",
            reporter=self.reporter,
            label=label,
            watch=self._watch(key, everything=everything),
        )
        measures = self.splits.validation and not everything
        if training.best or training.stopped_early:
            self.reporter.say(f"{label}: {_ended(training)}")

        def result() -> dict[str, Any]:
            if training.best:  # it has been measured, and the model in memory has gone on since
                return {
                    "learning_rate": rate,
                    "validation_loss": training.best["validation_loss"],
                    "validation_score": training.best.get("validation_score"),
                    "parameters": parameter_counts(model),
                    "training": dataclasses.asdict(training),
                }
            trained = self._read(place / "adapter").to(device()) if measures and training.sharded else model
            found = self.pipeline.held_out(trained, self.splits.validation) if measures else None
            if found is not None and not math.isfinite(found.loss):
                shutil.rmtree(place / "adapter", ignore_errors=True)
                reason = f"its loss on the validation problems is {found.loss}; lower the learning rate."
                return {"learning_rate": rate, "failed": reason}
            return {
                "learning_rate": rate,
                "validation_loss": found.loss if found else None,
                "validation_score": found.score if found else None,
                "parameters": whole if training.sharded else parameter_counts(model),
                "training": dataclasses.asdict(training),
            }

        noted = self.phases.done(key, result)
        if "failed" in noted:
            raise TrainingError(f"{label}: {noted['failed']}")
        if distributed.leads():
            for left in (*place.glob("checkpoint-*"), *place.glob("best-*")):
                shutil.rmtree(left, ignore_errors=True)

    def _watch(self, key: str, *, everything: bool) -> Watch:
        """What is looked at while the training `key` goes on."""
        pipeline, section, validation = self.pipeline, self.recipe.trainer, self.splits.validation
        asked = validation or self.splits.test
        measures = section.eval_steps is not None and validation and not everything
        asks = section.sample_steps is not None and isinstance(pipeline, AnsweringPipeline)
        return Watch(
            measure=(lambda model: pipeline.held_out(model, validation)) if measures else None,
            sample=(lambda model: pipeline.samples(model, asked)) if asks else None,  # pyright: ignore[reportAttributeAccessIssue]
            sampled=(lambda rows, new: self._keep_samples(key, rows, new)) if asks else None,
            logs=self.folder / LOGS / key,
            name=f"{self.recipe.name}-{key}",
        )

    def _keep_samples(self, key: str, rows: Samples, new: Samples) -> None:
        """Write the samples of all trainings so far, in their order, and show the new ones."""
        self._samples[key] = rows
        listed = [{"run": name, **row} for name, of_run in self._samples.items() for row in of_run]
        files.write_jsonl(self.folder / SAMPLES, listed)
        for row in new:
            prompt, answer = (shortened(row[name], 60) for name in ("prompt", "answer"))
            self.reporter.say(f"  step {row['step']}: {prompt} -> {answer}")

    def _discard(self, key: str) -> None:
        """Forget a training whose adapter is of no use."""
        self.phases.forget(key)
        shutil.rmtree(self.checkpoints / key, ignore_errors=True)

    def _evaluate(self, model: Any, label: str) -> Evaluation:
        return self.pipeline.evaluate(model.to(device()), self.splits.test, reporter=self.reporter, label=label)

    def _report(self, title: str, found: Evaluation, file: str) -> None:
        files.write_jsonl(self.folder / file, found.rows())
        draws = isinstance(self.pipeline, PicturePipeline)
        score = shown_score(found.metric, found.score, found.stderr, found.examples)
        self.reporter.say(
            f"{title}: {found.metric} {score} on {found.examples} "
            f"{'pictures, denoising' if draws else 'test problems, held-out'} loss {found.loss:.4f}"
        )
        if found.pictures:
            from pica.experiments.pipelines.diffusion.drawing import write_picture

            for name, picture in found.pictures.items():
                write_picture(self.folder / _pictures_of(file) / name, picture)
        for name, group in found.groups.items():
            score = shown_score("accuracy", group["accuracy"], group["stderr"], int(group["examples"]))
            self.reporter.say(f"  {name}: {score}")

    def _finish_pictures(self, pipeline: PicturePipeline, metrics: dict[str, Any]) -> None:
        """Pictures side by side, and what was not measured."""
        titles = {
            _pictures_of(file): metrics[kind].get("title", "before") for kind, file in prediction_files(metrics).items()
        }
        pipeline.finish(self.folder, self.splits.train, titles)
        metrics["not_measured"] = dict(pipeline.missing_scores)
        for score, reason in pipeline.missing_scores.items():
            self.reporter.say(f"{score}: not measured: {reason}")

    def _write_curves(self, metrics: dict[str, Any]) -> None:
        """All loss curves in one table; metrics.json keeps their first and last points."""
        rows = []
        for name in ("adapter", "baseline"):
            for candidate in metrics.get(name, {}).get("candidates", []):
                if "failed" in candidate:
                    continue
                curve = _without_curve(candidate["training"])
                peak = {"run": name, "method": metrics[name]["method"], "peak_rate": candidate["learning_rate"]}
                rows += [peak | point for point in curve]
            if metrics.get(name, {}).get("refit"):
                curve = _without_curve(metrics[name]["training"])
                refit = {"run": f"{name}-refit", "method": metrics[name]["method"]}
                refit["peak_rate"] = metrics[name]["learning_rate"]
                rows += [refit | point for point in curve]
            elif name in metrics:
                chosen = metrics[name]["learning_rate"]
                same = (c for c in metrics[name]["candidates"] if c["learning_rate"] == chosen)
                metrics[name]["training"] = next(same)["training"]
        columns = (
            "run",
            "method",
            "peak_rate",
            "step",
            "epoch",
            "loss",
            "learning_rate",
            "grad_norm",
            "validation_loss",
        )
        files.write_csv(self.folder / "loss_curve.csv", rows, columns)


def _without_curve(training: dict[str, Any]) -> list[dict[str, Any]]:
    """The curve, which has a file of its own; of it only the ends stay, and of the rest what says something."""
    curve = training.pop("curve")
    losses = [point["loss"] for point in curve if "loss" in point]
    training |= {"first_loss": losses[0], "last_loss": losses[-1]}
    for name in ("samples", "best", "stopped_early"):
        if name == "samples" or not training.get(name):
            training.pop(name, None)
    return curve


def _ended(training: Training) -> str:
    """Which adapter a training has written, and why it ended."""
    said = [f"stopped at step {training.steps}, where trainer.patience ran out"] if training.stopped_early else []
    if training.best:
        said.append(
            f"kept that of step {training.best['step']:.0f}, held-out loss {training.best['validation_loss']:.4f}"
        )
    return "; ".join(said)


def _pictures_of(predictions: str) -> str:
    """The folder for the pictures that a predictions file lists."""
    return Path(predictions).stem.replace("predictions", "pictures")
