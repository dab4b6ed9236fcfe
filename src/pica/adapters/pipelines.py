"""Adapters of text-to-image pipelines: which part of a pipeline one belongs to, and how it gets there.

An adapter of a pipeline is that of its denoiser (`unet` or `transformer`), a PEFT folder like any other. Where the text
encoder was trained too, that one's adapter is a folder `text_encoder` inside it. Nothing here imports diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, set_peft_model_state_dict
from peft.utils import load_peft_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pica.errors import AdapterFileError, ConfigError, PicaError
from pica.text import first_line

DENOISERS = ("unet", "transformer")
TEXT_ENCODER = "text_encoder"
_SAMPLES, _TOKENS = 2, 7


def adapter_folders(folder: Path) -> dict[str | None, Path]:
    """{name of the part: its adapter folder}; the denoiser, whose name depends on the pipeline, comes first as None."""
    found: dict[str | None, Path] = {None: folder}
    if (folder / TEXT_ENCODER / "adapter_config.json").is_file():
        found[TEXT_ENCODER] = folder / TEXT_ENCODER
    return found


def denoiser_name(class_name: str) -> str:
    """What a diffusers model of this class is called inside its pipelines."""
    return "unet" if "UNet" in class_name else "transformer"


def part_name(class_name: str) -> str:
    """Name of a part of a pipeline, and of its subfolder, by its class; text encoders count as the first one."""
    return TEXT_ENCODER if class_name.startswith(("CLIP", "T5")) else denoiser_name(class_name)


def stored_dtype(folder: Path) -> torch.dtype:
    """Precision of a model's files; float32 if they do not say. diffusers, unlike transformers, does not look by itself."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 -- the file object is no mapping
                if (tensor := opened.get_tensor(name)).is_floating_point():
                    return tensor.dtype
    return torch.float32


def load_into_pipeline(pipeline: Any, folder: str | Path, adapter_name: str = "default") -> tuple[str, ...]:
    """Put a saved adapter on a diffusers pipeline, in place, and make it the active one.

    It is added as diffusers adds its own, so that `pipeline.set_adapters`, `fuse_lora`, `unfuse_lora` and
    `delete_adapters` work on it. An adapter of PiCa or SVFT is held against the pipeline's weights first.

    Args:
        pipeline: A pipeline with a `unet` or a `transformer`.
        folder: Adapter folder, of any PEFT method that diffusers can add; a `text_encoder` folder in it counts too.
        adapter_name: What it is called in the pipeline.
    Returns:
        Names of the parts of the pipeline that have it now.
    Raises:
        AdapterFileError: the folder holds no adapter, or one that is damaged or made for another kind of model.
        BasisMismatchError: the adapter was trained on other weights.
        ConfigError: the pipeline has no part for it, or an adapter of that name.
    """
    import pica

    pica.register()
    place = Path(folder).expanduser()
    name = next((name for name in DENOISERS if getattr(pipeline, name, None) is not None), None)
    if name is None:
        raise ConfigError(
            f"{type(pipeline).__name__} has neither a unet nor a transformer, so no adapter belongs to it."
        )
    done: list[str] = []
    try:
        for part, where in adapter_folders(place).items():
            target = part or name
            model = getattr(pipeline, target, None)
            if model is None:
                raise ConfigError(f"{type(pipeline).__name__} has no {target}, which adapter {str(place)!r} needs.")
            _add(model, where, adapter_name, done, target)
    except BaseException:
        for target in done:
            _remove(getattr(pipeline, target), adapter_name)
        raise
    return tuple(done)


