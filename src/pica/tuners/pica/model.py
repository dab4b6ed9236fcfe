"""`PicaModel`: puts PiCa layers into a base model and keeps their shared matrices in one bank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pica.errors import ConfigError
from pica.tuners.base.arrival import verify_arrived
from pica.tuners.base.bank import PICA_BANK, ensure_bank, get_bank, verify_loaded
from pica.tuners.base.roles import Group
from pica.tuners.base.targets import further_modules
from pica.tuners.base.tuner import BankedModel
from pica.tuners.base.verification import take_fingerprint
from pica.tuners.pica.combining import check_combination, config_of_combination, fill_combination
from pica.tuners.pica.config import PicaConfig
from pica.tuners.pica.experts import AdaptedExperts, wrap_stack
from pica.tuners.pica.layer import PicaLinear
from pica.tuners.pica.plan import PicaPlan


class PicaModel(BankedModel):
    """A base model with PiCa adapters, as `peft.get_peft_model` makes it from a `PicaConfig`."""

    prefix: str = "pica_"
    tuner_layer_cls = PicaLinear
    layer_class = PicaLinear
    bank_name = PICA_BANK

    def _make_plan(self, peft_config: PicaConfig) -> PicaPlan:
        return PicaPlan(self, peft_config)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
    ) -> None:
        """Add an adapter that combines others: M is the weighted sum of theirs, and so is the update, exactly.

        Call it on the PeftModel, which hands it on, as with PEFT's LoRA. The adapters may have different ranks; they have
        to share matrices between the same layers and to use the same bases. The new adapter has the rank of the largest,
        and is not activated.

        Args:
            adapters: Names of adapters of this model.
            weights: One for each; negative ones take an adapter away.
            adapter_name: Name of the new adapter.
            combination_type: "linear", or, leaving out entries, one of PEFT's "magnitude_prune", "ties", "dare_linear"
                (random entries: set torch's seed) and "dare_ties".
            density: Share of entries kept, in (0, 1]; for all but "linear".

        Raises:
            ConfigError: an adapter is unknown, the name is taken, or the adapters cannot be added up, for instance since
                one trained further modules too (`modules_to_save`); nothing has changed.
        """
        bank = get_bank(self.model, self.bank_name)
        widest = check_combination(bank, adapters, weights, adapter_name, combination_type, density)
        assert bank is not None
        for name in adapters:
            if further := further_modules(self.peft_config[name]):
                raise ConfigError(
                    f"Adapter {name!r} has more than shared matrices, {', '.join(map(repr, further))} (modules_to_save or "
                    "trainable_token_indices), and nothing says how to add those up. Merge one adapter into the base model "
                    "before the other is trained, or combine adapters without such modules."
                )
        verify_loaded(bank)  # an adapter that a loader has just written is combined as what it means
        configs = cast("dict[str, PicaConfig]", self.peft_config)
        save_basis = any(configs[name].save_basis for name in adapters)
        configs[adapter_name] = config_of_combination(configs[widest], save_basis=save_basis)
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            configs.pop(adapter_name, None)
            raise
        slot = bank.matrices(adapter_name)
        for layer in slot.layers.values():
            assert isinstance(layer, PicaLinear)
            layer.bases.key_of[adapter_name] = layer.bases.key_of[widest]  # one that a file brought, perhaps
            layer.method.limit(adapter_name, layer.method.usable_rank(widest))
            layer.bases.drop_unused()
        if (fingerprint := take_fingerprint(slot, adapter_name)) is not None:
            slot.solved(fingerprint)
        fill_combination(bank, adapters, weights, adapter_name, combination_type, density)

    def _inject_parameters(
        self, peft_config: PicaConfig, model: nn.Module, adapter_name: str, *_: Any, **__: Any
    ) -> list[str]:
        """PEFT's injection on `target_parameters`: the experts' modules run as they are, on adapted weights."""
        plan = cast(PicaPlan, self._ensure_plan(peft_config, adapter_name))
        bank = ensure_bank(self.model, self.bank_name, verify_arrived)
        for stack in plan.stacks:
            wrap_stack(model, stack.path, stack.parameter, stack.experts, bank)
            experts = cast(AdaptedExperts, model.get_submodule(stack.path))
            for layer in experts.stacks()[stack.parameter]:
                self._attach(peft_config, adapter_name, layer)
        return [f"{stack.path}.{stack.parameter}" for stack in plan.stacks]

    def _initial_matrix(
        self, group: Group, peft_config: PicaConfig, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """M (width, rank), zeros unless `init_weights` is off."""
        if peft_config.init_weights or device.type == "meta":
            return torch.zeros(group.width, group.rank, dtype=dtype, device=device)
        return torch.randn(group.width, group.rank, dtype=dtype).to(device) / group.rank**0.5
