"""What one SVFT adapter needs, worked out and solved before the model is touched."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from pica.basis import Factorisation, factorise, with_progress
from pica.errors import LaunchError
from pica.tuners.base.bank import MatrixBank, plain_name
from pica.tuners.base.roles import Group, Member, plan_groups
from pica.tuners.base.sharding import check_placement, loads_in_one_process
from pica.tuners.base.targets import target_layers
from pica.tuners.svft.config import SvftConfig
from pica.tuners.svft.layer import SHARED, Entries, SvftLinear, add_positions, choose_positions
from pica.tuners.svft.pattern import affinity

if TYPE_CHECKING:
    from pica.tuners.base.tuner import BankedModel


class SvftPlan:
    """What one adapter needs.

    Attributes:
        groups: For the plain path of each target layer, its group; a group's width and rank are n, the width of T.
        entries: Which entries each group trains, by its key.
        bases: Singular vectors, by path: for layers that have none yet and whose weights are materialised. In the layer's
            compute dtype, since all of a model's at once take up to twice the model.
        positions: Of each group whose product needs them, by its key; none while the weights are on the meta device.
    """

    def __init__(self, tuner: BankedModel, config: SvftConfig) -> None:
        if loads_in_one_process():
            raise LaunchError(
                "SVFT: FSDP loads the base model in the first process only, and singular vectors are not sent to the "
                "others; set fsdp_cpu_ram_efficient_loading to false."
            )
        found = {plain_name(path): module for path, module in target_layers(tuner, config, SvftLinear)}
        # A bare layer only knows how to read its weight once it is wrapped; the wrapper made here is thrown away.
        self._layers = {
            path: module if isinstance(module, SvftLinear) else SvftLinear(module, MatrixBank(), path, tuner.model)
            for path, module in found.items()
        }
        check_placement(tuner.model, {path: layer.frozen.raw() for path, layer in self._layers.items()})
        members = [
            Member(path, layer.method.width, layer.in_features, layer.method.width)
            for path, layer in self._layers.items()
        ]
        self.groups: dict[str, Group] = {}
        self.entries: dict[str, Entries] = {}
        for group in plan_groups(members, config.share):
            n = group.width
            self.groups.update({m.path: group for m in group.members})
            band = min(config.band, max(n - 1, 0))
            self.entries[group.key] = Entries(n, config.pattern, band, config.pattern_seed)
        if short := [g for g in self.groups.values() if g.width <= config.band]:
            warnings.warn(
                f"SVFT: off_diagonals={config.band} is more than some layers have; {short[0].members[0].path} (width "
                f"{short[0].width}) trains all its entries.",
                stacklevel=2,
            )
        self.bases: dict[str, Factorisation] = {}
        self.positions: dict[str, Tensor] = {}
        self._solve(config.pattern)

    def _solve(self, pattern: str) -> None:
        scores: dict[str, Tensor] = {}

        def solve(path: str) -> None:
            layer, group = self._layers[path], self.groups[path].key
            if layer.bases.has(SHARED):
                left, right = layer.bases.left(SHARED), cast(Tensor, layer.bases.rows(SHARED))
            else:
                basis = factorise(layer.frozen.read(), name=path)
                left, right = basis.left, basis.right
                dtype = layer.frozen.device_and_dtype()[1]
                self.bases[path] = replace(basis, left=left.to(dtype), right=right.to(dtype))
            if pattern == "top_k":  # the layers that share a T: by the mean square of their affinities
                square = affinity(left, right).square()
                scores[group] = scores[group].to(square.device) + square if group in scores else square

        have = {path for path, layer in self._layers.items() if layer.bases.has(SHARED)}
        ready = [path for path, layer in self._layers.items() if path in have or not layer.frozen.is_deferred()]
        todo = [path for path in ready if pattern == "top_k" or path not in have]
        with_progress(map(solve, todo), len(todo))
        for group in {self.groups[path].key: self.groups[path] for path in ready}.values():
            complete = all(m.path in ready for m in group.members)
            if complete and self.entries[group.key].has_positions:
                self.positions[group.key] = choose_positions(self.entries[group.key], group.key, scores.get(group.key))

    def attach(self, layer: SvftLinear, adapter_name: str) -> None:
        """Give a layer the adapter that was planned for it."""
        path = layer.path
        group = self.groups[path].key
        # taken out, so that the solved sides are not held twice
        layer.attach(adapter_name, group)
        layer.method.attach(adapter_name, self.entries[group], self.bases.pop(path, None))
        positions = self.positions.get(group)
        device, _ = layer.frozen.device_and_dtype()
        add_positions(layer, adapter_name, None if positions is None else positions.to(torch.device(device)))
