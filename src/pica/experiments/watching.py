"""What is looked at while a training goes on: the held-out loss, a few answers, and other programs' logs."""

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer, TrainerCallback

from pica.errors import ConfigError
from pica.experiments import distributed
from pica.experiments.measuring import PeakMemory
from pica.experiments.recipes.recipe import TrainerSection

if TYPE_CHECKING:
    from pica.experiments.pipelines.base import HeldOut

Samples = list[dict[str, Any]]
"""One for each answer: `step`, `prompt`, `answer`."""


@dataclasses.dataclass(frozen=True)
class Watch:
    """How a training is watched; what is None is not.

    Attributes:
        measure: Measures the model on the validation problems, each `trainer.eval_steps` and after the last step.
        sample: Has the model answer a few prompts, as (prompt, answer), each `trainer.sample_steps`.
        sampled: Is told all samples so far, those before a resume included, and those that are new.
        logged: Is told the trainer's log, each time there is something new in it.
        logs: Folder for the files of `trainer.report_to`.
        name: What the training is called there.
        project: What it belongs to there: trainings that are looked at together.
    """

    measure: Callable[[Any], "HeldOut"] | None = None
    sample: Callable[[Any], Sequence[tuple[str, str]]] | None = None
    sampled: Callable[[Samples, Samples], None] | None = None
    logged: Callable[[list[dict[str, Any]]], None] | None = None
    logs: Path | None = None
    name: str = "run"
    project: str = "pica"


class Watching(TrainerCallback):
    """Does what a `Watch` says, keeps the adapter with the lowest held-out loss, and stops when none is found any more.

    All that it remembers of earlier steps stands in the trainer's log, and so in every checkpoint. The adapter that was the
    best when the last checkpoint was written is kept until there is another checkpoint.
    """

    def __init__(
        self,
        watch: Watch,
        section: TrainerSection,
        *,
        folder: Path,
        memory: PeakMemory,
        save: Callable[[Path], None],
    ) -> None:
        """Args: watch, section: what to do; folder: where the best adapter is kept; memory: does not count what is done
        here; save: writes the adapter as it is into a folder."""
        self._watch, self._section, self._folder, self._memory, self._save = watch, section, folder, memory, save
        self._in_checkpoint: int | None = None
        self.trainer: Trainer | None = None
        self.ended = False
        self.latest: float | None = None

    @property
    def keeps(self) -> bool:
        """Whether the best adapter is the one to be written."""
        return self._watch.measure is not None and self._section.keep_best

    def best_folder(self, state: Any) -> Path | None:
        """Where the best adapter lies; None where it is not kept, or no loss was a number."""
        best = best_point(state.log_history)
        return self._folder / f"best-{best['step']}" if best and self.keeps else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget what an earlier attempt did after the checkpoint that this one goes on from."""
        self._remember(state)
        self._tell(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, then sample, where it is time to."""
        step, section = state.global_step, self._section
        last = step >= state.max_steps
        if self._watch.measure is not None and section.eval_steps and (last or step % section.eval_steps == 0):
            self._measure(state, control, kwargs["model"])
        if self._watch.sample is not None and section.sample_steps and step % section.sample_steps == 0:
            self._ask(state, kwargs["model"])

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell what is new."""
        if self._watch.logged is not None and distributed.leads():
            self._watch.logged(state.log_history)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what the checkpoint needs, and no longer what the one before it did."""
        self._remember(state)

    def _measure(self, state: Any, control: Any, model: Any) -> None:
        assert self._watch.measure is not None
        assert self.trainer is not None
        before, measure = best_point(state.log_history), self._watch.measure
        model.eval()
        with self._memory.paused():
            found = distributed.in_first(lambda: dataclasses.asdict(measure(model)))
        self.latest = found["loss"]
        logs = {"eval_loss": found["loss"]} | ({"eval_score": found["score"]} if found["score"] is not None else {})
        due = control.should_log
        self.trainer.log(logs)  # while the model is in evaluation mode: TRL puts its averages of training elsewhere
        control.should_log = due  # the trainer takes any log for the one that was due
        model.train()
        best = best_point(state.log_history)
        if best != before:
            if self.keeps:
                self._save(self._folder / f"best-{state.global_step}")
                self._prune(state)
        elif self._section.patience:
            since = [point for point in evaluations(state.log_history) if best is None or point["step"] > best["step"]]
            if len(since) >= self._section.patience:
                self.ended = control.should_training_stop = True
                control.should_save = False  # going on from here would be one step too many

    def _ask(self, state: Any, model: Any) -> None:
        sample = self._watch.sample
        assert sample is not None
        with self._memory.paused():
            found = distributed.in_first(lambda: [list(pair) for pair in sample(model)])
        model.train()
        state.log_history.append({"step": state.global_step, "samples": found})
        self._tell(state, len(found))

    def _tell(self, state: Any, new: int = 0) -> None:
        if self._watch.sampled is not None and distributed.leads():
            found = samples(state.log_history)
            self._watch.sampled(found, found[len(found) - new :])

    def _remember(self, state: Any) -> None:
        best = best_point(state.log_history)
        self._in_checkpoint = best["step"] if best else None
        self._prune(state)

    def _prune(self, state: Any) -> None:
        best = best_point(state.log_history)
        needed = {f"best-{step}" for step in (best and best["step"], self._in_checkpoint) if step}
        if distributed.leads():
            for folder in self._folder.glob("best-*"):
                if folder.name not in needed:
                    shutil.rmtree(folder, ignore_errors=True)


