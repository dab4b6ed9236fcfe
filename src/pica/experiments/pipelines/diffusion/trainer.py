"""transformers' trainer, which is Accelerate's loop, on the denoising loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from pica.adapters.saving import save_adapters
from pica.experiments.pipelines.diffusion.drawing import generator_of
from pica.experiments.pipelines.diffusion.subject import SubjectModel, latents_of
from pica.experiments.train.trainers import Guards, Steps, common_arguments


class SubjectTrainer(Guards, Trainer):
    """Draws noise and levels from the seed, the step and the process alone, so that a resumed run sees the same."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """See `SubjectModel.forward`; the batch holds `mean`, `deviation`, `prompt` and `weight`."""
        noise = self._noise(inputs["mean"].shape)
        count, device = len(inputs["mean"]), inputs["mean"].device
        subject: SubjectModel = self.accelerator.unwrap_model(model)
        latents = latents_of(subject.pipeline, inputs["mean"], inputs["deviation"], noise("latents").to(device))
        level = subject.process.draw(count, noise.generator).to(device)
        outputs = model(latents, noise("noise").to(device), level, inputs["prompt"], inputs["weight"])
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def _noise(self, shape: torch.Size) -> "_Noise":
        step = self.state.global_step
        if getattr(self, "_noise_step", None) != step:
            self._noise_step, self._noise_batch = step, 0
        self._noise_batch += 1
        return _Noise(generator_of(self.args.seed, step, self._noise_batch, self.accelerator.process_index), shape)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            subject: Any = self.accelerator.unwrap_model(self.model)  # pyright: ignore[reportArgumentType]
            save_adapters(subject.peft_models(), Path(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        subject: SubjectModel = self.accelerator.unwrap_model(model or self.model)  # pyright: ignore[reportArgumentType]
        subject.load_adapters(Path(resume_from_checkpoint))


class _Noise:
    """Normal draws of one shape."""

    def __init__(self, generator: torch.Generator, shape: torch.Size) -> None:
        self.generator, self._shape = generator, shape

    def __call__(self, what: str) -> Tensor:
        return torch.randn(self._shape, generator=self.generator)


def subject_trainer(
    model: SubjectModel,
    rows: datasets.Dataset,
    steps: Steps,
    *,
    collate: Callable[[list[dict[str, Any]]], dict[str, Tensor]],
) -> SubjectTrainer:
    """A trainer of a denoiser's adapter; `collate` makes a batch as `SubjectTrainer.compute_loss` takes it."""
    arguments = TrainingArguments(**common_arguments(steps), remove_unused_columns=False, label_names=[])
    return SubjectTrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=list(steps.callbacks)
    )
