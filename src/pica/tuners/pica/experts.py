"""Mixtures of experts whose weights are one parameter, (experts, out, in): each expert is a layer with its own basis.

Such a module gets no adapter inside: what runs, and in which kernel, is its own business. For the length of a forward pass
it finds W + M P in the place of its parameter (`with_weights`). All experts of all blocks play the same role, so
they share one M.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pica.errors import ConfigError, TargetError
from pica.tuners.base.bank import MatrixBank, find_banks, verify_loaded
from pica.tuners.base.frozen_weight import FrozenWeight
from pica.tuners.base.sharding import in_parts
from pica.tuners.pica.layer import PicaLinear
from pica.tuners.pica.recompute import Recomputed, can_be_recomputed, kept_as_recipes

_one_at_a_time = threading.RLock()
# stored as (experts, in, out) without saying so, as transformers' other modules of that kind do (`is_transposed`)
_INPUT_FIRST = frozenset({"Llama4TextExperts"})


class ExpertView(nn.Module):
    """One expert of a stack, as a linear layer without bias: reads and writes its slice of the stack."""

    def __init__(self, experts: nn.Module, parameter: str, index: int) -> None:
        super().__init__()
        self._experts = (experts,)  # in a tuple, so that it is not registered a second time
        self.parameter, self.index = parameter, index
        self.input_first = stored_input_first(experts)
        rows, columns = self.weight.shape
        self.out_features, self.in_features = rows, columns

    @property
    def stack(self) -> Tensor:
        """The parameter that holds all experts."""
        return cast(Tensor, self._experts[0]._parameters[self.parameter])

    @property
    def weight(self) -> Tensor:
        """(out, in), a view; never what a forward pass puts in its place for a while."""
        expert = self.stack[self.index]
        return expert.T if self.input_first else expert


class ExpertWeight(FrozenWeight):
    """The frozen weight of one expert: a slice of a stack."""

    def output_is_exact(self) -> bool:
        """No: an expert's output is nowhere to be seen."""
        return False

    def _sample(self) -> Tensor | None:
        view = self.layer.get_base_layer()
        assert isinstance(view, ExpertView)
        # to take one expert of a stack that is split between processes, all of them would have to ask for it
        return None if in_parts(view.stack) or view.stack.ndim != 3 else super()._sample()

    def _write(self, weight: Tensor) -> None:
        own, kept = self.layer.get_base_weight(), self._before_merge
        if kept is not None and kept.untyped_storage().data_ptr() == own.untyped_storage().data_ptr():
            self._before_merge = kept.clone()  # a slice is written in place, so its copy has to be one
        own.copy_(weight)


class PicaExpert(PicaLinear):
    """A PiCa layer for one expert of a stack. `AdaptedExperts` applies its update."""

    mixes = False
    weight_class = ExpertWeight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("the experts' own module runs them")


class AdaptedExperts(nn.Module):
    """A module of experts with PiCa updates on its stacks of weights: each W_e becomes W_e + M P_e.

    Attributes:
        base_layer: The module.
        expert_adapters: {parameter's name: its experts' layers}.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.expert_adapters = nn.ModuleDict()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def stacks(self) -> dict[str, list[PicaExpert]]:
        """{parameter's name: its experts' layers}."""
        found = cast("dict[str, nn.ModuleList]", self.expert_adapters)
        return {name: [cast(PicaExpert, layer) for layer in layers] for name, layers in found.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward pass, on the adapted weights."""
        stacks = self._adapted_stacks()
        adapted = {name: stack.tensor() for name, stack in stacks.items()}
        if not stacks:
            return self.base_layer(*args, **kwargs)
        with with_weights(self.base_layer, adapted) as run:
            if not all(can_be_recomputed(stack.sources()) for stack in stacks.values()):
                return run(*args, **kwargs)
            made = [(Recomputed(s.tensor, s.sources(), s.name), adapted[name]) for name, s in stacks.items()]
            with kept_as_recipes(made):
                return run(*args, **kwargs)

    def _adapted_stacks(self) -> dict[str, AdaptedStack]:
        found = {}
        for parameter, layers in self.stacks().items():
            first = layers[0]
            if first.bank.unverified:
                verify_loaded(first.bank)
            if first.disable_adapters:
                for layer in layers:
                    if layer.merged:
                        layer.unmerge()
                continue
            names = [n for n in first.active_adapters if n in first.group_of]
            if first.merged or not names:
                continue
            stack = cast(Tensor, self.base_layer._parameters[parameter])
            updates = [StackUpdate.of(layers, name) for name in names]
            found[parameter] = AdaptedStack(
                stack, updates, stored_input_first(self.base_layer), layers[0].path.rpartition(".")[0]
            )
        return found

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """PEFT's hook for layers that it does not unload like others: the plain module, updates merged on request."""
        for layers in self.stacks().values() if merge else ():
            for layer in layers:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer


