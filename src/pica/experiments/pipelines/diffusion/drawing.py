"""Pictures that a pipeline draws, pictures that it looks at, and the seeds of both."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pica.errors import ConfigError
from pica.experiments.models import device
from pica.experiments.pipelines.diffusion.loading import models_of, quiet
from pica.experiments.recipes.recipe import DreamBoothSection
from pica.experiments.reporting import Reporter
from pica.files.output import translated_write_errors
from pica.tasks.dreambooth import picture_files

GENERATED = "generated-{number:06d}.png"
"""Name of a class picture that was drawn, not given."""


def generator_of(*parts: object) -> torch.Generator:
    """A generator on the CPU whose draws depend on these parts alone, not on the device or what was drawn before."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def picture_size(pipeline: Any, component: str, section: DreamBoothSection) -> int:
    """Choose the size of the square pictures that a pipeline is trained on.

    Returns:
        Their side in pixels: as asked for, else the model's own.
    Raises:
        ConfigError: The model cannot take that size.
    """
    config = pipeline.components[component].config
    side = config.sample_size if isinstance(config.sample_size, int) else config.sample_size[0]
    unit = pipeline.vae_scale_factor * (getattr(config, "patch_size", None) or 1)
    size = section.resolution or side * pipeline.vae_scale_factor
    if size % unit:
        raise ConfigError(f"dreambooth.resolution = {size}: must be a multiple of {unit} for this model.")
    limit = getattr(config, "pos_embed_max_size", None)
    if limit and size // unit > limit:
        raise ConfigError(f"dreambooth.resolution = {size}: this model takes at most {limit * unit}.")
    return size


def fitted(picture: Any, size: int) -> Any:
    """The middle square of a PIL image, scaled to `size` pixels."""
    from PIL import Image, ImageOps

    return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)


@torch.no_grad()
def moments(pipeline: Any, pictures: Sequence[Any], size: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the pictures' latents, each (count, channels, height, width), float32 on the CPU."""
    # The autoencoder works in float32, since those of some models overflow in float16; it is put back as it was.
    rows = [torch.from_numpy(np.asarray(fitted(picture, size)).copy()) for picture in pictures]
    values = torch.stack(rows).permute(0, 3, 1, 2).float() / 127.5 - 1.0  # (count, 3, size, size) in [-1, 1]
    vae = pipeline.vae
    before = vae.dtype
    with quiet():  # diffusers warns of any change of precision
        vae.to(device=device(), dtype=torch.float32)
    try:
        distribution = vae.encode(values.to(device())).latent_dist
        return distribution.mean.float().cpu(), distribution.std.float().cpu()
    finally:
        with quiet():
            vae.to(before)


@torch.no_grad()
def draw(
    pipeline: Any,
    prompts: Sequence[str],
    generators: Sequence[torch.Generator],
    section: DreamBoothSection,
    *,
    size: int,
    advance: Callable[..., None] | None = None,
) -> list[Any]:
    """One picture a prompt, as PIL images of `size` pixels; the noise of each comes from its own generator."""
    pipeline.to(device())
    models = models_of(pipeline)
    modes = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    drawn = []
    try:
        for start in range(0, len(prompts), section.draw_batch_size):
            chosen = slice(start, start + section.draw_batch_size)
            drawn += pipeline(
                list(prompts[chosen]),
                num_inference_steps=section.inference_steps,
                guidance_scale=section.guidance,
                height=size,
                width=size,
                generator=list(generators[chosen]),
            ).images
            if advance is not None:
                advance(len(prompts[chosen]))
    finally:
        for name, model in models.items():
            model.train(modes[name])
    return drawn


def rest(pipeline: Any, component: str) -> None:
    """Move everything but the denoiser off the accelerator."""
    for name, model in models_of(pipeline).items():
        if name != component:
            model.to("cpu")


def complete_class_pictures(
    pipeline: Any, folder: Path, section: DreamBoothSection, *, size: int, seed: int, reporter: Reporter
) -> None:
    """Draw pictures of the class into `folder` until it holds `section.class_count`.

    Each has a number and depends on it and the seed alone, and each is written whole under its name, so that an
    interrupted call can be repeated and two processes may work on one folder.

    Raises:
        OutputError: A picture cannot be written.
    """
    there = {path.name for path in picture_files(folder)}
    own = [name for name in there if not name.startswith(GENERATED.partition("{")[0])]
    names = [GENERATED.format(number=number) for number in range(section.class_count - len(own))]
    missing = [name for name in names if name not in there]
    if not missing:
        return
    with translated_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    prompt, step = section.class_prompt or "", section.draw_batch_size
    with reporter.bar(f"Drawing pictures of {prompt!r}", len(missing)) as advance:
        for start in range(0, len(names), step):
            # Always the same batches: a picture's last bits depend on those beside it.
            batch = names[start : start + step]
            if not (wanted := set(batch).intersection(missing)):
                continue
            generators = [generator_of(seed, "class", start + offset) for offset in range(len(batch))]
            drawn = draw(pipeline, [prompt] * len(batch), generators, section, size=size)
            for name, picture in zip(batch, drawn):
                if name in wanted:
                    write_picture(folder / name, picture)
            advance(len(wanted))


def write_picture(target: Path, picture: Any) -> None:
    """Write a PIL image as PNG under its final name or not at all.

    Raises:
        OutputError: Writing failed.
    """
    with translated_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        try:
            picture.save(partial, format="PNG")
            partial.replace(target)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
