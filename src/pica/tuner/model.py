"""`PicaModel`: puts PiCa layers into a base model and keeps their shared matrices in one bank."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from pica.basis import Basis, BasisRequest, Side, max_rank, solve_many
from pica.errors import AdapterFileError, TargetError
from pica.tuner.bank import BANK_NAME, PicaBank, drop_bank, ensure_bank, find_banks, get_bank, plain_name
from pica.tuner.config import PicaConfig
from pica.tuner.layer import PicaLinear, features_of, projection_key
from pica.tuner.roles import Group, Member, plan_groups
from pica.tuner.targets import DEFAULT_TARGETS, check_targets, is_supported


class PicaModel(BaseTuner):
    """A base model with PiCa adapters, as `peft.get_peft_model` makes it from a `PicaConfig`.

    Adding an adapter first plans it (which layers, which groups, which bases have to be solved) and solves every basis,
    and only then touches the model, so that an error leaves the model as it was.
    """

    prefix: str = "pica_"
    tuner_layer_cls = PicaLinear
    target_module_mapping = DEFAULT_TARGETS
    _plan: _Plan | None = None  # of the adapter that is being added

    # ---- adding an adapter -------------------------------------------------------------------------------------

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        # An expression may be wide enough to match the bank that an earlier adapter left; that is nobody's wish.
        return BANK_NAME not in key.split(".") and BaseTuner._check_target_module_exists(peft_config, key)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        defaults = peft_config.target_modules is None and DEFAULT_TARGETS.get(str(model_config.get("model_type")))  # pyright: ignore[reportAttributeAccessIssue]
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        if defaults:
            # a default list covers every model of its family; an entry that this one lacks is nobody's mistake
            names = [n for n, _ in self.model.named_modules()]
            present = {d for d in defaults if any(n == d or n.endswith(f".{d}") for n in names)}
            peft_config.target_modules = present or set(defaults)  # pyright: ignore[reportAttributeAccessIssue]
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        check_targets(peft_config, model)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """PEFT's injection, with the bank's `requires_grad` flags kept. `state_dict` is not needed: the config decides."""
        self._plan = None
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        finally:
            self._plan = None

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        # The bank is a child of the base model, where PEFT does not expect adapter parameters and would freeze them.
        bank = get_bank(self.model)
        flags = [] if bank is None else [(p, p.requires_grad) for p in bank.parameters()]
        super()._mark_only_adapters_as_trainable(model)
        for parameter, flag in flags:
            parameter.requires_grad = flag

    def _create_and_replace(
        self,
        peft_config: PicaConfig,  # pyright: ignore[reportIncompatibleMethodOverride] - PEFT names the base class
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if parameter_name is not None:
            raise TargetError(
                f"{current_key}.{parameter_name}: PiCa adapts whole layers; target_parameters is not supported."
            )
        current_key = plain_name(current_key)
        plan = self._plan = self._plan or _Plan(self, peft_config)
        bank = ensure_bank(self.model)
        group, request = plan.groups[current_key], plan.requests[current_key]
        layer = target if isinstance(target, PicaLinear) else PicaLinear(target, bank, current_key)
        device, _ = layer.compute_device_and_dtype()
        bank.add_matrix(adapter_name, group.key, _initial_matrix(group, peft_config, layer, device))
        layer.add_adapter(adapter_name, group=group.key, request=request, basis=plan.bases.get(current_key))
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version also assigns `weight` and moves parameters; both break wrappers around embeddings, and the bank.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """M is made in float32 over half-precision bases; `autocast_adapter_dtype=False` means: as the base is."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        bank = get_bank(self.model)
        if autocast_adapter_dtype or bank is None or adapter_name not in bank:
            return
        dtype_of = {
            m.pica_group[adapter_name]: m.compute_device_and_dtype()[1]
            for m in self.model.modules()
            if isinstance(m, PicaLinear) and adapter_name in m.r
        }
        for group, parameter in bank.matrices(adapter_name).items():
            parameter.data = parameter.data.to(dtype_of[group])

    # ---- removing adapters -------------------------------------------------------------------------------------

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        drop_bank(self.model)
        return model  # pyright: ignore[reportReturnType] - PEFT annotates None

    # ---- saving and loading ------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        prefixes = tuple(f"{name}.{adapter_name}." for name, _ in find_banks(model))
        selected = {plain_name(k): v for k, v in state_dict.items() if k.startswith(prefixes)} if prefixes else {}
        selected.update(cls._get_learnable_bias_state_dict(model, state_dict, config))
        return selected

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        marker = f"{BANK_NAME}.{adapter_name}."
        if marker in key:
            return key.replace(marker, f"{BANK_NAME}.", 1)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Put the adapter's name back into the keys.

        Raises:
            AdapterFileError: a matrix is missing, not expected, or of another shape; names them.
        """
        wanted = {
            f"{plain_name(bank)}.{g}": (f"{bank}.{adapter_name}.{g}", m)
            for bank, g, m in _matrices(model, adapter_name)
        }
        renamed: dict[str, Tensor] = {}
        problems: list[str] = []
        found: set[str] = set()
        for key, value in state_dict.items():
            short = plain_name(key)
            if short not in wanted:  # adapters that were injected without a PeftModel lack its prefix
                short = short.removeprefix("base_model.model.")
            if short not in wanted:
                if re.search(rf"(^|\.){BANK_NAME}\.", key):
                    problems.append(f"{key} is not expected")
                renamed[key] = value
                continue
            full, parameter = wanted[short]
            if value.shape != parameter.shape:
                problems.append(f"{key} has shape {tuple(value.shape)} where {tuple(parameter.shape)} is expected")
            found.add(short)
            renamed[full] = value
        problems += [f"{key} is missing" for key in wanted if key not in found]
        if problems:
            shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
            raise AdapterFileError(
                f"The adapter does not fit this model and configuration: {shown}. "
                "Check that the base model and adapter_config.json are those of the training."
            )
        return renamed

    # ---- mixed batches, distributed training -------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one a sample, to each layer for the length of one forward or generate call."""
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        known = {n for m in self.modules() if isinstance(m, PicaLinear) for n in m.r}
        if unknown := {n for n in adapter_names if n != "__base__"} - known:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        repeats = _rows_per_input(kwargs)
        per_row = [n for n in adapter_names for _ in range(repeats)]
        encoder = None
        if repeats > 1 and getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            encoder = self.model.get_encoder()  # decoder-only models answer this too, with all their layers
        in_encoder = {id(m) for m in encoder.modules()} if isinstance(encoder, nn.Module) else set()
        handles = []
        try:
            for module in self.modules():
                if isinstance(module, (PicaLinear, AuxiliaryTrainingWrapper)):
                    # beams repeat the decoder's rows, while an encoder sees each input once
                    names = list(adapter_names) if id(module) in in_encoder else per_row
                    hook = partial(_pass_adapter_names, adapter_names=names)
                    handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """DDP broadcasts buffers before each forward pass; bases are frozen and alike everywhere, and they are large."""
        return [f"base_model.{n}" for n, _ in self.named_buffers() if ".pica_basis_" in n]


