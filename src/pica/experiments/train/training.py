"""One training: a model with an adapter, data and settings in; a trained adapter folder and its measurements out."""

import json
import math
import shutil
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import peft
import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from pica.adapters import saving
from pica.basis import process_count
from pica.errors import ConfigError, TrainingError
from pica.experiments.distributed import in_any, leads, load_whole, wait
from pica.experiments.interrupts import Interrupted, StopRequest, stop_on_signal
from pica.experiments.measuring import PeakMemory
from pica.experiments.recipes.recipe import TrainerSection
from pica.experiments.reporting import Advance, Reporter
from pica.experiments.results.run import BestStep, TrainingResult
from pica.experiments.train.allocation import RankAllocation
from pica.experiments.train.trainers import Steps
from pica.experiments.watching import Watch, Watching, add_reports, best_point, samples
from pica.files.output import atomic_folder, write_json

if TYPE_CHECKING:
    from pica.experiments.pipelines import Pipeline

_STATE = "trainer_state.json"  # the last file that the trainer writes into a checkpoint
_TIMES = "step_times.json"  # and what is added to it


MEASURES = {
    "reward": "reward",
    "completions/mean_length": "answer_tokens",
    "kl": "kl",
    "rewards/accuracies": "reward_accuracy",
    "rewards/margins": "reward_margin",
}
"""What TRL's trainers log beside the loss, and what it is called in a curve."""


@dataclass(frozen=True)
class Training:
    """What one training measured.

    Attributes:
        result: What it took. The time is the processor's where there is one thread and no accelerator, so that it does not
            depend on what else the machine does.
        curve: Points with step, epoch, and loss, learning_rate, grad_norm and those of `MEASURES` that the trainer has (each
            `log_steps`) or validation_loss (each `eval_steps`) or both.
        samples: Answers as training went on.
    """

    result: TrainingResult
    curve: list[dict[str, float]]
    samples: list[dict[str, Any]]


def train(
    model: peft.PeftModel,
    pipeline: "Pipeline",
    dataset: datasets.Dataset,
    section: TrainerSection,
    *,
    learning_rate: float,
    checkpoints: Path,
    adapter: Path,
    reporter: Reporter,
    label: str,
    watch: Watch | None = None,
) -> Training:
    """Train an adapter and write it to `adapter`, going on from the last checkpoint in `checkpoints` if there is one.

    Args:
        model: Base model with a fresh adapter; trained in place.
        pipeline: Makes the trainer.
        dataset: What the pipeline's `encode` gave.
        section: Settings.
        learning_rate: Peak rate (`section` may list several).
        checkpoints: Folder for checkpoints; created when the first one is written.
        adapter: Folder to write the trained adapter to, whole or not at all.
        reporter: Is shown a bar with the loss.
        label: What the bar is called.
        watch: What else is looked at as training goes on.
    Returns:
        Losses, times and memory.
    Raises:
        ConfigError: What is to be watched needs a whole model in each process, and there is none.
        TrainingError: The loss or a trained parameter is not finite.
        OutputError: A checkpoint or the adapter can't be written.
        Interrupted: A signal asked to stop; a checkpoint has been written.
        KeyboardInterrupt: A second one did.
    """
    resume_from = last_checkpoint(checkpoints)
    with stop_on_signal() as stop:
        watch, memory = watch or Watch(), PeakMemory()
        watching = Watching(
            watch, section, folder=checkpoints, memory=memory, save=lambda folder: save_adapter(model, folder)
        )
        watcher = _Watcher(stop, [] if resume_from is None else _times_until(resume_from), watching, memory)
        steps = Steps(section, learning_rate, checkpoints, [watcher, watching, *_method_callbacks(model)])
        trainer = pipeline.trainer(model, dataset, steps)
        if is_sharded(trainer) and (watch.measure or watch.sample):
            raise ConfigError(
                "trainer.eval_steps and trainer.sample_steps need the whole model in each process, which FSDP and DeepSpeed "
                "split; leave them out."
            )
        watching.trainer = trainer
        trainer.heard = watcher.heard  # pyright: ignore[reportAttributeAccessIssue] -- all of ours are `Guards`
        watcher.told = lambda: trainer.note  # pyright: ignore[reportAttributeAccessIssue]
        add_reports(trainer, section.report_to, watch)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        try:
            with reporter.bar(
                label, _total_steps(section, len(dataset) * getattr(trainer, "answers_a_row", 1))
            ) as watcher.advance:
                trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        finally:
            load_whole()
        if stop.made and trainer.state.global_step < trainer.state.max_steps and not watching.ended:
            raise Interrupted(checkpoint=last_checkpoint(checkpoints))
        curve = curve_of(trainer.state.log_history)
        losses = [point["loss"] for point in curve if "loss" in point]
        measured = TrainingResult(
            steps=trainer.state.global_step,
            seconds=round(sum(watcher.times), 3),
            step_seconds=round(statistics.median(watcher.times[2:]), 5) if len(watcher.times) > 2 else None,
            peak_memory=memory.read(),
            first_loss=losses[0] if losses else None,
            last_loss=losses[-1] if losses else None,
            sharded=is_sharded(trainer),
            best=_best(trainer.state.log_history) if watching.keeps else None,
            stopped_early=watching.ended,
        )
        if best := watching.best_folder(trainer.state):
            if leads():
                with atomic_folder(adapter) as partial:
                    shutil.copytree(best, partial, dirs_exist_ok=True)
            wait()
        else:
            save_adapter(model, adapter, state=_gathered(trainer))
    if stop.made:  # the signal came with the last step: this training is complete, the run is not
        raise KeyboardInterrupt
    return Training(measured, curve, samples(trainer.state.log_history))


