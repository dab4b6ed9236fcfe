"""The model that DreamBooth trains: a pipeline's denoiser, perhaps with its text encoder, and the loss on pictures."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

from pica.adapters.pipelines import TEXT_ENCODER
from pica.experiments.pipelines.diffusion.families import Conditions, Family


class SubjectModel(nn.Module):
    """What is trained of a pipeline, as one module that a `Trainer` takes.

    The pipeline itself, whose modules these are, serves to draw pictures; it is no submodule, so that what is not
    trained neither moves to the accelerator nor counts as parameters.

    Attributes:
        pipeline: The pipeline; its denoiser carries the adapter, if there is one.
        family: How it is called.
        parts: The denoiser under the family's name for it, and "text_encoder" where that is trained too; `PeftModel`s,
            or plain models in a base model without adapter.
        prompts: The texts that a row's `prompt` numbers.
        picture_size: Side of its pictures in pixels.
    """

    def __init__(self, pipeline: Any, family: Family, parts: dict[str, nn.Module], *, picture_size: int) -> None:
        super().__init__()
        object.__setattr__(self, "pipeline", pipeline)
        self.family, self.parts = family, nn.ModuleDict(parts)
        self.process = family.process(pipeline.scheduler.config)
        self.prompts: list[str] = []
        self.picture_size, self._cached = picture_size, list[Conditions]()

    pipeline: Any

    @property
    def denoiser(self) -> Any:
        """The UNet or transformer."""
        return self.parts[self.family.component]

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    @property
    def peft_type(self) -> Any:
        """PEFT's name for the adapter's method."""
        return getattr(self.denoiser, "peft_type", None)

    @property
    def trains_text(self) -> bool:
        """Whether the text encoder has an adapter of its own."""
        return TEXT_ENCODER in self.parts

    def peft_models(self) -> dict[str, peft.PeftModel]:
        """The parts that carry an adapter, the denoiser first."""
        return {name: part for name, part in self.parts.items() if isinstance(part, peft.PeftModel)}

    @property
    def peft_config(self) -> Any:
        """The denoiser's adapters."""
        return getattr(self.denoiser, "peft_config", {})

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trained parameters, and all of the adapted parts."""
        counts = [part.get_nb_trainable_parameters() for part in self.peft_models().values()]
        return sum(count[0] for count in counts), sum(count[1] for count in counts)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The model as it was before any adapter, inside the block."""
        with contextlib.ExitStack() as stack:
            for part in self.peft_models().values():
                stack.enter_context(part.disable_adapter())
            yield

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Recompute the denoiser's activations in the backward pass; diffusers decides the options itself."""
        self.pipeline.components[self.family.component].enable_gradient_checkpointing()

    activation_checkpointing_enable = gradient_checkpointing_enable

    def load_adapters(self, folder: Path) -> None:
        """Give the adapters the values of a checkpoint; see `pica.adapters.pipelines.adapter_folders`."""
        for name, part in self.peft_models().items():
            place = folder if name == self.family.component else folder / name
            part.load_adapter(str(place), "default", is_trainable=True)

    @torch.no_grad()
    def know(self, prompts: Sequence[str]) -> list[int]:
        """The numbers under which `forward` finds these texts; they are encoded here unless the encoder is trained."""
        for prompt in prompts:
            if prompt not in self.prompts:
                self.prompts.append(prompt)
                self._cached.append({} if self.trains_text else self._encode([prompt]))
                if not self.trains_text:
                    self._move_encoders(torch.device("cpu"))  # they have done their part
        return [self.prompts.index(prompt) for prompt in prompts]

    def forward(
        self, latents: Tensor, noise: Tensor, level: Tensor, prompt: Tensor, weight: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The denoising loss of pictures at given noise.

        Args:
            latents: Clean pictures as the denoiser knows them, (count, channels, height, width), float32.
            noise: Of the same shape.
            level: Noise levels, (count,), int64; see `Process`.
            prompt: Numbers of their texts, (count,), int64; see `know`.
            weight: Of each picture in the loss, (count,); the mean over pictures if None.

        Returns:
            "loss", a number; "errors" and "powers", (count,): mean square of error and of target, of each picture.
        """
        noisy, target = self.process.noised(latents, noise, level)
        dtype = next(self.denoiser.parameters()).dtype
        conditions = {name: value.to(dtype) for name, value in self._conditions(prompt).items()}
        timesteps, size = self.process.timesteps(level), (self.picture_size, self.picture_size)
        found = self.family.predict(self.denoiser, noisy.to(dtype), timesteps, conditions, size)
        errors = (found.float() - target.float()).square().flatten(1).mean(1)
        loss = errors.mean() if weight is None else (errors * weight).sum()
        return {"loss": loss, "errors": errors.detach(), "powers": target.float().square().flatten(1).mean(1)}

    def _conditions(self, prompt: Tensor) -> Conditions:
        numbers = prompt.tolist()
        if self.trains_text:
            distinct = sorted(set(numbers))
            encoded = self._encode([self.prompts[number] for number in distinct])
            rows = torch.tensor([distinct.index(number) for number in numbers])
            return {name: value.to(prompt.device)[rows.to(prompt.device)] for name, value in encoded.items()}
        names = self._cached[numbers[0]]
        return {name: torch.cat([self._cached[n][name] for n in numbers]).to(prompt.device) for name in names}

    def _encode(self, prompts: list[str]) -> Conditions:
        self._move_encoders(self.device)
        return self.family.conditions(self.pipeline, prompts)

    def _move_encoders(self, device: torch.device) -> None:
        """A pipeline with several encoders runs them all in one place."""
        for name, part in self.pipeline.components.items():
            if name.startswith(TEXT_ENCODER) and part is not None:
                part.to(device)


def latents_of(pipeline: Any, mean: Tensor, deviation: Tensor, noise: Tensor) -> Tensor:
    """A draw of the autoencoder's latents in the denoiser's units, all of shape (count, channels, height, width)."""
    config = pipeline.vae.config
    drawn = mean + deviation * noise
    return (drawn - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor
