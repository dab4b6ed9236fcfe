"""Diffusers pipelines that fit in a test, from their real classes, and pictures of a subject."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTH, TEXT = 24, 16
"""Side of a picture in pixels, twice that of its latents, and width of the text encoders."""
_CLIP = CLIPTextConfig(
    vocab_size=256 + 256 + 2,
    hidden_size=TEXT,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=20,
    projection_dim=TEXT,
    bos_token_id=512,
    eos_token_id=513,
    pad_token_id=513,
)


def tiny_tokenizer() -> CLIPTokenizer:
    """One token a byte, as CLIP's byte-level alphabet has it, with and without the end of a word."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + number for number in range(256 - len(printable))]
    letters = [chr(code) for code in [*printable, *others]]
    vocabulary = {text: index for index, text in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    vocabulary |= {"<|startoftext|>": 512, "<|endoftext|>": 513}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=20)


def tiny_vae(**changes: Any) -> AutoencoderKL:
    """Pictures to a half of their sides, 4 channels."""
    sizes: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": WIDTH,
    }
    return AutoencoderKL(**(sizes | changes))


def tiny_unet(**changes: Any) -> UNet2DConditionModel:
    """Two widths, so that a role alone does not make a group of layers."""
    sizes: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "sample_size": WIDTH // 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**(sizes | changes))


def _scheduler(**settings: Any) -> Any:
    return DDIMScheduler(clip_sample=False, steps_offset=1, **settings)


def write_stable_diffusion(folder: Path) -> Path:
    """A pipeline of Stable Diffusion 1's parts; the same bytes each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = StableDiffusionPipeline(
            vae=tiny_vae(),
            text_encoder=CLIPTextModel(_CLIP),
            tokenizer=tiny_tokenizer(),
            unet=tiny_unet(),
            scheduler=_scheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
            safety_checker=None,  # pyright: ignore[reportArgumentType] -- diffusers' own way to leave it out
            feature_extractor=None,  # pyright: ignore[reportArgumentType]
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return folder


def write_stable_diffusion_xl(folder: Path) -> Path:
    """A pipeline of Stable Diffusion XL's parts: two text encoders, and sizes as conditions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = tiny_unet(
            cross_attention_dim=2 * TEXT,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + TEXT,
            use_linear_projection=True,
        )
        pipeline = StableDiffusionXLPipeline(
            vae=tiny_vae(),
            text_encoder=CLIPTextModel(_CLIP),
            tokenizer=tiny_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(_CLIP),
            tokenizer_2=tiny_tokenizer(),
            unet=unet,
            scheduler=_scheduler(prediction_type="v_prediction"),
        )
    pipeline.save_pretrained(folder)
    return folder


def write_stable_diffusion_3(folder: Path) -> Path:
    """A pipeline of Stable Diffusion 3's parts: a transformer on patches, without its third text encoder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=WIDTH // 2,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=2 * TEXT,
            pos_embed_max_size=16,
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=CLIPTextModelWithProjection(_CLIP),
            tokenizer=tiny_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(_CLIP),
            tokenizer_2=tiny_tokenizer(),
            text_encoder_3=None,  # pyright: ignore[reportArgumentType] -- as its documentation has it, to save memory
            tokenizer_3=None,  # pyright: ignore[reportArgumentType]
        )
    pipeline.save_pretrained(folder)
    return folder


WRITERS = {"sd": write_stable_diffusion, "sdxl": write_stable_diffusion_xl, "sd3": write_stable_diffusion_3}


def subject(number: int, *, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """A red disc with a blue bar, somewhere on a grey ground."""
    generator = np.random.default_rng(number)
    rows, columns = np.mgrid[: size[1], : size[0]]
    centre = generator.uniform(0.4, 0.6, 2)
    disc = (columns / size[0] - centre[0]) ** 2 + (rows / size[1] - centre[1]) ** 2 < 0.08
    pixels = np.full((*disc.shape, 3), generator.uniform(90, 160))
    pixels[disc] = (220, 40, 40)
    pixels[disc & (abs(rows / size[1] - centre[1]) < 0.06)] = (30, 60, 220)
    return Image.fromarray(pixels.astype(np.uint8))


def write_subject(folder: Path, count: int = 3, *, offset: int = 0) -> Path:
    """That many pictures of the subject, of different sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(offset, offset + count):
        subject(number, size=(40 + number, 32)).save(folder / f"{number:02d}.png")
    return folder
