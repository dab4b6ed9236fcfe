"""From a recipe's adapter section to a model that carries the adapter."""

from collections.abc import Callable
from typing import Any

import peft
from transformers import PreTrainedModel, set_seed

import pica
from pica.errors import PicaError, TargetError
from pica.experiments.recipe import AdapterSection, BaselineSection


def peft_config(section: AdapterSection) -> peft.PeftConfig:
    """The PEFT configuration that a (checked) adapter section describes."""
    return BUILDERS[section.method](section)


def baseline_section(baseline: BaselineSection, adapter: AdapterSection) -> AdapterSection:
    """The baseline as an adapter section of its own: another method and rank on the same layers."""
    return AdapterSection(
        method=baseline.method or "lora",
        r=baseline.r,
        target_modules=adapter.target_modules,
        exclude_modules=adapter.exclude_modules,
        layers_to_transform=adapter.layers_to_transform,
    )


def attach(model: PreTrainedModel, section: AdapterSection, *, seed: int) -> peft.PeftModel:
    """Put a new adapter on a model; the model's own weights are frozen.

    Args:
        model: Base model; its layers are replaced in place.
        section: Method and shape of the adapter.
        seed: Decides random initial values.

    Raises:
        TargetError: A target matches no layer, or the method refuses the model.
    """
    pica.register()
    set_seed(seed)
    try:
        adapted = peft.get_peft_model(model, peft_config(section))
    except PicaError:
        raise
    except ValueError as error:
        raise TargetError(f"Method {section.method} cannot be put on this model: {error}") from error
    assert isinstance(adapted, peft.PeftModel)
    return adapted


def parameter_counts(model: peft.PeftModel) -> dict[str, int]:
    """Trainable parameters and all parameters."""
    trainable, total = model.get_nb_trainable_parameters()
    return {"trainable": trainable, "total": total}


def _common(section: AdapterSection) -> dict[str, Any]:
    return {
        "task_type": "CAUSAL_LM",
        "r": section.r,
        "target_modules": section.target_modules,
        "exclude_modules": section.exclude_modules,
        "layers_to_transform": section.layers_to_transform,
        "rank_pattern": dict(section.rank_pattern),
    }


def _pica(section: AdapterSection) -> peft.PeftConfig:
    return pica.PicaConfig(
        **_common(section), share=section.share, projection=section.projection, save_basis=section.save_basis
    )


def _lora(section: AdapterSection) -> peft.PeftConfig:
    alpha = 2 * section.r if section.lora_alpha is None else section.lora_alpha
    return peft.LoraConfig(**_common(section), lora_alpha=alpha, lora_dropout=section.lora_dropout)  # pyright: ignore[reportArgumentType]


BUILDERS: dict[str, Callable[[AdapterSection], peft.PeftConfig]] = {"pica": _pica, "lora": _lora}
