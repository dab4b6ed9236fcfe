"""Saving an adapter whose base weights were replaced since it was added: the basis follows, or saving refuses."""

from __future__ import annotations

from pica.errors import BasisMismatchError
from pica.tuners.base.bank import SharedMatrices
from pica.tuners.base.frozen_weight import SAME_WEIGHT
from pica.tuners.base.replaced_weight import rebase
from pica.tuners.base.verification import check_fingerprint, take_fingerprint

# A sample that is off by more than this share of its norm is no rounded or further trained copy, but another weight.
OTHER_WEIGHT = 0.1


def follow_weights(slot: SharedMatrices, adapter_name: str, *, stores_basis: bool) -> None:
    """Before an adapter is saved: see to it that its fingerprint and the base model's weights belong together.

    Raises:
        BasisMismatchError: base weights were replaced since, and the adapter was trained with the old ones' basis.
    """
    off = {path: layer.frozen.deviation() for path, layer in slot.layers.items()}
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
            slot.solved(taken)


def _still_fits(slot: SharedMatrices, adapter_name: str) -> bool:
    assert slot.fingerprint is not None
    return all(check.acceptable for check in check_fingerprint(slot, adapter_name, slot.fingerprint))
