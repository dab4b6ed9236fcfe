"""How each family of text-to-image pipelines is trained: its noise, its target, and what its denoiser is called with.

A new family is a class here and a line in `FAMILIES`.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from pica.errors import ConfigError

Conditions = dict[str, Tensor]
"""What a text becomes, by name; the first dimension of each tensor is the number of texts."""


class Process(Protocol):
    """From a clean picture to a noisy one, and what is to be told from it.

    Attributes:
        levels: Number of noise levels; a level is an index below it.
    """

    levels: int

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Levels as training draws them, (count,), int64 on the CPU."""
        ...

    def timesteps(self, level: Tensor) -> Tensor:
        """What the denoiser is told of the levels, (count,)."""
        ...

    def noised(self, latents: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """The denoiser's input and its target, both of the latents' shape (count, channels, height, width), float32."""
        ...


class Variance:
    """Denoising diffusion (Ho et al. 2020): z_t = sqrt(a_t) z + sqrt(1 - a_t) n, levels drawn uniformly."""

    def __init__(self, config: Any) -> None:
        self._scheduler: Any = DDPMScheduler.from_config(config)
        self._target = self._scheduler.config.prediction_type
        if self._target not in ("epsilon", "v_prediction", "sample"):
            raise ConfigError(f"The pipeline's scheduler predicts {self._target!r}, which pica cannot train.")
        self.levels = int(self._scheduler.config.num_train_timesteps)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """See `Process.draw`."""
        return torch.randint(0, self.levels, (count,), generator=generator)

    def timesteps(self, level: Tensor) -> Tensor:
        """The level itself."""
        return level

    def noised(self, latents: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """See `Process.noised`; the target is the noise, its mixture with the latents called v, or the latents."""
        noisy = self._scheduler.add_noise(latents, noise, level)
        if self._target == "epsilon":
            return noisy, noise
        if self._target == "v_prediction":
            return noisy, self._scheduler.get_velocity(latents, noise, level)
        return noisy, latents


class Flow:
    """Rectified flow (Esser et al. 2024): z_s = (1 - s) z + s n, target n - z, levels drawn logit-normally."""

    def __init__(self, config: Any) -> None:
        scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(config)
        self._sigmas, self._timesteps = scheduler.sigmas, scheduler.timesteps
        self.levels = len(self._timesteps)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """See `Process.draw`."""
        share = torch.randn(count, generator=generator).sigmoid()
        return (share * self.levels).long().clamp(max=self.levels - 1)

    def timesteps(self, level: Tensor) -> Tensor:
        """The scheduler's, which falls as the level rises."""
        return self._timesteps.to(level.device)[level]

    def noised(self, latents: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """See `Process.noised`."""
        sigma = self._sigmas.to(latents.device)[level].to(latents.dtype).view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise, noise - latents


class Family(Protocol):
    """One kind of pipeline.

    Attributes:
        component: Name of the denoiser in the pipeline.
        process: Its noise.
    """

    component: str
    process: type[Variance] | type[Flow]

    def conditions(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        """What the texts become; gradients flow back into the text encoder if they are on."""
        ...

    def predict(
        self, denoiser: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions, picture_size: tuple[int, int]
    ) -> Tensor:
        """The denoiser's prediction, of the shape of `noisy` (count, channels, height, width).

        Args:
            denoiser: The UNet or the transformer, perhaps with an adapter.
            noisy: Its input.
            timesteps: See `Process.timesteps`, (count,).
            conditions: One row a picture.
            picture_size: Height and width in pixels.
        """
        ...


class StableDiffusion:
    """Stable Diffusion 1 and 2: a UNet that looks at one text encoder's last layer."""

    component = "unet"
    process: type[Variance] | type[Flow] = Variance

    def conditions(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        """See `Family.conditions`."""
        device = pipeline.text_encoder.device
        text, _ = pipeline.encode_prompt(list(prompts), device, 1, False)
        return {"text": text}

    def predict(
        self, denoiser: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions, picture_size: tuple[int, int]
    ) -> Tensor:
        """See `Family.predict`."""
        return denoiser(noisy, timesteps, conditions["text"], return_dict=False)[0]


class StableDiffusionXL:
    """Stable Diffusion XL: a UNet that is told two encoders' texts, a pooled text and the picture's size."""

    component = "unet"
    process: type[Variance] | type[Flow] = Variance

    def conditions(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        """See `Family.conditions`."""
        device = pipeline.text_encoder_2.device
        text, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}

    def predict(
        self, denoiser: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions, picture_size: tuple[int, int]
    ) -> Tensor:
        """See `Family.predict`; pictures are not cropped as far as the model is told."""
        sizes = torch.tensor([*picture_size, 0, 0, *picture_size], device=noisy.device, dtype=noisy.dtype)
        added = {"text_embeds": conditions["pooled"], "time_ids": sizes.expand(len(noisy), -1)}
        text = conditions["text"]
        return denoiser(noisy, timesteps, text, added_cond_kwargs=added, return_dict=False)[0]


class StableDiffusion3:
    """Stable Diffusion 3: a transformer on patches, trained as a flow."""

    component = "transformer"
    process: type[Variance] | type[Flow] = Flow

    def conditions(self, pipeline: Any, prompts: Sequence[str]) -> Conditions:
        """See `Family.conditions`."""
        device = pipeline.text_encoder.device
        texts = list(prompts)
        text, _, pooled, _ = pipeline.encode_prompt(texts, texts, texts, device, 1, False)
        return {"text": text, "pooled": pooled}

    def predict(
        self, denoiser: Any, noisy: Tensor, timesteps: Tensor, conditions: Conditions, picture_size: tuple[int, int]
    ) -> Tensor:
        """See `Family.predict`."""
        return denoiser(noisy, conditions["text"], conditions["pooled"], timesteps, return_dict=False)[0]


FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": StableDiffusion(),
    "StableDiffusionXLPipeline": StableDiffusionXL(),
    "StableDiffusion3Pipeline": StableDiffusion3(),
}
"""By the class that a pipeline's model_index.json names."""
