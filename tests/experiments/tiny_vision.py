"""Vision models that fit in a test, from their real classes, and pictures whose class a model can learn to see."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    ConvNextConfig,
    ConvNextModel,
    PretrainedConfig,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

SIZE = 32
VIT = ViTConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    image_size=SIZE,
    patch_size=8,
    initializer_range=0.1,
)
SWIN = SwinConfig(image_size=SIZE, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
CONVNEXT = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2, image_size=SIZE)
CLASSES = ("circle", "stripes")


def write_tiny_vision(folder: Path, config: PretrainedConfig = VIT) -> Path:
    """Write the body of a model, without a head, and its image processor; the same bytes each time."""
    make: Any = {"vit": ViTModel, "swin": SwinModel, "convnext": ConvNextModel}[config.model_type]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(config, **({"add_pooling_layer": False} if config.model_type == "vit" else {}))
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    return folder


def picture(number: int, *, size: tuple[int, int] = (40, 36)) -> tuple[Image.Image, str]:
    """A noisy circle or stripes, of any colour and place, by whether the number is even; different for each number."""
    generator = np.random.default_rng(number)
    rows, columns = np.mgrid[: size[1], : size[0]]
    if number % 2:
        inside = (columns // 4) % 2 == 0
    else:
        centre = generator.uniform(0.4, 0.6, 2)
        inside = (columns / size[0] - centre[0]) ** 2 + (rows / size[1] - centre[1]) ** 2 < 0.09
    colour = generator.uniform(120, 255, 3)
    pixels = inside[..., None] * colour + generator.uniform(0, 30, (*inside.shape, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), CLASSES[number % 2]


def write_pictures(folder: Path, count: int, *, offset: int = 0) -> Path:
    """Class folders with that many pictures together."""
    for number in range(offset, offset + count):
        made, label = picture(number)
        (folder / label).mkdir(parents=True, exist_ok=True)
        made.save(folder / label / f"{number:04d}.png")
    return folder