def _matrices(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, str, nn.Parameter]]:
    for bank_name, bank in find_banks(model):
        if adapter_name in bank:
            for group, matrix in bank.matrices(adapter_name).items():
                yield bank_name, group, matrix


def _rows_per_input(kwargs: dict[str, Any]) -> int:
    """How many rows `generate` with these arguments makes of each input: beams, or sequences to return."""
    settings = kwargs.get("generation_config")
    counts = (kwargs.get(name, getattr(settings, name, None)) for name in ("num_beams", "num_return_sequences"))
    return max((n for n in counts if isinstance(n, int)), default=1)


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: dict, *, adapter_names: list[str]) -> tuple[Any, dict]:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs


def _initial_matrix(group: Group, config: PicaConfig, layer: PicaLinear, device: torch.device) -> Tensor:
    """M (out, rank): float32 over float32 and narrower bases, float64 over float64 ones."""
    dtype = torch.promote_types(layer.compute_device_and_dtype()[1], torch.float32)
    if config.init_weights or device.type == "meta":
        return torch.zeros(group.out_features, group.rank, dtype=dtype, device=device)
    return torch.randn(group.out_features, group.rank, dtype=dtype).to(device) / group.rank**0.5


class _Plan:
    """What one adapter needs, worked out before the model is touched.

    Attributes:
        groups, requests: For the plain path of each target layer, its group and what it asks of its basis.
        bases: Solved bases, by path: for layers that have none of that projection yet, or too small a one, and whose
            weights are materialised.
    """

    def __init__(self, tuner: PicaModel, config: PicaConfig) -> None:
        layers = {plain_name(path): module for path, module in _target_layers(tuner, config)}
        members = []
        limited: list[str] = []
        for path, module in layers.items():
            in_features, out_features = features_of(_base_of(module))
            wanted = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), path), config.r)
            rank = min(wanted, max_rank(out_features, in_features, config.projection))
            if rank < wanted:
                limited.append(f"{path} ({out_features} x {in_features}: {rank})")
            members.append(Member(path, out_features, in_features, rank))
        if limited:
            more = f" and {len(limited) - 1} more" if len(limited) > 1 else ""
            warnings.warn(
                f"PiCa: the rank asked for is larger than what some layers allow; they use all the directions they have: "
                f"{limited[0]}{more}.",
                stacklevel=2,
            )
        self.groups: dict[str, Group] = {}
        for group in plan_groups(members, config.share):
            self.groups.update({m.path: group for m in group.members})
        self.requests = {m.path: self._request(m, config) for m in members}
        self.bases = self._solve(layers)

    @staticmethod
    def _request(member: Member, config: PicaConfig) -> BasisRequest:
        return BasisRequest(member.path, member.rank, config.projection, "auto", config.projection_seed)

    def _solve(self, layers: dict[str, nn.Module]) -> dict[str, Basis]:
        # A bare layer only knows how to read its weight once it is wrapped; the wrapper made here is thrown away.
        wrapped = {
            path: module if isinstance(module, PicaLinear) else PicaLinear(module, PicaBank(), path)
            for path, module in layers.items()
        }
        needed = [
            request
            for path, request in self.requests.items()
            if not wrapped[path].is_deferred() and _lacks_basis(wrapped[path], request)
        ]

        def load(request: BasisRequest) -> tuple[Tensor, Side]:
            weight = wrapped[request.name].frozen_weight()
            return weight, wrapped[request.name].preferred_side(weight)

        solved = dict(zip((r.name for r in needed), solve_many(needed, load)))
        short = [n for n, b in solved.items() if b.rank < self.requests[n].rank]
        if short:
            more = f" and {len(short) - 1} more" if len(short) > 1 else ""
            warnings.warn(
                f"PiCa: {short[0]}{more}: the weight has fewer directions with a non-zero singular value than the rank "
                f"asked for ({solved[short[0]].rank} of {self.requests[short[0]].rank}); the layer uses those it has.",
                stacklevel=2,
            )
        return solved


def _base_of(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _lacks_basis(layer: PicaLinear, request: BasisRequest) -> bool:
    known = layer._requests.get(projection_key(request))
    return known is None or known.rank < request.rank or layer.projector(projection_key(request)) is None


def _target_layers(tuner: PicaModel, config: PicaConfig) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of each layer that `config` targets, by the same test that PEFT's injection applies."""
    matches: Callable[[PeftConfig, str], Any] = tuner._check_target_module_exists
    inside: tuple[str, ...] = ()
    for path, module in tuner.model.named_modules():
        if not path or (inside and path.startswith(inside)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{path}.")
        if not matches(config, path):
            continue
        assert isinstance(module, nn.Module)  # for the type checker, which loses it above
        if not (isinstance(module, PicaLinear) or is_supported(module)):
            raise TargetError(
                f"Target module {path} ({type(module).__name__}) is not supported: PiCa adapts linear layers "
                "(torch.nn.Linear, transformers' Conv1D, quantised linear layers). Leave it out of target_modules, "
                "or name it in exclude_modules."
            )
        yield path, module