@contextmanager
def with_weights(module: nn.Module, weights: dict[str, Tensor]) -> Iterator[nn.Module]:
    """Put other tensors in the place of some of a module's parameters, for one call.

    Where something has given the module a `forward` of its own (Accelerate's hooks, kernels from the hub), which would run
    the module and no stand-in, and in compiled models, the module itself has the tensors meanwhile; then one thread runs
    at a time.

    Yields:
        What to call: a stand-in that has the same children, buffers, hooks and attributes; the module itself stays as it
        is, so that other threads may call it meanwhile.
    """
    # An entry of an instance's dict comes before a parameter of that name.
    if "forward" not in module.__dict__ and not torch.compiler.is_compiling():
        stand_in = object.__new__(type(module))
        stand_in.__dict__.update(module.__dict__)
        stand_in.__dict__.update(weights)
        yield stand_in
        return
    with nullcontext() if torch.compiler.is_compiling() else _one_at_a_time:
        module.__dict__.update(weights)
        try:
            yield module
        finally:
            for name in weights:
                del module.__dict__[name]


@dataclass(frozen=True)
class StackUpdate:
    """One adapter's update of a stack: M P_e for each expert e, or M_e P_e where experts do not share M.

    Attributes:
        matrices: (out, r) each; one for all experts, or each expert's own.
        directions: (r, in) or fewer rows, each expert's.
    """

    matrices: Sequence[Tensor]
    directions: Sequence[Tensor]

    @classmethod
    def of(cls, layers: Sequence[PicaExpert], adapter_name: str) -> StackUpdate:
        shared = len({layer.group_of[adapter_name] for layer in layers}) == 1
        matrices = [layer.matrix(adapter_name) for layer in (layers[:1] if shared else layers)]
        return cls(matrices, [layer.method.first_directions(adapter_name) for layer in layers])

    def add_to(self, stack: Tensor, *, input_first: bool) -> Tensor:
        """W_e + M P_e for all experts e, in the dtype and layout of `stack`."""
        with torch.autocast(stack.device.type, enabled=False):  # which would narrow what stands for a parameter
            if len(self.matrices) == 1:
                matrices = self.matrices[0].expand(len(stack), -1, -1)
            else:  # share="none", or a number
                width = max(matrix.shape[1] for matrix in self.matrices)
                matrices = torch.stack([_widened(matrix, width, dim=1) for matrix in self.matrices])
            rank = matrices.shape[-1]
            directions = torch.stack([_widened(part, rank, dim=0) for part in self.directions])  # (experts, rank, in)
            left, right = matrices.to(device=stack.device, dtype=stack.dtype), directions.to(stack)
            if input_first:
                return torch.baddbmm(stack, right.mT, left.mT)
            return torch.baddbmm(stack, left, right)


@dataclass(frozen=True)
class AdaptedStack:
    """A stack of experts' weights, (experts, out, in) or (experts, in, out), with its active adapters' updates."""

    stack: Tensor
    updates: Sequence[StackUpdate]
    input_first: bool
    name: str

    def tensor(self) -> Tensor:
        """The adapted weights: a copy of the stack."""
        total = self.stack
        for update in self.updates:
            total = update.add_to(total, input_first=self.input_first)
        return total

    def sources(self) -> list[Tensor]:
        """All that the adapted weights are made of."""
        return [self.stack, *(part for u in self.updates for part in (*u.matrices, *u.directions))]


