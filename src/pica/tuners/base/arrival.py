"""Adapters that a loader wrote straight into the model: held against their fingerprint before they are used, or taken out.

PEFT asks the method when it loads an adapter's file. transformers' own loaders (and sentence-transformers', which calls
them), Accelerate's and torch's do not: they write into the bank, and leave out what they find no place for, such as a
stored basis or a stranger's matrix. So the bases are the base model's own here, and the fingerprint says whether they do.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from pica.basis import process_count
from pica.errors import AdapterFileError
from pica.tuners.base.bank import Arrival, MatrixBank, SharedMatrices
from pica.tuners.base.sharding import from_first_process, is_dtensor, loads_in_one_process
from pica.tuners.base.state_dict import check_matrices, no_fingerprint, take_out
from pica.tuners.base.verification import (
    align_or_refuse,
    new_fingerprint,
    room_for_fingerprint,
    siblings,
    take_fingerprint,
)


def note_provenance(bank: MatrixBank, name: str, expected: Arrival | None) -> None:
    """Of an adapter that has just been added: take the fingerprint of its bases, or expect one from a file.

    Args:
        bank: Where its matrices are.
        name: The adapter.
        expected: What is known of an adapter whose weights are to come from a file; None for a new one.
    """
    slot = bank.matrices(name)
    room = room_for_fingerprint(slot, name)
    if expected is not None:
        slot.awaits(room)  # the trained one comes with the weights
        slot.expect(expected)
    else:
        fingerprint = new_fingerprint(bank, slot, name)
        if loads_in_one_process():
            fingerprint = from_first_process(room if fingerprint is None else fingerprint)
            slot.keep_fingerprint_aside()
        if fingerprint is None:  # the base weights are still to come, perhaps in a state dict that brings it
            slot.awaits(room)
        else:
            slot.solved(fingerprint)
    bank.refresh_unverified()


def verify_arrived(bank: MatrixBank) -> None:
    """Hold each unverified adapter of a bank against its fingerprint; what fails is taken out of the model.

    Raises:
        AdapterFileError: a matrix is missing, not finite or of another shape, or the fingerprint is missing or damaged.
        BasisMismatchError: the adapter was trained with another basis.
    """
    for name in list(bank):
        slot = bank.matrices(name)
        if not slot.unverified:
            continue
        try:
            _verify(bank, slot, name)
        except BaseException:
            tuner = bank.tuner[0] if bank.tuner else None
            waits = any(layer.frozen.is_deferred() for layer in slot.layers.values())
            # A PeftModel's adapter stays, and stays refused: the right state may still be loaded into it.
            if tuner is not None and not tuner.serves_peft_model and not waits:
                take_out(tuner, name, slot.arrival)
            raise
    bank.refresh_unverified()


def _verify(bank: MatrixBank, slot: SharedMatrices, name: str) -> None:
    if any(matrix.is_meta for matrix in slot.values()):
        return  # still to be written
    written = slot.written()
    if not written and not slot.has_fingerprint():  # a new adapter, made from a saved adapter's configuration
        if (own := take_fingerprint(slot, name)) is not None:
            slot.solved(own)
        return
    arrival = slot.arrival or Arrival()
    found = {group: _as_checked(slot, group) for group in written}
    check_matrices(slot, found, _bank_name(slot))
    for key in slot.checks:
        if problem := slot.buffer_problem(key, slot.get_buffer(key), f"{key} of adapter {name!r}"):
            raise AdapterFileError(f"The adapter file is damaged: {problem}.")
    if not slot.has_fingerprint():
        if (twin := _twin(bank, slot, name)) is None:
            raise AdapterFileError(no_fingerprint(name))
        slot.verified_like(twin)
        return
    align_or_refuse(bank, slot, name, cast(Tensor, slot.fingerprint), arrival.base_name)


def _twin(bank: MatrixBank, slot: SharedMatrices, name: str) -> SharedMatrices | None:
    """A verified adapter on the same bases with the same matrices: what was copied from it means what it means."""
    # TRL makes the reference of a preference training in this way, matrix by matrix.
    for _, other in siblings(bank, slot, name):
        if other.keys() == slot.keys() and all(
            slot[group].shape == other[group].shape and torch.equal(slot[group].detach(), other[group].detach())
            for group in slot
        ):
            return other
    return None


def _bank_name(slot: SharedMatrices) -> str:
    return next((layer.adapter_layer_names[0] for layer in slot.layers.values()), "")


def _as_checked(slot: SharedMatrices, group: str) -> Tensor:
    """What is here of a written matrix; where processes share it, no more than its shape can be checked."""
    matrix = slot[group].detach()
    shape = slot.shapes.get(group) or matrix.shape
    if is_dtensor(matrix) or (process_count() > 1 and matrix.shape != shape):
        return torch.empty(tuple(shape), dtype=matrix.dtype, device="meta")
    return matrix
