"""A base weight that is replaced after an adapter was added to it: the basis follows, or saving refuses.

A checkpoint that arrives late, `load_state_dict` or a new initialisation writes into the base layers and tells nobody.
Beside its basis a layer keeps a sample of the weight that it is of; looking at that again costs next to nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pica.errors import BasisMismatchError
from pica.tuner.adapted import SAME_WEIGHT, AdaptedLinear
from pica.tuner.bank import AdapterSlot, Arrival
from pica.tuner.meaning import check_fingerprint, take_fingerprint
from pica.tuner.sharding import in_parts

# A sample that is off by more than this share of its norm is no rounded or further trained copy, but another weight.
OTHER_WEIGHT = 0.1


def rebase(layer: AdaptedLinear) -> None:
    """Make a layer's bases anew from its weight, when they are needed next.

    An adapter whose matrices are as they were made takes its fingerprint anew; any other is held against the one it has.
    """
    layer.forget_bases()
    for name in layer.pica_group:
        slot = layer.bank.matrices(name)
        if slot.unverified:
            continue
        if slot.untouched():
            slot.forget_fingerprint()
            layer.forget_choices(name)
        else:
            slot.expect(Arrival(written=set(slot)))


def loaded_weight_differs(layer: AdaptedLinear, state_dict: dict[str, Any], prefix: str) -> bool:
    """Whether a state dict that is about to be loaded brings another weight for a layer's base layer."""
    new, own = state_dict.get(f"{prefix}base_layer.weight"), layer.raw_weight()
    if not isinstance(new, Tensor) or type(own) not in (Tensor, nn.Parameter) or new.shape != own.shape:
        return False
    if own.is_meta or new.is_meta or in_parts(own) or layer.merged or layer.quantization_backend:
        return False
    return not torch.equal(own.detach(), new.detach().to(own))


def follow_weights(slot: AdapterSlot, adapter_name: str, *, stores_basis: bool) -> None:
    """Before an adapter is saved: see to it that its fingerprint and the base model's weights belong together.

    Raises:
        BasisMismatchError: base weights were replaced since, and the adapter was trained with the old ones' basis.
    """
    off = {path: layer.weight_deviation() for path, layer in slot.layers.items()}
    replaced = [path for path, deviation in off.items() if deviation > SAME_WEIGHT]
    if not replaced:
        return
    if slot.untouched():
        for path in replaced:
            rebase(slot.layers[path])
    elif max(off.values()) > OTHER_WEIGHT or not _still_fits(slot, adapter_name):
        if not stores_basis:
            more = f" and {len(replaced) - 1} more" if len(replaced) > 1 else ""
            raise BasisMismatchError(
                f"The base model's weights were replaced after adapter {adapter_name!r} was added ({replaced[0]}{more}), "
                "and it was trained with the basis of the old ones, so its file would fit neither. Load the base model's "
                "weights before the adapter is added; to save this one nevertheless, set save_basis=True in its "
                "configuration, which stores the basis."
            )
        if (taken := take_fingerprint(slot, adapter_name)) is not None:
            slot.set_fingerprint(taken)


def _still_fits(slot: AdapterSlot, adapter_name: str) -> bool:
    assert slot.fingerprint is not None
    return all(check.acceptable for check in check_fingerprint(slot, adapter_name, slot.fingerprint))
