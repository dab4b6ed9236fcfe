"""A base weight that is replaced after an adapter was added to it: how that is seen, and that the basis follows.

A checkpoint that arrives late, `load_state_dict` or a new initialisation writes into the base layers and tells nobody.
Beside its basis a layer keeps a sample of the weight that it is of; looking at that again costs next to nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pica.tuners.base.bank import Arrival
from pica.tuners.base.protocols import AdaptedLayer
from pica.tuners.base.sharding import in_parts


def rebase(layer: AdaptedLayer) -> None:
    """Make a layer's bases anew from its weight, when they are needed next.

    An adapter whose matrices are as they were made takes its fingerprint anew; any other is held against the one it has.
    """
    layer.method.forget_bases()
    for name in layer.group_of:
        slot = layer.bank.matrices(name)
        if slot.unverified:
            continue
        if slot.untouched():
            slot.forget_fingerprint()
            layer.method.forget_choices(name)
        else:
            slot.expect(Arrival(written=set(slot)))


def loaded_weight_differs(layer: AdaptedLayer, state_dict: dict[str, Any], prefix: str) -> bool:
    """Whether a state dict that is about to be loaded brings another weight for a layer's base layer."""
    new, own = state_dict.get(f"{prefix}base_layer.weight"), layer.frozen.raw()
    if not isinstance(new, Tensor) or type(own) not in (Tensor, nn.Parameter) or new.shape != own.shape:
        return False
    if own.is_meta or new.is_meta or in_parts(own) or layer.merged or layer.frozen.quantised:
        return False
    return not torch.equal(own.detach(), new.detach().to(own))
