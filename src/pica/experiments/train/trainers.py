"""The trainers that do the steps: TRL's for text generation, transformers' for classification, with the same guards."""

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames
from trl import SFTConfig, SFTTrainer

from pica.errors import ConfigError, TrainingError
from pica.experiments.distributed import in_any
from pica.experiments.models import device
from pica.experiments.recipes.recipe import TrainerSection
from pica.files.output import translated_write_errors


@dataclass(frozen=True)
class Steps:
    """How the steps of one training are done, whatever is trained.

    Attributes:
        section: Settings.
        learning_rate: Peak rate (`section` may list several).
        checkpoints: Folder for checkpoints.
        callbacks: What watches the steps.
    """

    section: TrainerSection
    learning_rate: float
    checkpoints: Path
    callbacks: Sequence[TrainerCallback] = ()


class Guards:
    """Stops a trainer at the first loss that is no number, and leaves no broken checkpoint. For use beside a `Trainer`."""

    heard: Callable[[float, int], None] | None = None
    """Is told the loss of each batch, as a share of its step's, and its tokens (0 where it is no text)."""
    note = ""
    """What else is to be said of the last step, in a few words."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = _tokens(inputs)
        loss = super().training_step(model, inputs, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        if in_any(not math.isfinite(loss.item())):  # the parent has already waited for the device
            raise TrainingError(
                f"The loss became {loss.item()} in step {self.state.global_step + 1}; nothing more was written. "  # pyright: ignore[reportAttributeAccessIssue]
                f"Lower trainer.learning_rate (now {self.args.learning_rate:g}) or check the model's weights."  # pyright: ignore[reportAttributeAccessIssue]
            )
        if self.heard is not None:
            self.heard(loss.item(), tokens)
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"  # pyright: ignore[reportAttributeAccessIssue]
        try:
            with translated_write_errors(folder):
                super()._save_checkpoint(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Leave the trainer's card out: a checkpoint is no model to publish, and PEFT writes one with the adapter."""


def _tokens(inputs: Mapping[str, Any]) -> int:
    """Tokens of a batch, without the padding where a mask tells it."""
    if "attention_mask" in inputs:
        return int(inputs["attention_mask"].sum())
    return inputs["input_ids"].numel() if "input_ids" in inputs else 0


class GenerationTrainer(Guards, SFTTrainer):
    """TRL's trainer with our guards."""


class ClassificationTrainer(Guards, Trainer):
    """transformers' trainer with our guards, and a learning rate of its own for newly made layers."""

    def __init__(self, *args: Any, head_learning_rate: float | None, head: Sequence[torch.Tensor], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._head_rate, self._head = head_learning_rate, {id(parameter) for parameter in head}

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The usual optimizer; with `head_learning_rate`, the head's parameters in groups of their own."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and self._head_rate is not None:
            for group in list(optimizer.param_groups):
                head = [parameter for parameter in group["params"] if id(parameter) in self._head]
                if head:
                    group["params"] = [parameter for parameter in group["params"] if id(parameter) not in self._head]
                    options = {key: value for key, value in group.items() if key != "params"}
                    optimizer.add_param_group({**options, "params": head, "lr": self._head_rate})
        return optimizer


def generation_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    steps: Steps,
    *,
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]] | None = None,
) -> GenerationTrainer:
    """A trainer of a causal language model on rows with `input_ids` and `labels`; TRL makes the batches unless told how."""
    arguments = generation_arguments(steps)
    return GenerationTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=list(steps.callbacks),
        data_collator=collate,
    )


def classification_trainer(
    model: Any,
    rows: datasets.Dataset,
    steps: Steps,
    *,
    collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    head: Sequence[torch.Tensor],
) -> ClassificationTrainer:
    """Make a trainer of a model with a classification head.

    Args:
        model: The model with its adapter.
        rows: What `collate` makes batches of.
        steps: How they are done.
        collate: From rows to one batch, labels included.
        head: Parameters that `steps.section.head_learning_rate` is for.
    Returns:
        A trainer that has not begun.
    """
    arguments = TrainingArguments(
        **common_arguments(steps),
        remove_unused_columns=False,  # all columns are ours, and images are only made when a batch is
    )
    return ClassificationTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collate,
        callbacks=list(steps.callbacks),
        head_learning_rate=steps.section.head_learning_rate,
        head=head,
    )


def check_optimizer(name: str) -> None:
    """Raise `ConfigError` on an optimizer that transformers does not know: its own error would come after minutes."""
    known = [str(each.value) for each in OptimizerNames]
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? Known" if near else "known"
        raise ConfigError(f"trainer.optimizer = {name!r}: unknown optimizer; {hint}: {', '.join(known)}.")


def generation_arguments(steps: Steps) -> SFTConfig:
    """Steps as TRL takes them."""
    return SFTConfig(
        **common_arguments(steps),
        max_length=steps.section.max_length,
        dataset_kwargs={"skip_prepare_dataset": True},  # ids and labels are ours already
    )


def common_arguments(steps: Steps) -> dict[str, Any]:
    """Steps as every trainer takes them."""
    section = steps.section
    return {
        "output_dir": str(steps.checkpoints),
        "per_device_train_batch_size": section.batch_size,
        "gradient_accumulation_steps": section.accumulation,
        "learning_rate": steps.learning_rate,
        "lr_scheduler_type": section.schedule,
        "warmup_steps": section.warmup,  # a value below 1 is a share of all steps
        "weight_decay": section.weight_decay,
        "optim": section.optimizer,
        "max_grad_norm": section.max_grad_norm,
        "max_steps": section.max_steps or -1,
        "num_train_epochs": section.epochs,
        "logging_steps": section.log_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would show the last finite loss in place of a NaN
        "save_strategy": "steps" if section.save_steps else "no",
        "save_steps": section.save_steps or 500,
        "save_total_limit": 1,
        "seed": section.seed,
        "data_seed": section.seed,
        "bf16": section.precision == "bfloat16",
        "fp16": section.precision == "float16",
        "use_cpu": device().type == "cpu",  # without it bfloat16 is refused there
        _checkpointing_name(): section.gradient_checkpointing,
        "train_sampling_strategy": "group_by_length" if section.group_by_length else "random",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": "none",
        "disable_tqdm": True,
    }


def _checkpointing_name() -> str:
    """What the installed transformers calls recomputing activations. Always set: TRL's own default is on."""
    names = {field.name for field in dataclasses.fields(SFTConfig)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