def _add(model: nn.Module, folder: Path, adapter_name: str, done: list[str], target: str) -> None:
    config, state = _read(folder)
    made_for = (config.auto_mapping or {}).get("base_model_class")
    if made_for is not None and made_for != type(model).__name__:
        raise AdapterFileError(
            f"Adapter {str(folder)!r} belongs to a {made_for}, and the pipeline's {target} is a {type(model).__name__}."
        )
    if adapter_name in (getattr(model, "peft_config", None) or {}):
        raise ConfigError(f"The pipeline has an adapter {adapter_name!r} already; choose another adapter_name.")
    config.inference_mode = True
    adds: Any = model
    done.append(target)
    try:
        adds.add_adapter(config, adapter_name=adapter_name)
        result: Any = set_peft_model_state_dict(model, state, adapter_name=adapter_name)
    except PicaError:
        raise
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise AdapterFileError(f"Adapter {str(folder)!r} cannot be loaded: {first_line(error)}") from error
    if result is not None and result.unexpected_keys:
        raise AdapterFileError(
            f"Adapter {str(folder)!r} does not fit the pipeline's {target}: it holds {result.unexpected_keys[0]}, which "
            "that has no place for."
        )
    model.eval()


def _read(folder: Path) -> tuple[PeftConfig, dict[str, Tensor]]:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():  # PEFT would look for it on the hub
            raise AdapterFileError(f"{str(folder)!r} is no adapter folder: it holds no {name}.")
    try:
        return PeftConfig.from_pretrained(str(folder)), load_peft_weights(str(folder), device="cpu")
    except PicaError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise AdapterFileError(f"Adapter {str(folder)!r} cannot be read: {first_line(error)}") from error


def _remove(model: Any, adapter_name: str) -> None:
    """Take back what `_add` did, as far as it got."""
    configs = getattr(model, "peft_config", None) or {}
    if adapter_name not in configs:
        return
    if len(configs) == 1 and hasattr(model, "unload_lora"):
        model.unload_lora()
    elif hasattr(model, "delete_adapters"):
        model.delete_adapters(adapter_name)
    else:
        model.delete_adapter(adapter_name)


def denoiser_inputs(model: nn.Module) -> dict[str, Any] | None:
    """Make inputs for a denoiser.

    Known are UNet2DConditionModel (with the conditions of Stable Diffusion 1, 2 and XL) and SD3Transformer2DModel.

    Returns:
        Random keyword arguments of its forward pass, the same each time; None for models of other classes.
    """
    config: Any = getattr(model, "config", None)
    kind = type(model).__name__
    if kind not in ("UNet2DConditionModel", "SD3Transformer2DModel"):
        return None
    first = next(model.parameters())
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=first.device, dtype=first.dtype)

    side = min(int(config.sample_size), 32)  # larger ones take long and tell no more
    steps = torch.tensor([1, 500], device=first.device)
    latents = random(_SAMPLES, config.in_channels, side, side)
    if kind == "SD3Transformer2DModel":
        return {
            "hidden_states": latents,
            "encoder_hidden_states": random(_SAMPLES, _TOKENS, config.joint_attention_dim),
            "pooled_projections": random(_SAMPLES, config.pooled_projection_dim),
            "timestep": steps.to(first.dtype),
        }
    width = config.cross_attention_dim
    width = width if isinstance(width, int) else max(width)
    inputs: dict[str, Any] = {
        "sample": latents,
        "timestep": steps,
        "encoder_hidden_states": random(_SAMPLES, _TOKENS, width),
    }
    if config.addition_embed_type == "text_time":
        sizes = torch.tensor([256, 256, 0, 0, 256, 256], device=first.device, dtype=first.dtype)
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": random(_SAMPLES, pooled), "time_ids": sizes.expand(_SAMPLES, -1)}
    elif config.addition_embed_type is not None or config.class_embed_type is not None:
        return None
    return inputs


def text_encoder_tensors(tensors: Mapping[str, Tensor], class_name: str, *, nested: bool) -> dict[str, Tensor]:
    """Name a text encoder's LoRA as diffusers reads it.

    Args:
        tensors: By path inside the text encoder.
        class_name: Of the text encoder.
        nested: Whether its layers lie in a module "text_model", as they do in older versions of transformers; diffusers
            expects that in files, and takes it off where it is not so.
    Returns:
        The same tensors by their names in diffusers' file.
    """
    inner = "" if nested or not class_name.startswith("CLIP") else "text_model."
    return {f"{TEXT_ENCODER}.{inner}{name}": tensor for name, tensor in tensors.items()}
