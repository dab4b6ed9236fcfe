"""From a recipe's adapter section to a model that carries the adapter."""

from collections.abc import Sequence
from typing import Any

import peft
import torch
from peft.utils import ModulesToSaveWrapper
from transformers import PreTrainedModel, set_seed

import pica
from pica.errors import PicaError, TargetError
from pica.experiments.methods import METHODS, configuration
from pica.experiments.recipes.recipe import AdapterSection, BaselineSection
from pica.experiments.results.run import ParameterCounts

_TOLD = (
    "projection",
    "calibration",
    "share",
    "rank_pattern",
    "lora_alpha",
    "lora_dropout",
)  # by a title, where they are set


def peft_config(
    section: AdapterSection, *, task_type: str | None = "CAUSAL_LM", modules_to_save: Sequence[str] = ()
) -> peft.PeftConfig:
    """The PEFT configuration that a (checked) adapter section describes; see `attach` for the other arguments."""
    config: Any = configuration(section)
    config.task_type = task_type
    if modules_to_save:
        config.modules_to_save = [*(config.modules_to_save or ()), *modules_to_save]
    return config


def baseline_section(baseline: BaselineSection, adapter: AdapterSection) -> AdapterSection:
    """The baseline as an adapter section of its own: another method and rank on the same layers."""
    return AdapterSection(
        method=baseline.method or "lora",
        r=baseline.r,
        target_modules=adapter.target_modules,
        exclude_modules=adapter.exclude_modules,
        layers_to_transform=adapter.layers_to_transform,
    )


def attach(
    model: PreTrainedModel,
    section: AdapterSection,
    *,
    seed: int,
    task_type: str | None = "CAUSAL_LM",
    modules_to_save: Sequence[str] = (),
) -> peft.PeftModel:
    """Put a new adapter on a model; the model's own weights are frozen.

    Args:
        model: Base model; its layers are replaced in place.
        section: Method and shape of the adapter.
        seed: Decides random initial values.
        task_type: PEFT's name for the model's task; None for those that it has no name for.
        modules_to_save: Modules that are trained in full and stored with the adapter.
    Returns:
        The model with the adapter.
    Raises:
        TargetError: A target matches no layer, or the method refuses the model.
        PicaError: The package's own method refuses something else, for instance a rank.
    """
    pica.register()
    if section.method == "head" and not modules_to_save:
        raise TargetError(
            "Method head trains newly made layers only, and this model has none: it generates text, or comes with a trained "
            "head for as many classes."
        )
    set_seed(seed)
    try:
        adapted = peft.get_peft_model(model, peft_config(section, task_type=task_type, modules_to_save=modules_to_save))
    except PicaError:
        raise
    except ValueError as error:
        raise TargetError(f"Method {section.method} cannot be put on this model: {error}") from error
    assert isinstance(adapted, peft.PeftModel)
    # what method head trains is not beside its parameters: they are its parameters
    adapted.head_modules = [] if section.method == "head" else list(modules_to_save)  # pyright: ignore[reportArgumentType] -- an attribute of ours
    return adapted


def parameter_counts(model: peft.PeftModel) -> ParameterCounts:
    """Of a model that carries an adapter."""
    trainable, total = model.get_nb_trainable_parameters()
    head = sum(parameter.numel() for parameter in head_parameters(model))
    return ParameterCounts(trainable=trainable, head=head, total=total)


def head_parameters(model: peft.PeftModel) -> list[torch.nn.Parameter]:
    """Trained parameters of the modules that `attach` was told to train in full, whatever the method itself does so."""
    names = getattr(model, "head_modules", [])
    wrappers = [
        module
        for path, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and any(f".{path}".endswith(f".{name}") for name in names)
    ]
    return [parameter for module in wrappers for parameter in module.parameters() if parameter.requires_grad]


def title_of(section: AdapterSection) -> str:
    """Name an adapter's method and size in a few words.

    Returns:
        For instance "pica r=32", and whatever else is not the method's default, so that two sections that differ in a
        setting of the method have different titles: "pica r=32, projection=random".
    """
    title = section.method
    if METHODS[section.method].rank is not None:
        title += f" r={section.r}"
    if section.method == "svft":
        title += f" {section.pattern}" + ("" if section.off_diagonals is None else f" d={section.off_diagonals}")
    usual = AdapterSection()
    told = [f"{name}={getattr(section, name)}" for name in _TOLD if getattr(section, name) != getattr(usual, name)]
    told += [f"{name}={value}" for name, value in section.options.items()]
    return ", ".join([title, *told])


def size_of(section: AdapterSection) -> dict[str, Any]:
    """The settings that decide the number of parameters."""
    if section.method == "svft":
        return {"pattern": section.pattern, "off_diagonals": section.off_diagonals}
    return {"r": section.r} if METHODS[section.method].rank is not None else {}
