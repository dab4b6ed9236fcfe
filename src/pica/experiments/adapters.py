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


def title_of(section: AdapterSection) -> str:
    """Method and size in a few words, for instance "pica r=32"."""
    if section.method != "svft":
        return f"{section.method} r={section.r}"
    band = "" if section.off_diagonals is None else f" d={section.off_diagonals}"
    return f"svft {section.pattern}{band}"


def size_of(section: AdapterSection) -> dict[str, Any]:
    """The settings that decide the number of parameters."""
    if section.method == "svft":
        return {"pattern": section.pattern, "off_diagonals": section.off_diagonals}
    return {"r": section.r}


def _layers(section: AdapterSection) -> dict[str, Any]:
    return {
        "task_type": "CAUSAL_LM",
        "target_modules": section.target_modules,
        "exclude_modules": section.exclude_modules,
        "layers_to_transform": section.layers_to_transform,
    }


def _common(section: AdapterSection) -> dict[str, Any]:
    return {**_layers(section), "r": section.r, "rank_pattern": dict(section.rank_pattern)}


def _pica(section: AdapterSection) -> peft.PeftConfig:
    return pica.PicaConfig(
        **_common(section),
        share="role" if section.share is None else section.share,
        projection=section.projection,
        save_basis=section.save_basis,
    )


def _svft(section: AdapterSection) -> peft.PeftConfig:
    return pica.SvftConfig(
        **_layers(section),
        pattern=section.pattern,
        off_diagonals=section.off_diagonals,
        share="none" if section.share is None else section.share,
    )


def _lora(section: AdapterSection) -> peft.PeftConfig:
    alpha = 2 * section.r if section.lora_alpha is None else section.lora_alpha
    return peft.LoraConfig(**_common(section), lora_alpha=alpha, lora_dropout=section.lora_dropout)  # pyright: ignore[reportArgumentType]


BUILDERS: dict[str, Callable[[AdapterSection], peft.PeftConfig]] = {"pica": _pica, "svft": _svft, "lora": _lora}
