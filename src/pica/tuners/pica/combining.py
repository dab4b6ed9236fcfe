"""Make one adapter out of several: on the same basis the weighted sum of updates is the update of the summed matrices."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch import Tensor

from pica.errors import ConfigError
from pica.tuners.base.bank import MatrixBank, SharedMatrices
from pica.tuners.pica.config import PicaConfig
from pica.tuners.pica.layer import PicaLinear

PRUNED: Mapping[str, Callable[..., Tensor]] = {
    "magnitude_prune": magnitude_prune,
    "ties": ties,
    "dare_linear": dare_linear,
    "dare_ties": dare_ties,
}
"""PEFT's ways to combine that leave some entries out; each takes a density."""

COMBINATIONS = ("linear", *PRUNED)


def check_combination(
    bank: MatrixBank | None,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    density: float | None,
) -> str:
    """Check that adapters can be added up exactly.

    Returns:
        The adapter whose configuration the combined one takes: that of the highest rank.
    Raises:
        ConfigError: An adapter is unknown, the name is taken, or the adapters cannot be added up exactly; says which.
    """
    if not adapters or len(adapters) != len(weights):
        raise ConfigError(
            f"{len(adapters)} adapters and {len(weights)} weights were given; each adapter needs one weight."
        )
    if combination_type not in COMBINATIONS:
        raise ConfigError(f"combination_type={combination_type!r} is unknown; use one of {', '.join(COMBINATIONS)}.")
    if combination_type != "linear" and (density is None or not 0 < density <= 1):
        raise ConfigError(f"combination_type={combination_type!r} needs a density in (0, 1], got {density}.")
    present = list(bank) if bank is not None else []
    unknown = [n for n in adapters if n not in present]
    if bank is None or unknown:
        raise ConfigError(f"Adapter {', '.join(map(repr, unknown))} is not in the model, which has {present}.")
    if adapter_name in present:
        raise ConfigError(f"Adapter {adapter_name!r} exists already; choose another name or delete it first.")
    slots = {name: bank.matrices(name) for name in adapters}
    widest = max(adapters, key=lambda name: max(m.shape[1] for m in slots[name].values()))
    for name in adapters:
        if problem := _difference(name, slots[name], widest, slots[widest]):
            raise ConfigError(f"Adapters {name!r} and {widest!r} cannot be added up: {problem}.")
    return widest


def _difference(name: str, slot: SharedMatrices, widest: str, widest_slot: SharedMatrices) -> str | None:
    """Why M of `name` does not mean the same in the layers and columns of `widest`, or None."""
    if slot.layers.keys() != widest_slot.layers.keys():
        path = next(iter(slot.layers.keys() ^ widest_slot.layers.keys()))
        return f"only one of them adapts {path}"
    partner: dict[str, str] = {}
    for path, layer in _pica_layers(slot):
        if partner.setdefault(layer.group_of[name], layer.group_of[widest]) != layer.group_of[widest]:
            return f"at {path} they share matrices between different layers"
        if not layer.method.same_basis(name, widest):
            return f"at {path} they use different bases"
        rank, most = layer.method.rank_of[name], layer.method.rank_of[widest]
        if rank < min(layer.method.group_rank(name), most) or rank > most:
            return f"at {path} their ranks ({rank} and {most}) follow different patterns"
    if len(set(partner.values())) != len(partner):
        return "they share matrices between different layers"
    return None


def config_of_combination(config: PicaConfig, *, save_basis: bool) -> PicaConfig:
    """A configuration for a new adapter like `config`'s, which nothing was loaded for."""
    combined = copy.deepcopy(config)
    combined.basis_format, combined.save_basis, combined.init_weights = None, save_basis, True
    return combined


@torch.no_grad()
def fill_combination(
    bank: MatrixBank,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    density: float | None,
) -> None:
    """Write the combined matrices into adapter `adapter_name`, (out, rank) each; missing columns count as zeros."""
    slot = bank.matrices(adapter_name)
    layer_of = {layer.group_of[adapter_name]: layer for _, layer in _pica_layers(slot)}
    for group, target in slot.items():
        layer = layer_of[group]
        parts = []
        for name in adapters:
            matrix = layer.matrix(name).detach()
            part = torch.zeros_like(target)
            part[:, : matrix.shape[1]] = matrix.to(part)
            parts.append(part)
        scales = torch.tensor(list(weights), dtype=target.dtype, device=target.device)
        if combination_type == "linear":
            target.copy_(task_arithmetic(parts, scales))
        else:
            target.copy_(PRUNED[combination_type](parts, scales, density))


def _pica_layers(slot: SharedMatrices) -> list[tuple[str, PicaLinear]]:
    return [(path, cast(PicaLinear, layer)) for path, layer in slot.layers.items()]
