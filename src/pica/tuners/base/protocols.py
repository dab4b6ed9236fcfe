"""What the parts of a tuner need to know of each other, so that none of them has to import those above it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from torch import nn

from pica.tuners.base.basis_store import BasisStore
from pica.tuners.base.frozen_weight import FrozenWeight
from pica.tuners.base.method import Method


class AdaptedLayer(Protocol):
    """An adapted layer as the bank and verification see it: `pica.tuners.base.layer.SharedLayer`."""

    adapter_layer_names: Any
    in_features: int
    out_features: int
    path: str
    group_of: dict[str, str]
    frozen: FrozenWeight
    bases: BasisStore
    merged_adapters: list[str]

    @property
    def method(self) -> Method: ...
    @property
    def bank(self) -> Any: ...
    @property
    def merged(self) -> bool: ...
    def delete_adapter(self, adapter_name: str) -> None: ...


class Tuner(Protocol):
    """A tuner as its bank, its saved state and distributed training see it: `pica.tuners.base.tuner.BankedModel`."""

    model: nn.Module
    bank_name: ClassVar[str]
    serves_peft_model: bool
    active_adapter: Any

    @property
    def peft_config(self) -> Any: ...
    @property
    def active_adapters(self) -> Sequence[str]: ...
    def delete_adapter(self, adapter_name: str) -> None: ...
    def unload(self) -> nn.Module: ...
