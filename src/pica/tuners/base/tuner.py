"""`BankedModel`: a base model with adapters whose parameters live in a bank; what its methods have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor, nn

from pica.errors import ConfigError, ModuleError, PicaError, TargetError
from pica.text import first_line
from pica.tuners.base.arrival import note_provenance, verify_arrived
from pica.tuners.base.bank import (
    BANK_NAMES,
    EXPERT_ADAPTERS,
    Arrival,
    MatrixBank,
    drop_bank,
    ensure_bank,
    get_bank,
    plain_name,
)
from pica.tuners.base.default_targets import DEFAULT_TARGETS
from pica.tuners.base.frozen_weight import SAME_WEIGHT
from pica.tuners.base.layer import SharedLayer
from pica.tuners.base.matching import resolved, start_counting, with_plain_targets
from pica.tuners.base.mixed_batch import handed_out
from pica.tuners.base.parallel import check_gradient_reduction
from pica.tuners.base.quantised import check_differentiable, keep_differentiable
from pica.tuners.base.replaced_weight import rebase
from pica.tuners.base.roles import Group
from pica.tuners.base.rollback import active_adapters, all_or_nothing, replace_earlier
from pica.tuners.base.state_dict import remap_state, select_state, slots_of, withdraw
from pica.tuners.base.targets import (
    check_further_modules,
    check_targets,
    check_task_type,
    further_modules,
    keep_from_bypassing,
)

# components of paths that lead to what adapters brought
NOT_THE_MODELS = BANK_NAMES | {EXPERT_ADAPTERS}


class AdapterPlan(Protocol):
    """What one adapter needs, worked out and solved before the model is touched."""

    groups: dict[str, Group]

    def attach(self, layer: Any, adapter_name: str) -> None: ...


class BankedModel(BaseTuner):
    """A base model with adapters of one method, whose parameters live in a bank at the model's root.

    Adding an adapter first plans it (which layers, which groups, which bases have to be solved) and solves every basis,
    and only then touches the model, so that an error leaves the model as it was.
    """

    bank_name: ClassVar[str]
    layer_class: ClassVar[type[SharedLayer]]
    target_module_mapping: ClassVar[Any] = DEFAULT_TARGETS  # PEFT declares lists only, and has expressions too
    _plan: AdapterPlan | None = None  # of the adapter that is being added
    _tied: set[int] | None = None  # likewise

    # ---- what a method defines ---------------------------------------------------------------------------------

    @abstractmethod
    def _make_plan(self, peft_config: Any) -> AdapterPlan:
        """Plan an adapter, and solve what it needs."""

    @abstractmethod
    def _initial_matrix(self, group: Group, peft_config: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The parameter that a group starts from; `dtype` is at least float32."""

    # ---- adding an adapter -------------------------------------------------------------------------------------

    def __init__(self, model: nn.Module, peft_config: PeftConfig | dict[str, PeftConfig], *args: Any, **kwargs: Any):
        if isinstance(peft_config, dict):  # from a PeftModel; PEFT's injection without one has no use for a task type
            for config in peft_config.values():
                check_task_type(config, model)
        self.serves_peft_model = isinstance(peft_config, dict)
        configs = getattr(model, "peft_config", None)  # a model with adapters has its tuner's own, which PEFT adds to
        before = dict(configs) if isinstance(configs, dict) else {}
        try:
            super().__init__(model, peft_config, *args, **kwargs)
        except BaseException:
            # PEFT has put the configuration into a mapping that it shares with the model, transformers has set its flag
            shared = getattr(model, "peft_config", None)
            if isinstance(shared, dict) and (before or not self.serves_peft_model):
                shared.clear()
                shared.update(before)
            if not before and getattr(model, "_hf_peft_config_loaded", False):
                model._hf_peft_config_loaded = False  # pyright: ignore[reportArgumentType] - transformers' own flag
            raise

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        # An expression may be wide enough to match the bank that an earlier adapter left; that is nobody's wish.
        return NOT_THE_MODELS.isdisjoint(key.split(".")) and BaseTuner._check_target_module_exists(
            resolved(peft_config, key), key
        )

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        super()._check_tied_modules(model, with_plain_targets(peft_config, EMBEDDING_LAYER_NAMES))

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        defaults = peft_config.target_modules is None and DEFAULT_TARGETS.get(str(model_config.get("model_type")))  # pyright: ignore[reportAttributeAccessIssue]
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        if defaults and not isinstance(defaults, str):
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
        _check_name(adapter_name)
        if not self.peft_config[adapter_name].inference_mode:
            check_differentiable(model)
        further = further_modules(self.peft_config[adapter_name])
        check_further_modules(further, f"{self.bank_name}.{adapter_name}")
        self._plan = None
        start_counting()
        ranks = getattr(self.peft_config[adapter_name], "rank_pattern", None)
        active = active_adapters(model)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            with all_or_nothing(model, adapter_name):
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            if not further or isinstance(error, PicaError):
                raise
            # PEFT wraps whatever module the names match, and finds out on the way that it cannot
            what = first_line(error)
            raise ModuleError(
                f"modules_to_save or trainable_token_indices name modules that PEFT cannot train that way ({what}): "
                f"{', '.join(map(repr, further))}."
            ) from error
        finally:
            self._plan = self._tied = None
            if ranks is not None:
                _set_rank_pattern(self.peft_config[adapter_name], ranks)
        keep_differentiable(self.model)
        keep_from_bypassing(self.model)
        bank = get_bank(self.model, self.bank_name)
        if bank is not None and adapter_name in bank:
            config, expected = self.peft_config[adapter_name], None
            if getattr(config, "basis_format", None) is not None:  # its weights are to come from a file
                base_name = getattr(config, "base_model_name_or_path", None)
                from_zero = bool(getattr(config, "init_weights", True))
                expected = Arrival(base_name, from_zero, active, trainable)
            bank.tuner = (self,)
            note_provenance(bank, adapter_name, expected)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        # The bank is a child of the base model, where PEFT does not expect adapter parameters and would freeze them.
        bank = get_bank(self.model, self.bank_name)
        flags = [] if bank is None else [(p, p.requires_grad) for p in bank.parameters()]
        super()._mark_only_adapters_as_trainable(model)
        for parameter, flag in flags:
            parameter.requires_grad = flag

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if parameter_name is not None:
            raise TargetError(
                f"{current_key}.{parameter_name}: {self.layer_class.method_class.name} adapts whole layers; "
                "target_parameters is not supported."
            )
        current_key = plain_name(current_key)
        self._ensure_plan(peft_config, adapter_name)
        bank = ensure_bank(self.model, self.bank_name, verify_arrived)
        layer = (
            target if isinstance(target, self.layer_class) else self.layer_class(target, bank, current_key, self.model)
        )
        self._attach(peft_config, adapter_name, layer)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _ensure_plan(self, peft_config: PeftConfig, adapter_name: str) -> AdapterPlan:
        if self._plan is None:
            for layer in self._layers():
                if layer.frozen.deviation() > SAME_WEIGHT:
                    rebase(layer)
                layer.method.solve_again()
            self._plan = self._make_plan(peft_config)
            replace_earlier(list(self._layers()), get_bank(self.model, self.bank_name), adapter_name)
            self._forget_stranded_adapters()
            keys = [g.key for g in self._plan.groups.values()]
            _check_name(adapter_name, keys, get_bank(self.model, self.bank_name))
            if getattr(peft_config, "rank_pattern", None):
                # PEFT's injection would match it once more, without a limit, to warn of what the plan has warned of
                _set_rank_pattern(peft_config, {})
        return self._plan

    def _attach(self, peft_config: PeftConfig, adapter_name: str, layer: SharedLayer) -> None:
        """Give a layer the adapter that was planned for it, and its group a matrix if it has none."""
        plan, bank = self._ensure_plan(peft_config, adapter_name), layer.bank
        group = plan.groups[layer.path]
        device, dtype = layer.frozen.device_and_dtype()
        if adapter_name not in bank or group.key not in bank.matrices(adapter_name):
            # float32 over float32 and narrower bases, float64 over float64 ones
            initial = self._initial_matrix(group, peft_config, torch.promote_types(dtype, torch.float32), device)
            bank.add_matrix(adapter_name, group.key, initial)
        plan.attach(layer, adapter_name)
        layer.frozen.tied = id(getattr(layer.get_base_layer(), "weight", None)) in self._tied_parameters()
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)

    def _tied_parameters(self) -> set[int]:
        """Identities of the parameters that several of the model's modules have; found once an adapter."""
        if self._tied is None:
            owners = Counter(id(p) for m in self.model.modules() for p in m._parameters.values() if p is not None)
            self._tied = {parameter for parameter, count in owners.items() if count > 1}
        return self._tied

    def _layers(self) -> Iterator[SharedLayer]:
        return (m for m in self.model.modules() if isinstance(m, self.layer_class))

    def _forget_stranded_adapters(self) -> None:
        """Drop adapters that no layer carries any more: diffusers takes PEFT's layers out and knows nothing of the bank.

        Without this a new adapter of the same name would start from the matrices of the old one.
        """
        bank = get_bank(self.model, self.bank_name)
        if bank is not None:
            carried = {name for module in self._layers() for name in module.group_of}
            for name in [n for n in bank if n not in carried]:
                del bank[name]

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's version also assigns `weight` and moves parameters; both break wrappers around embeddings, and the bank.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """M is made in float32 over half-precision bases; `autocast_adapter_dtype=False` means: as the base is."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        bank = get_bank(self.model, self.bank_name)
        if autocast_adapter_dtype or bank is None or adapter_name not in bank:
            return
        dtype_of = {
            m.group_of[adapter_name]: m.frozen.device_and_dtype()[1]
            for m in self._layers()
            if adapter_name in m.group_of
        }
        for group, parameter in bank.matrices(adapter_name).items():
            parameter.data = parameter.data.to(dtype_of[group])

    # ---- removing adapters -------------------------------------------------------------------------------------

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:  # a module; PEFT annotates None
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        drop_bank(self.model, self.bank_name)
        return model

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
        selected = select_state(model, config, adapter_name, state_dict)
        selected.update(cls._get_learnable_bias_state_dict(model, state_dict, config))
        return selected

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        marker = f"{cls.bank_name}.{adapter_name}."
        if marker in key:
            return key.replace(marker, f"{cls.bank_name}.", 1)
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Put the adapter's name back into the keys, and its bases into the orientation of the training.

        Returns:
            The entries by the model's names.
        Raises:
            AdapterFileError: A matrix is missing, not expected, not finite or of another shape; names them.
            BasisMismatchError: The adapter was trained with another basis. An adapter that was just added for this is
                taken out again.
        """
        added_for_this = any(slot.unverified for _, _, slot in slots_of(model, adapter_name))
        try:
            return remap_state(model, config, adapter_name, state_dict)
        except BaseException:
            if added_for_this:
                withdraw(model, adapter_name)
            raise

    # ---- mixed batches, distributed training -------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names`, one a sample, to each layer for the length of one forward or generate call.

        PEFT enters this before each call of the model, so that training is looked at here, too.

        Raises:
            TrainingError: as `check_gradient_reduction`.
            ValueError: `adapter_names` holds an unknown name, or the model is in training mode.
        """
        if self.training:
            check_gradient_reduction(self)
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        bank, names = get_bank(self.model, self.bank_name), set(adapter_names) - {"__base__"}
        if unknown := {name for name in names if bank is None or name not in bank}:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        if bank is not None and not all(bank.matrices(name).mixes for name in names):
            raise ValueError(
                "Adapters with target_parameters cannot be mixed in a batch: run each by itself (set_adapter)."
            )
        wrappers: list[nn.Module] = []
        if any(further_modules(config) for config in self.peft_config.values()):
            wrappers = [m for m in self.model.modules() if isinstance(m, AuxiliaryTrainingWrapper)]
        with handed_out([] if bank is None else [bank], wrappers, adapter_names, kwargs):
            yield

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """DDP broadcasts buffers before each forward pass; bases are frozen and alike everywhere, and they are large."""
        return [f"base_model.{n}" for n, _ in self.named_buffers() if f".{self.prefix}basis_" in n]


def _set_rank_pattern(config: Any, ranks: dict[str, int]) -> None:
    config.rank_pattern = ranks


def _check_name(adapter_name: str, groups: Sequence[str] = (), bank: MatrixBank | None = None) -> None:
    """Refuse names under which PEFT would save an adapter without some of its matrices, or that no module can have."""
    # Saving one adapter, PEFT drops every entry that has another adapter's name as a component. So no adapter may be called
    # like the bank or like a group, be it of its own or of another adapter.
    others = {} if bank is None else {name: list(bank.matrices(name)) for name in bank}
    taken = {*BANK_NAMES, *groups, *(key for keys in others.values() for key in keys)}
    clash = adapter_name if adapter_name in taken else next((n for n in others if n in groups), None)
    if "." in adapter_name or clash is not None:
        why = f"{clash!r} is the name of shared matrices" if clash is not None else "a name must not contain a dot"
        raise ConfigError(f"Adapter {adapter_name!r}: {why}. Choose another adapter name.")
