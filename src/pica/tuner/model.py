"""`PicaModel`: puts PiCa layers into a base model and keeps their shared matrices in one bank."""

from __future__ import annotations

import torch
from torch import Tensor

from pica.tuner.bank import BANK_NAME
from pica.tuner.banked import BankedModel
from pica.tuner.config import PicaConfig
from pica.tuner.layer import PicaLinear
from pica.tuner.plan import Plan
from pica.tuner.roles import Group


class PicaModel(BankedModel):
    """A base model with PiCa adapters, as `peft.get_peft_model` makes it from a `PicaConfig`."""

    prefix: str = "pica_"
    tuner_layer_cls = PicaLinear
    layer_class = PicaLinear
    bank_name = BANK_NAME

    def _make_plan(self, peft_config: PicaConfig) -> Plan:
        return Plan(self, peft_config)

    def _initial_matrix(
        self, group: Group, peft_config: PicaConfig, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """M (out, rank), zeros unless `init_weights` is off."""
        if peft_config.init_weights or device.type == "meta":
            return torch.zeros(group.out_features, group.rank, dtype=dtype, device=device)
        return torch.randn(group.out_features, group.rank, dtype=dtype).to(device) / group.rank**0.5
