"""An adapter's entries in a state dict: which they are, what they are called in a file, and whether a file fits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from pica.basis import process_index
from pica.errors import AdapterFileError
from pica.tuners.base.bank import (
    BANK_NAMES,
    Arrival,
    MatrixBank,
    SharedMatrices,
    find_banks,
    get_bank,
    plain_name,
    verify_loaded,
)
from pica.tuners.base.follow_weights import follow_weights
from pica.tuners.base.protocols import Tuner
from pica.tuners.base.sharding import placed_like
from pica.tuners.base.verification import (
    BASIS_MARK,
    align_or_refuse,
    stored_bases,
    stored_bases_installed,
    take_fingerprint,
)

FINGERPRINT = "fingerprint"


def slots_of(model: nn.Module, adapter_name: str) -> list[tuple[str, MatrixBank, SharedMatrices]]:
    return [(name, bank, bank.matrices(adapter_name)) for name, bank in find_banks(model) if adapter_name in bank]


def select_state(
    model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Select what a file of the adapter holds.

    Returns:
        Entries of `state_dict` that are the adapter's, its fingerprint, and with `save_basis` its projectors.
    Raises:
        AdapterFileError: A matrix is not whole, or is missing, since the model is sharded and nobody has gathered it; or
            a loader has just written the adapter, and it is refused.
        BasisMismatchError: Likewise, since it was trained on another base model.
    """
    selected: dict[str, Tensor] = {}
    for bank_name, bank, slot in slots_of(model, adapter_name):
        if slot.unverified:
            verify_loaded(bank)
        if slot.has_fingerprint():
            follow_weights(slot, adapter_name, stores_basis=bool(getattr(config, "save_basis", False)))
        prefix = f"{bank_name}.{adapter_name}."
        _check_gathered(slot, {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)})
        selected.update({plain_name(k): v for k, v in state_dict.items() if k.startswith(prefix)})
        plain = plain_name(prefix.rstrip(".")) + "."
        if not slot.has_fingerprint() and (taken := take_fingerprint(slot, adapter_name)) is not None:
            slot.solved(taken)  # the weights were on the meta device when the adapter was added
        if slot.has_fingerprint():
            selected[f"{plain}{FINGERPRINT}"] = cast(Tensor, slot.fingerprint)
        if getattr(config, "save_basis", False) and slot.has_fingerprint():
            selected.update({f"{plain}{k}": v for k, v in stored_bases(slot, adapter_name).items()})
    return selected


def _check_gathered(slot: SharedMatrices, entries: dict[str, Tensor]) -> None:
    """Refuse to take an adapter from a state dict that holds parts of its matrices, or none of them."""
    short = [group for group, shape in slot.shapes.items() if group in entries and entries[group].shape != shape]
    if not short and process_index() == 0:  # where states are gathered in the first process, the others have none
        short = [group for group in slot.shapes if group not in entries]
    if short:
        have = entries[short[0]].numel() if short[0] in entries else 0
        raise AdapterFileError(
            f"{short[0]}: {have} of its {slot.shapes[short[0]].numel()} numbers are here, since the model is sharded, so a "
            "file would be of no use. Save by Trainer.save_model(), or by save_pretrained(state_dict=...) with what "
            "accelerator.get_state_dict(model) gives in all processes (ZeRO-3 needs "
            "stage3_gather_16bit_weights_on_model_save)."
        )


