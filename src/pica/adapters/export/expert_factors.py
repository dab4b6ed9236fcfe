"""Updates of stacks of experts as PEFT's LoRA on parameters (`target_parameters`): its tensors, its names, its reading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from pica.adapters.export.factors import SharedSpectrum, layer_factors
from pica.tuners.base.layer import SharedLayer
from pica.tuners.pica.experts import AdaptedExperts, PicaExpert, stored_input_first


def adapted_experts(root: nn.Module, adapter: str) -> dict[str, PicaExpert]:
    """{path of an expert: its layer} for those that the adapter adapts."""
    found = {m.path: m for m in root.modules() if isinstance(m, PicaExpert)}
    return {path: layer for path, layer in found.items() if adapter in layer.group_of}


def stack_paths(layers: Mapping[str, SharedLayer]) -> list[str]:
    """Paths of the parameters whose experts are among `layers`."""
    return list(dict.fromkeys(path.rpartition(".")[0] for path, m in layers.items() if isinstance(m, PicaExpert)))


def parameter_paths(root: nn.Module) -> list[str]:
    """Paths of all parameters of a base model, as PEFT matches them: without what wraps adapted experts."""
    return [name.replace(".base_layer.", ".") for name, _ in root.named_parameters()]


def stack_tensors(
    root: nn.Module, adapter: str, spectra: Mapping[str, SharedSpectrum], rank: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Write the updates of adapted stacks of experts as LoRA factors.

    PEFT wraps a module once for each of its parameters, the first innermost, and keeps the factors of all experts in one
    matrix each: A (experts * rank, columns), and B (rows, rank * experts), in which the experts run fastest.

    Args:
        root: The model.
        adapter: Its name there.
        spectra: {path: shared matrix} of the stacks.
        rank: Of the export; smaller factors are padded with zeros.
        dtype: Of the result.
    Returns:
        Tensors by their names in PEFT's file.
    """
    tensors: dict[str, Tensor] = {}
    for path, module in root.named_modules():
        if not isinstance(module, AdaptedExperts):
            continue
        stacks = {n: layers for n, layers in module.stacks().items() if adapter in layers[0].group_of}
        names = [n for n, _ in module.base_layer.named_parameters(recurse=False) if n in stacks]
        for depth, parameter in enumerate(reversed(names)):
            a_of, b_of = [], []
            for layer in stacks[parameter]:
                a, b = layer_factors(layer, adapter, spectra[layer.path], rank, dtype)  # (rank, in), (out, rank)
                if stored_input_first(module.base_layer) != _read_input_first(module.base_layer):
                    a, b = b.T, a.T  # the product transposed
                a_of.append(a)
                b_of.append(b)
            key = path + ".base_layer" * depth
            tensors[f"{key}.lora_A.weight"] = torch.cat(a_of).contiguous()
            tensors[f"{key}.lora_B.weight"] = torch.stack(b_of, dim=2).flatten(1).contiguous()
    return tensors


def expected_updates(
    root: nn.Module, adapter: str, spectra: Mapping[str, SharedSpectrum], rank: int
) -> dict[str, tuple[Tensor, float]]:
    """{path of a stack: (update in the stack's layout, relative error that truncation may have)}."""
    found = {}
    for path, module in root.named_modules():
        if not isinstance(module, AdaptedExperts):
            continue
        for parameter, layers in module.stacks().items():
            if adapter not in layers[0].group_of:
                continue
            updates = torch.stack([layer.method.update(adapter) for layer in layers])
            allowed = max(spectra[layer.path].row(rank).relative for layer in layers)
            found[f"{path}.{parameter}"] = (updates.mT if stored_input_first(module.base_layer) else updates, allowed)
    return found


def lora_update(wrapper: Any) -> tuple[str, Tensor]:
    """(parameter's name, update) of PEFT's LoRA on a parameter."""
    return wrapper.parameter_name, cast(Tensor, wrapper.get_delta_weight("default"))


def _read_input_first(module: nn.Module) -> bool:
    """Whether PEFT reads a stack as (experts, in, out)."""
    return bool(getattr(module, "is_transposed", False))
