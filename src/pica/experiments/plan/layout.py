"""A model of any size laid out on the meta device, quantised or not, and adapters put on it there."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel
from transformers import AutoModel, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

import pica
from pica.errors import ConfigError, PicaError
from pica.experiments.plan.packing import quantise
from pica.foreign_code import code_options
from pica.tuners.base.basis_store import Projector
from pica.tuners.pica.layer import PicaLinear
from pica.tuners.pica.source import preferred_side


def build(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    packing: BitsAndBytesConfig | None = None,
    *,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build the model of a configuration: the class that it names, else a causal language model.

    With `packing` its linear layers are bitsandbytes'; with `trust_remote_code` code that comes with the model is run.

    Returns:
        The model, on the meta device.
    Raises:
        ConfigError: transformers cannot build one, or it generates no text and is to be quantised.
    """
    model = _built(copy.deepcopy(config), dtype, code_options(trust_remote_code))  # quantising writes to it
    if packing is not None:
        if not model.can_generate():
            raise ConfigError(
                f"--quantization is for models that generate text, as in pica train; {type(model).__name__} does not."
            )
        quantise(model, packing, dtype)
    return model


def _built(config: PreTrainedConfig, dtype: torch.dtype, code: dict[str, bool]) -> PreTrainedModel:
    names = getattr(config, "architectures", None) or []
    named = getattr(transformers, names[0], None) if names else None
    try:
        with torch.device("meta"):
            if isinstance(named, type) and issubclass(named, PreTrainedModel):
                return named._from_config(config, dtype=dtype)
            generates = type(config) in AutoModelForCausalLM._model_mapping or (
                code["trust_remote_code"] and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
            )
            auto: Any = AutoModelForCausalLM if generates else AutoModel
            return auto.from_config(config, dtype=dtype, **code)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, ImportError) as error:
        line = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(
            f"A model of type {config.model_type!r} cannot be built from its config: {line[0]}"
        ) from error


def adapt(model: PreTrainedModel, config: peft.PeftConfig, notes: list[str]) -> PeftModel:
    """Put an adapter on a model of the meta device; warnings on PiCa's ranks become notes.

    Returns:
        The model with it, still there.
    Raises:
        ConfigError: The family has no default targets.
        PicaError: PiCa refuses the targets.
    """
    pica.register()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    except PicaError:
        raise
    except ValueError as error:
        if "target_modules" in str(error) and getattr(config, "target_modules", None) is None:
            raise ConfigError(
                f"There are no default targets for {model.config.model_type!r}; name the layers with --target-modules."
            ) from error
        raise ConfigError(f"The adapter cannot be put on the model: {error}") from error
    notes.extend(str(w.message).removeprefix("PiCa: ") for w in caught if str(w.message).startswith("PiCa: "))
    if not isinstance(adapted, PeftModel):
        raise ConfigError(f"PEFT cannot adapt a {type(model).__name__}.")
    for layer in adapted.modules():
        if isinstance(layer, PicaLinear):
            for projection, request in layer.bases.requests.items():
                wanted = preferred_side(layer, torch.empty(layer.out_features, layer.in_features, device="meta"))
                side = "in" if wanted == "in" else "out"
                columns = layer.in_features if side == "in" else layer.out_features
                projector = torch.empty(request.rank, columns, device="meta")
                layer.bases.put(projection, Projector(projector, side, "eigh", request.rank))
    return adapted