def evaluations(history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those entries of a trainer's log that hold a held-out loss."""
    return [point for point in history if "eval_loss" in point]


def best_point(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The entry of a trainer's log with the lowest held-out loss that is a number, the first of equal ones."""
    finite = [point for point in evaluations(history) if math.isfinite(point["eval_loss"])]
    return min(finite, key=lambda point: point["eval_loss"], default=None)


def samples(history: Sequence[Mapping[str, Any]]) -> Samples:
    """All samples in a trainer's log."""
    return [
        {"step": point["step"], "prompt": prompt, "answer": answer}
        for point in history
        for prompt, answer in point.get("samples", ())
    ]


def check_reports(names: Sequence[str]) -> None:
    """Raise `ConfigError` where a program that is to be reported to is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ConfigError(f"trainer.report_to: {name} is not installed: pip install {name}, or leave it out.")


def add_reports(trainer: Trainer, names: Sequence[str], watch: Watch) -> None:
    """Have a trainer report to TensorBoard, Weights & Biases or Trackio, by transformers' own callbacks."""
    if not names or not distributed.leads():
        return
    from transformers.integrations import TensorBoardCallback
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    trainer.args.run_name, trainer.args.project = watch.name, watch.project  # the latter is Trackio's
    for kind in get_reporting_integration_callbacks(list(names)):
        if kind is TensorBoardCallback and watch.logs is not None:
            from torch.utils.tensorboard import SummaryWriter

            trainer.add_callback(kind(SummaryWriter(str(watch.logs))))
        else:
            trainer.add_callback(kind())
    if "wandb" in names:
        places = {"WANDB_PROJECT": watch.project}
        if watch.logs is not None:
            watch.logs.mkdir(parents=True, exist_ok=True)
            places["WANDB_DIR"] = str(watch.logs.parent)
        trainer.add_callback(_WandbRun(places))


class _WandbRun(TrainerCallback):
    """Says where a Weights & Biases run goes, and ends it with its training: transformers leaves it open, and the next
    training would go into it."""

    def __init__(self, places: Mapping[str, str]) -> None:
        """`places`: variables of the environment by which transformers is told; those that the user has set stay."""
        self._places = {name: value for name, value in places.items() if name not in os.environ}
        os.environ.update(self._places)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        wandb.finish()
        for name in self._places:
            os.environ.pop(name, None)