def save_adapter(model: Any, folder: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write a finite adapter, whole or not at all; several where a model has `peft_models`. One process writes.

    Args:
        model: The trained model.
        folder: Where to write.
        state: The model's state dict where its parameters are split between processes.
    Raises:
        TrainingError: A trained parameter is not finite.
        OutputError: Writing failed.
    """
    wrong = next((name for name, values in _trained(model) if not torch.isfinite(values).all()), None)
    if in_any(wrong is not None):
        raise TrainingError(
            f"Parameter {wrong or 'of another process'} is not finite after training, so no adapter was written; lower the "
            "learning rate."
        )
    if leads():
        # Embeddings are only ever trained through modules_to_save, so that none are saved as such: whether they have
        # changed PEFT would ask the hub about the base model.
        if hasattr(model, "peft_models"):
            saving.save_adapters(model.peft_models(), folder)
        else:
            saving.save_adapter(model, folder, save_embedding_layers=False, state_dict=state)
    wait()


def _trained(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, values) of the trained parameters, of split ones this process's part."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            values: Any = parameter.detach()
            yield name, values.to_local() if hasattr(values, "to_local") else values


def _gathered(trainer: Trainer) -> Any:
    """The model's whole state in the first process, where FSDP or DeepSpeed has split it; None where nothing has."""
    if not is_sharded(trainer):
        return None
    wrapped = trainer.deepspeed if trainer.is_deepspeed_enabled else trainer.model
    return trainer.accelerator.get_state_dict(wrapped)


def is_sharded(trainer: Trainer) -> bool:
    """Whether the trained model's parameters are split between processes."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def last_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{_STATE}") if _readable(path)]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _readable(state: Path) -> bool:
    try:
        return isinstance(json.loads(state.read_text(encoding="utf-8"))["global_step"], int)
    except (OSError, ValueError, KeyError):
        return False


def _times_until(checkpoint: Path) -> list[float]:
    """Seconds of each step before a checkpoint; none where it was stopped while they were written."""
    try:
        return [float(seconds) for seconds in json.loads((checkpoint / _TIMES).read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []


class _Watcher(TrainerCallback):
    """Times the steps, moves the bar, says how they go, and stops training with a checkpoint when asked to."""

    def __init__(self, stop: StopRequest, times: list[float], watching: Watching, memory: PeakMemory) -> None:
        self.stop, self.times, self.advance, self._watching, self._memory = stop, times, _no_bar, watching, memory
        self._begun = self._wall = self._loss = 0.0
        self._tokens = 0
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)  # tokens and seconds of the last steps
        # One thread on a processor: its own time is the step's, whatever else the machine does meanwhile.
        alone = torch.get_num_threads() == 1 and not torch.accelerator.is_available()
        self._clock = time.process_time if alone else time.perf_counter

    advance: Advance
    told: Callable[[], str] = staticmethod(str)
    """What the trainer itself has to say of the last step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            self.advance(state.global_step, "resumed")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._loss, self._tokens, self._wall = 0.0, 0, time.perf_counter()
        self._begun = self._clock()

    def heard(self, loss: float, tokens: int) -> None:
        """One batch of the step is done."""
        self._loss += loss
        self._tokens += tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(self._clock() - self._begun)
        self._recent.append((self._tokens, time.perf_counter() - self._wall))
        self.advance(1, self._note(kwargs.get("lr_scheduler")))
        if in_any(self.stop.made):  # a signal reaches the processes at different steps
            self.stop.made = True
        if self.stop.made and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if leads():
            write_json(Path(args.output_dir, f"checkpoint-{state.global_step}", _TIMES), self.times)

    def _note(self, schedule: Any) -> str:
        """How the step went, in a line."""
        parts = [f"loss {self._loss:.4f}", *filter(None, [self.told()])]
        if self._watching.latest is not None:
            parts.append(f"held out {self._watching.latest:.4f}")
        if schedule is not None:
            parts.append(f"rate {schedule.get_last_lr()[0]:.2e}")
        if tokens := sum(count for count, _ in self._recent):
            speed = process_count() * tokens / max(sum(seconds for _, seconds in self._recent), 1e-9)
            parts.append(f"{speed:,.0f} tokens/s")
        peaks = self._memory.read()
        return ", ".join([*parts, f"{peaks.get('gpu', peaks['host']):,.0f} MiB"])


def _method_callbacks(model: peft.PeftModel) -> list[TrainerCallback]:
    """What a method needs from the training loop."""
    return [RankAllocation()] if model.peft_type == peft.PeftType.ADALORA else []


def _no_bar(count: int = 1, note: str = "") -> None: ...


def _total_steps(section: TrainerSection, rows: int) -> int:
    if section.max_steps:
        return section.max_steps
    batches = math.ceil(rows / section.batch_size / process_count())
    return max(1, math.ceil(section.epochs * math.ceil(batches / section.accumulation)))


def curve_of(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The points of a trainer's log; see `Training.curve`."""
    columns = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    points: dict[int, dict[str, float]] = {}
    for entry in history:
        if "loss" in entry or "eval_loss" in entry:
            point = points.setdefault(entry["step"], {})
            point |= {name: entry[name] for name in columns if name in entry}
            point |= {name: entry[theirs] for theirs, name in MEASURES.items() if entry.get(theirs) is not None}
            if "eval_loss" in entry:
                point["validation_loss"] = entry["eval_loss"]
    return list(points.values())


def curve_columns(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Columns of a table of curves: the usual ones, and those of `MEASURES` that are there."""
    usual = ("run", "method", "peak_rate", "step", "epoch", "loss", "learning_rate", "grad_norm", "validation_loss")
    return (*usual, *(name for name in MEASURES.values() if any(name in row for row in rows)))


def _best(history: list[dict[str, Any]]) -> BestStep | None:
    point = best_point(history)
    if point is None:
        return None
    return BestStep(step=point["step"], validation_loss=point["eval_loss"], validation_score=point.get("eval_score"))
