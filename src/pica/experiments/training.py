"""One training: a model with an adapter, data and settings in; a trained adapter folder and its measurements out."""

import dataclasses
import json
import logging
import math
import shutil
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from pica.adapters import saving
from pica.errors import TrainingError
from pica.experiments.interrupts import Interrupted, StopRequest, stop_on_signal
from pica.experiments.measuring import PeakMemory
from pica.experiments.output import translated_write_errors
from pica.experiments.recipe import TrainerSection
from pica.experiments.reporting import Advance, Reporter

logger = logging.getLogger(__name__)

_STATE = "trainer_state.json"  # the last file that the trainer writes into a checkpoint


@dataclass(frozen=True)
class Training:
    """What one training measured.

    Attributes:
        steps: Optimizer steps.
        seconds: Wall time of this process's share of the steps, and of nothing else.
        step_seconds: Median time of a step, the first two left out; None for fewer than three steps.
        peak_memory: Highest memory use in MiB, see `PeakMemory`.
        curve: Points with step, epoch, loss, learning_rate, grad_norm.
    """

    steps: int
    seconds: float
    step_seconds: float | None
    peak_memory: dict[str, float]
    curve: list[dict[str, float]]


def train(
    model: peft.PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: datasets.Dataset,
    section: TrainerSection,
    *,
    learning_rate: float,
    checkpoints: Path,
    adapter: Path,
    reporter: Reporter,
    label: str,
) -> Training:
    """Train an adapter and write it to `adapter`, going on from the last checkpoint in `checkpoints` if there is one.

    Args:
        model: Base model with a fresh adapter; trained in place.
        tokenizer: Its tokenizer.
        dataset: Columns `input_ids` and `labels`, see `pica.experiments.data.encode`.
        section: Settings.
        learning_rate: Peak rate (`section` may list several).
        checkpoints: Folder for checkpoints; created when the first one is written.
        adapter: Folder to write the trained adapter to, whole or not at all.
        reporter: Is shown a bar with the loss.
        label: What the bar is called.

    Raises:
        TrainingError: The loss or a trained parameter is not finite.
        OutputError: A checkpoint or the adapter can't be written.
        Interrupted: A signal asked to stop; a checkpoint has been written.
    """
    arguments = _arguments(section, learning_rate, checkpoints)
    resume_from = last_checkpoint(checkpoints)
    with stop_on_signal() as stop:
        watcher = _Watcher(stop)
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            processing_class=tokenizer,
            callbacks=[watcher],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        memory = PeakMemory()
        with reporter.bar(label, _total_steps(section, len(dataset))) as watcher.advance:
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        if stop.made and trainer.state.global_step < trainer.state.max_steps:
            raise Interrupted(checkpoint=last_checkpoint(checkpoints))
        measured = Training(
            steps=trainer.state.global_step,
            seconds=round(sum(watcher.times), 3),
            step_seconds=round(statistics.median(watcher.times[2:]), 5) if len(watcher.times) > 2 else None,
            peak_memory=memory.read(),
            curve=_curve(trainer.state.log_history),
        )
        save_adapter(model, adapter)
    if stop.made:  # the signal came with the last step: this training is complete, the run is not
        raise KeyboardInterrupt
    return measured


def save_adapter(model: peft.PeftModel, folder: Path) -> None:
    """Write a finite adapter, whole or not at all.

    Raises:
        TrainingError: A trained parameter is not finite.
        OutputError: Writing failed.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            raise TrainingError(
                f"Parameter {name} is not finite after training, so no adapter was written; lower the learning rate."
            )
    # Embeddings are only ever trained through modules_to_save; "auto" would ask the hub about the base model.
    saving.save_adapter(model, folder, save_embedding_layers=False)


def last_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    found = [path.parent for path in folder.glob(f"checkpoint-*/{_STATE}") if _readable(path)]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _readable(state: Path) -> bool:
    try:
        return isinstance(json.loads(state.read_text(encoding="utf-8"))["global_step"], int)
    except (OSError, ValueError, KeyError):
        return False


class _Trainer(SFTTrainer):
    """TRL's trainer, which also stops at the first loss that is no number and leaves no broken checkpoint."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not math.isfinite(loss.item()):  # the parent has already waited for the device
            raise TrainingError(
                f"The loss became {loss.item()} in step {self.state.global_step + 1}; nothing more was written. "
                f"Lower trainer.learning_rate (now {self.args.learning_rate:g}) or check the model's weights."
            )
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            with translated_write_errors(folder):
                super()._save_checkpoint(*args, **kwargs)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Leave out TRL's card: a checkpoint is no model to publish, and PEFT writes one with the adapter."""


class _Watcher(TrainerCallback):
    """Times the steps, moves the bar, and stops training with a checkpoint when asked to."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop, self.times, self.advance = stop, list[float](), _no_bar
        self._begun, self._note = 0.0, ""

    advance: Advance

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            self.advance(state.global_step, "resumed")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter() - self._begun)
        self.advance(1, self._note)
        if self.stop.made and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in (logs := kwargs.get("logs") or {}):
            self._note = f"loss {logs['loss']:.4f}"
            self.advance(0, self._note)


def _no_bar(count: int = 1, note: str = "") -> None: ...


def _arguments(section: TrainerSection, learning_rate: float, checkpoints: Path) -> SFTConfig:
    return SFTConfig(
        output_dir=str(checkpoints),
        per_device_train_batch_size=section.batch_size,
        gradient_accumulation_steps=section.accumulation,
        learning_rate=learning_rate,
        lr_scheduler_type=section.schedule,
        warmup_steps=section.warmup,  # a value below 1 is a share of all steps
        weight_decay=section.weight_decay,
        optim=section.optimizer,
        max_grad_norm=section.max_grad_norm,
        max_steps=section.max_steps or -1,
        num_train_epochs=section.epochs,
        logging_steps=section.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would show the last finite loss in place of a NaN
        save_strategy="steps" if section.save_steps else "no",
        save_steps=section.save_steps or 500,
        save_total_limit=1,
        seed=section.seed,
        data_seed=section.seed,
        bf16=section.precision == "bfloat16",
        fp16=section.precision == "float16",
        **{_checkpointing_name(): section.gradient_checkpointing},  # pyright: ignore[reportArgumentType] -- a bool field
        train_sampling_strategy="group_by_length" if section.group_by_length else "random",
        max_length=section.max_length,
        dataset_kwargs={"skip_prepare_dataset": True},  # ids and labels are ours already
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
    )


def _checkpointing_name() -> str:
    """What the installed transformers calls recomputing activations. Always set: TRL's own default is on."""
    names = {field.name for field in dataclasses.fields(SFTConfig)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


def _total_steps(section: TrainerSection, rows: int) -> int:
    if section.max_steps:
        return section.max_steps
    batches = math.ceil(rows / section.batch_size)
    return max(1, math.ceil(section.epochs * math.ceil(batches / section.accumulation)))


def _curve(history: list[dict[str, Any]]) -> list[dict[str, float]]:
    columns = ("step", "epoch", "loss", "learning_rate", "grad_norm")
    return [{name: point[name] for name in columns if name in point} for point in history if "loss" in point]