def _widened(matrix: Tensor, size: int, *, dim: int) -> Tensor:
    """`matrix` with zeros at the end of `dim`, where it has fewer than `size`; cut where it has more."""
    missing = size - matrix.shape[dim]
    if missing == 0:
        return matrix
    if missing < 0:
        return matrix.narrow(dim, 0, size)
    shape = list(matrix.shape)
    shape[dim] = missing
    return torch.cat([matrix, matrix.new_zeros(shape)], dim=dim)


def stored_input_first(module: nn.Module) -> bool:
    """Whether experts are stored as (experts, in, out)."""
    if isinstance(module, ExpertView):
        return module.input_first
    return bool(getattr(module, "is_transposed", type(module).__name__ in _INPUT_FIRST))


def target_stacks(model: nn.Module, config: PeftConfig) -> Iterator[tuple[str, nn.Module, str]]:
    """Find the stacks of experts that `target_parameters` names.

    Yields:
        Path of the module, the module or its wrapper, and the parameter's name.
    Raises:
        TargetError: An entry matches nothing, or what is no stack of weights, or one that is in parts.
        ConfigError: `layers_to_transform` is set, which PEFT does not apply to parameters.
    """
    wanted = set(getattr(config, "target_parameters", None) or ())
    if not wanted:
        return
    if getattr(config, "layers_to_transform", None) is not None:
        raise ConfigError(
            "layers_to_transform does not go with target_parameters: name the blocks in target_parameters, for instance "
            "'layers.3.mlp.experts.down_proj'."
        )
    used: set[str] = set()
    inside: tuple[str, ...] = tuple(f"{path}." for path, _ in find_banks(model))
    seen: list[str] = []
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue
        bare = module
        if isinstance(module, (AdaptedExperts, BaseTunerLayer)):
            inside = (*inside, f"{path}.")
            bare = cast(nn.Module, cast(nn.Module, module)._modules["base_layer"])
        for name, parameter in bare.named_parameters(recurse=False):
            key = f"{path}.{name}"
            if parameter.ndim == 3:
                seen.append(name)
            hits = {w for w in wanted if key == w or key.endswith(f".{w}")}
            if not hits:
                continue
            used |= hits
            if hasattr(parameter, "ds_id") and in_parts(parameter):
                raise TargetError(
                    f"{key}: DeepSpeed ZeRO-3 has split this stack of experts already. Add the adapter while the weights "
                    "are whole (load the model before TrainingArguments is made), or train with FSDP2."
                )
            if parameter.ndim != 3 or hasattr(bare, "kernel_size") or isinstance(module, BaseTunerLayer):
                raise TargetError(
                    f"target_parameters adapts stacks of experts' weights, (experts, out, in), and {key} of a "
                    f"{type(bare).__name__} has shape {tuple(parameter.shape)}. Name layers in target_modules."
                )
            yield path, module, name
    if idle := sorted(wanted - used):
        there = f"Stacks that it has: {', '.join(dict.fromkeys(seen))}." if seen else "It has no stacks of experts."
        raise TargetError(f"Target parameters {{{', '.join(map(repr, idle))}}} not found in the base model. {there}")


def expert_layers(path: str, module: nn.Module, parameter: str) -> dict[str, nn.Module]:
    """{path of an expert: its layer, or where it is not adapted yet a view of it}."""
    if isinstance(module, AdaptedExperts):
        if parameter in module.expert_adapters:
            return {layer.path: layer for layer in module.stacks()[parameter]}
        module = module.base_layer
    stack = cast(Tensor, module._parameters[parameter])
    return {f"{path}.{parameter}.{i}": ExpertView(module, parameter, i) for i in range(len(stack))}


def wrap_stack(model: nn.Module, path: str, parameter: str, views: dict[str, nn.Module], bank: MatrixBank) -> None:
    """Make the module at `path` an `AdaptedExperts`, unless it is one, with a layer for each expert of `parameter`."""
    module = model.get_submodule(path)
    if not isinstance(module, AdaptedExperts):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module := AdaptedExperts(module))
    if parameter not in module.expert_adapters:
        layers = [PicaExpert(view, bank, expert, model) for expert, view in views.items()]
        module.expert_adapters[parameter] = nn.ModuleList(layers)
