"""What one adapter needs, worked out and solved before the model is touched."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pica.basis import Basis, BasisRequest, WantedSide, max_rank, solve_many
from pica.basis.checkpoint import open_checkpoint, renaming
from pica.basis.file import BasisFile
from pica.errors import ConfigError
from pica.tuners.base.bank import MatrixBank, plain_name
from pica.tuners.base.frozen_weight import features_of
from pica.tuners.base.matching import matches
from pica.tuners.base.roles import Group, Member, plan_groups
from pica.tuners.base.sharding import check_placement, describe, loads_in_one_process
from pica.tuners.base.targets import target_layers
from pica.tuners.pica.config import PicaConfig
from pica.tuners.pica.experts import ExpertView, PicaExpert, expert_layers, target_stacks
from pica.tuners.pica.from_file import basis_from_file, named_basis, names_in
from pica.tuners.pica.layer import PicaLinear, projection_key
from pica.tuners.pica.sides import input_side_of, short_names
from pica.tuners.pica.source import source_of

if TYPE_CHECKING:
    from pica.tuners.base.tuner import BankedModel


logger = logging.getLogger(__name__)


class Stack(NamedTuple):
    """Experts that `target_parameters` chose: the path of their module, their parameter, and each of them by its path."""

    path: str
    parameter: str
    experts: dict[str, nn.Module]


class PicaPlan:
    """What one adapter needs, worked out before the model is touched.

    Attributes:
        groups, requests: For the plain path of each target layer, its group and what it asks of its basis.
        bases: Solved bases, by path: for layers that have none of that projection yet, or too small a one, and whose
            weights are materialised.
        stacks: Experts among the layers.
    """

    def __init__(self, tuner: BankedModel, config: PicaConfig) -> None:
        layers = {plain_name(path): module for path, module in target_layers(tuner, config, PicaLinear)}
        self.stacks: list[Stack] = []
        named = {path: path for path in layers}  # experts go by the name of their stack
        for path, module, parameter in target_stacks(tuner.model, config):
            experts = expert_layers(plain_name(path), module, parameter)
            self.stacks.append(Stack(path, parameter, experts))
            named.update(dict.fromkeys(experts, f"{path}.{parameter}"))
            layers.update(experts)
        stored = config.save_basis and config.basis_format is not None
        made = named_basis(config, needed=not stored)
        names = {} if made is None else names_in(made, list(layers))
        shapes = {path: _shape_of(_base_of(module)) for path, module in layers.items()}
        input_side = input_side_of(config, shapes, None if made is None else _of_input_side(made, names))
        if config.projection == "gradient":
            config.input_side = short_names(input_side, shapes)
        members = []
        limited: list[str] = []
        idle = set(config.rank_pattern)
        for path, (out_features, in_features) in shapes.items():
            hits = [p for p in config.rank_pattern if matches(p, named[path], what="rank_pattern")]
            idle.difference_update(hits)
            wanted = config.rank_pattern[hits[0]] if hits else config.r
            rank = min(wanted, max_rank(out_features, in_features, config.projection))
            if rank < wanted:
                limited.append(f"{path} ({out_features} x {in_features}: {rank})")
            members.append(Member(path, out_features, in_features, rank, path in input_side))
        if limited:
            more = f" and {len(limited) - 1} more" if len(limited) > 1 else ""
            warnings.warn(
                f"PiCa: the rank asked for is larger than what some layers allow; they use all the directions they have: "
                f"{limited[0]}{more}.",
                stacklevel=2,
            )
        if idle:  # in PEFT's words, which does not get to see them
            warnings.warn(
                f"The following rank_pattern keys did not match any targeted module and were ignored: {sorted(idle)}.",
                RuntimeWarning,
                stacklevel=2,
            )
        self.groups: dict[str, Group] = {}
        for group in plan_groups(members, config.share):
            self.groups.update({m.path: group for m in group.members})
        # A bare layer only knows how to read its weight once it is wrapped; the wrapper made here is thrown away.
        wrapped = {
            path: module if isinstance(module, PicaLinear) else _wrap(module, path, tuner.model)
            for path, module in layers.items()
        }
        tensors = _named_tensors(config, wrapped) if made is None else names
        self.requests = {m.path: _request(m, config, tensors, made) for m in members}
        # A saved adapter that brings its basis needs none solved; should its file never be read, the layers solve later.
        self.bases = self._solve(tuner.model, wrapped, stored=stored)

    def attach(self, layer: PicaLinear, adapter_name: str) -> None:
        """Give a layer the adapter that was planned for it."""
        path = layer.path
        layer.attach(adapter_name, self.groups[path].key)
        layer.method.attach(adapter_name, self.requests[path], self.bases.get(path))

    def _solve(self, root: nn.Module, wrapped: dict[str, PicaLinear], stored: bool) -> dict[str, Basis]:
        raw = {path: layer.frozen.raw() for path, layer in wrapped.items()}
        check_placement(root, raw)
        await_others = loads_in_one_process()  # whose bases this one receives, though its weights are not here yet
        needed = [
            request
            for path, request in self.requests.items()
            if not stored
            and (await_others or not wrapped[path].frozen.is_deferred())
            and _lacks_basis(wrapped[path], request)
        ]
        read = {r.name: basis_from_file(wrapped[r.name], r) for r in needed if r.file is not None}
        needed = [request for request in needed if request.file is None]
        names = [request.name for request in needed]
        shapes = {n: (wrapped[n].out_features, wrapped[n].in_features) for n in names}
        holdings = describe({n: raw[n] for n in names}, shapes)

        def load(request: BasisRequest) -> tuple[Tensor, WantedSide]:
            source = source_of(wrapped[request.name], request, check=True)
            return source.weight, source.side

        solved = read | (dict(zip(names, solve_many(needed, load, holdings))) if needed else {})
        found = {n: b.clear_rank for n, b in solved.items()}
        short = [n for n, rank in found.items() if rank < self.requests[n].rank]
        if short:
            more = f" and {len(short) - 1} more" if len(short) > 1 else ""
            warnings.warn(
                f"PiCa: {short[0]}{more}: the {'basis' if short[0] in read else 'weight'} has fewer directions with a "
                f"{'' if short[0] in read else 'singular '}value above rounding than the rank asked for "
                f"({found[short[0]]} of {self.requests[short[0]].rank}); the layer uses those it has.",
                stacklevel=2,
            )
        return solved


def _request(member: Member, config: PicaConfig, tensors: dict[str, str], made: BasisFile | None) -> BasisRequest:
    tensor, turned = tensors.get(member.path, ""), member.input_side
    if made is not None:
        place, digest = str(made.path), made.digest
        return BasisRequest(member.path, member.rank, config.projection, "in", 0, None, tensor, place, digest, turned)
    checkpoint, seed = config.basis_from if tensor else None, config.projection_seed
    return BasisRequest(
        member.path, member.rank, config.projection, "auto", seed, checkpoint, tensor, input_side=turned
    )


def _of_input_side(made: BasisFile, names: dict[str, str]) -> set[str]:
    """Layers of which a basis has directions of their output."""
    known = set(made.about.input_side)
    return {path for path, name in names.items() if name in known}


def _named_tensors(config: PicaConfig, layers: dict[str, PicaLinear]) -> dict[str, str]:
    """Find out what the layers' weights are called in the checkpoint that `basis_from` names.

    Experts' own weights count: nothing quantises their stacks, and checkpoints may hold them apart, under other names.
    Where a saved adapter's checkpoint cannot be found, the base model itself may be that checkpoint, or the adapter may
    bring its bases; its fingerprint tells.

    Returns:
        Names by layer; nothing for a layer whose own weight counts.
    Raises:
        ConfigError: There is no such checkpoint, or it is another model's.
    """
    if config.basis_from is None:
        return {}
    try:
        folder = open_checkpoint(config.basis_from)
    except ConfigError as error:
        quantised = any(layer.frozen.quantised for layer in layers.values())
        if config.basis_format is not None and (config.save_basis or not quantised):
            logger.info("basis_from=%r cannot be had (%s); using this base model's weights", config.basis_from, error)
            return {}
        raise ConfigError(
            f"The bases cannot be had from basis_from={config.basis_from!r}: {error} Set basis_from in the configuration "
            "to where the unquantised checkpoint is."
        ) from error
    paths = [path for path, layer in layers.items() if not isinstance(layer, PicaExpert)]
    name_of = renaming([f"{path}.weight" for path in paths], folder.entries)
    if missing := [path for path in paths if name_of(f"{path}.weight") not in folder.entries]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(
            f"basis_from={config.basis_from!r} has no weight for {missing[0]}{more}; name the unquantised checkpoint of "
            "the same model, with the same module names."
        )
    return {path: name_of(f"{path}.weight") for path in paths}


def _wrap(module: nn.Module, path: str, root: nn.Module) -> PicaLinear:
    return (PicaExpert if isinstance(module, ExpertView) else PicaLinear)(module, MatrixBank(), path, root)


def _base_of(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a layer's weight."""
    in_features, out_features = features_of(module)
    return out_features, in_features


def _lacks_basis(layer: PicaLinear, request: BasisRequest) -> bool:
    known = layer.bases.requests.get(projection_key(request))
    return known is None or known.rank < request.rank or layer.bases.rows(projection_key(request)) is None
