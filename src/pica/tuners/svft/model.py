"""`SvftModel`: puts SVFT layers into a base model and keeps their trained entries in one bank."""

from __future__ import annotations

import torch
from torch import Tensor

from pica.tuners.base.bank import SVFT_BANK
from pica.tuners.base.roles import Group
from pica.tuners.base.tuner import BankedModel
from pica.tuners.svft.config import SvftConfig
from pica.tuners.svft.layer import SvftLinear
from pica.tuners.svft.pattern import entry_count
from pica.tuners.svft.plan import SvftPlan


class SvftModel(BankedModel):
    """A base model with SVFT adapters, as `peft.get_peft_model` makes it from an `SvftConfig`."""

    prefix: str = "svft_"
    tuner_layer_cls = SvftLinear
    layer_class = SvftLinear
    bank_name = SVFT_BANK

    def _make_plan(self, peft_config: SvftConfig) -> SvftPlan:
        return SvftPlan(self, peft_config)

    def _initial_matrix(
        self, group: Group, peft_config: SvftConfig, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """The entries of T (count,), zeros unless `init_weights` is off."""
        count = entry_count(group.width, peft_config.band)
        if peft_config.init_weights or device.type == "meta":
            return torch.zeros(count, dtype=dtype, device=device)
        return torch.randn(count, dtype=dtype).to(device) * (group.width / max(count, 1)) ** 0.5