def remap_state(
    model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Hold a file against the model and its bases, and give its entries the model's names.

    Returns:
        The entries.
    Raises:
        AdapterFileError: A matrix is missing, not expected, not finite or of another shape.
        BasisMismatchError: The adapter was trained with another basis.
    """
    renamed = dict(state_dict)
    for bank_name, bank, slot in slots_of(model, adapter_name):
        short_bank = plain_name(bank_name).removeprefix("base_model.model.")
        own = re.compile(rf"(base_model\.model\.)?{re.escape(short_bank)}\.(?P<entry>.+)")
        entries: dict[str, Tensor] = {}
        for key in state_dict:
            if match := own.fullmatch(plain_name(key)):
                entries[match["entry"]] = renamed.pop(key)
        bases = {k.removeprefix(BASIS_MARK): entries.pop(k) for k in list(entries) if k.startswith(BASIS_MARK)}
        fingerprint = entries.pop(FINGERPRINT, None)
        buffers = {k: entries.pop(k) for k in list(entries) if k in slot.checks}
        check_matrices(slot, entries, short_bank)
        _check_buffers(slot, buffers, short_bank)
        if fingerprint is None:
            raise AdapterFileError(no_fingerprint(adapter_name))
        fingerprint = _as_bytes(fingerprint)
        base_name = getattr(config, "base_model_name_or_path", None)
        with stored_bases_installed(slot, adapter_name, bases):
            align_or_refuse(bank, slot, adapter_name, fingerprint, base_name, new_bases=bool(bases))
        bank.refresh_unverified()
        prefix = f"{bank_name}.{adapter_name}."
        entries = {group: placed_like(value, slot[group]) for group, value in entries.items()}
        renamed.update({f"{prefix}{k}": v for k, v in {**entries, **buffers}.items()})
        renamed[f"{prefix}{FINGERPRINT}"] = fingerprint
    marks = "|".join(BANK_NAMES)
    if stray := [k for k in renamed if re.search(rf"(^|\.)({marks})\.", k) and f".{adapter_name}." not in k]:
        raise AdapterFileError(f"The adapter file holds entries for a part that this model does not have: {stray[0]}.")
    return renamed


def no_fingerprint(adapter_name: str) -> str:
    return (
        f"The file of adapter {adapter_name!r} holds no basis fingerprint, so nobody can tell which basis it was trained "
        "with. It is incomplete, or another program wrote it."
    )


def _as_bytes(fingerprint: Tensor) -> Tensor:
    """Read a fingerprint that was averaged with others, like every tensor of their state dicts.

    Returns:
        Of equal ones it is the same.
    Raises:
        AdapterFileError: They were not equal.
    """
    if not fingerprint.is_floating_point() or fingerprint.is_meta:
        return fingerprint
    rounded = fingerprint.double().round()
    # weights that add up to one do so but for rounding
    if not bool(
        ((fingerprint.double() - rounded).abs() <= 0.02).all() and (rounded >= 0).all() and (rounded <= 255).all()
    ):
        raise AdapterFileError(
            "The adapter's basis fingerprint is a mean of different ones: adapters were averaged whose bases differ, so "
            "that their matrices mean different things. Average adapters of the same base model and configuration, with "
            "weights that add up to 1, and load them all on that base first."
        )
    return rounded.to(torch.uint8)


def check_matrices(slot: SharedMatrices, entries: Mapping[str, Tensor], bank: str) -> None:
    """Refuse matrices that do not fit the slot's groups; on the meta device only their shapes are looked at.

    Args:
        slot: The adapter's groups.
        entries: What was found, by group.
        bank: The bank's name, for messages.
    Raises:
        AdapterFileError: a matrix is missing, not expected, not finite or of another shape; names them.
    """
    problems = [f"{bank}.{k} is not expected" for k in entries if k not in slot]
    for group, matrix in slot.items():
        value = entries.get(group)
        if value is None:
            problems.append(f"{bank}.{group} is missing")
        elif value.shape != (whole := slot.shapes.get(group) or matrix.shape):
            problems.append(f"{bank}.{group} has shape {tuple(value.shape)} where {tuple(whole)} is expected")
        elif not value.is_floating_point():
            problems.append(f"{bank}.{group} has dtype {value.dtype}, not a float one")
        elif not value.is_meta and not torch.isfinite(value).all():
            problems.append(f"{bank}.{group} holds NaN or infinity")
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise AdapterFileError(
            f"The adapter does not fit this model and configuration: {shown}. "
            "Check that the base model and adapter_config.json are those of the training."
        )


def _check_buffers(slot: SharedMatrices, found: dict[str, Tensor], bank: str) -> None:
    """What a file holds beside matrices and fingerprint, for instance positions of entries, must fit the slot's own."""
    stored = slot.stored
    problems = [f"{bank}.{k} is missing" for k in sorted(stored - set(found))]
    problems += [f"{bank}.{k} is not expected" for k in sorted(set(found) - stored)]
    problems += [
        problem for k in sorted(stored & set(found)) if (problem := slot.buffer_problem(k, found[k], f"{bank}.{k}"))
    ]
    if problems:
        raise AdapterFileError(f"The adapter does not fit this model and configuration: {'; '.join(problems[:6])}.")


def withdraw(model: Any, adapter_name: str) -> None:
    """Take an adapter out again whose weights could not be loaded; others stay as they are."""
    for _, bank, slot in slots_of(model, adapter_name):
        if bank.tuner:
            take_out(bank.tuner[0], adapter_name, slot.arrival)


def take_out(tuner: Tuner, adapter_name: str, arrival: Arrival | None) -> None:
    """Take an adapter out of its model, which then computes as before it was added.

    Args:
        tuner: Who added it; PEFT and transformers share its mapping of configurations.
        adapter_name: The adapter.
        arrival: How the model was before; None where nobody remembers.
    """
    root, configs = tuner.model, tuner.peft_config
    if adapter_name not in configs:
        return
    if len(configs) > 1:
        tuner.delete_adapter(adapter_name)
        if bank := get_bank(root, tuner.bank_name):
            if adapter_name in bank:
                del bank[adapter_name]
            bank.refresh_unverified()
        if arrival is not None and arrival.active:
            _activate(root, arrival.active)
            tuner.active_adapter = list(arrival.active)
    else:
        tuner.unload()
        configs.pop(adapter_name, None)
        if getattr(root, "_hf_peft_config_loaded", False):
            root._hf_peft_config_loaded = False  # pyright: ignore[reportArgumentType] - transformers' own flag
    if arrival is not None and arrival.trainable is not None:
        trainable = {id(p) for p in arrival.trainable}
        for parameter in root.parameters():
            parameter.requires_grad_(id(parameter) in trainable)


def _activate(root: nn.Module, names: list[str]) -> None:
    for module in root.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            module.set_adapter(list(names))
