"""A saved adapter's meaning: its basis fingerprint is taken when it is added, stored beside M, and held against on load.

The fingerprint of an adapter is a buffer of its slot in the bank. It is checked where PEFT loads weights, and for
loaders that write into the model directly (transformers' own) before the first forward pass.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from pica.basis.alignment import Alignment
from pica.basis.fingerprint import (
    NAMED,
    LayerPrint,
    Mode,
    choose_mode,
    decode,
    encode,
    encoded_size,
    path_hash,
)
from pica.errors import AdapterFileError, BasisMismatchError
from pica.tuners.base.bank import MatrixBank, Provenance, SharedMatrices
from pica.tuners.base.method import StoresBasis

logger = logging.getLogger(__name__)

# Estimated |P_trained - P|_F / sqrt(r). Two correct solvers in float32 differ by 1e-5; the fingerprint's own rounding
# shows below QUIET; weights rounded to bfloat16 give 0.01 to 0.03 on SmolLM2; another model's basis gives 1.4.
QUIET = 1e-2
TOLERANCE = 6e-2
WORST_DIRECTION = 0.5
GAIN_TOLERANCE = 0.05


@dataclass(frozen=True)
class LayerCheck:
    """Result for one layer: how its basis lies to the trained one."""

    path: str
    alignment: Alignment
    trained_dtype: str
    dtype: str
    trained_origin: str = ""
    origin: str = ""

    @property
    def difference(self) -> str:
        """How the weights of the two bases came about, where that differs; else empty."""
        if {self.trained_origin, self.origin} <= {"", NAMED}:  # a checkpoint and the model loaded from it are the same
            kinds = ("", "")
        else:
            kinds = (_origin_words(self.trained_origin), _origin_words(self.origin))
        then, now = f"{self.trained_dtype} {kinds[0]}".strip(), f"{self.dtype} {kinds[1]}".strip()
        return f"trained on {then} weights, these are {now}" if then != now else ""

    @property
    def acceptable(self) -> bool:
        a = self.alignment
        return (
            not a.reason and a.deviation <= TOLERANCE and a.worst <= WORST_DIRECTION and a.gain_error <= GAIN_TOLERANCE
        )


def take_fingerprint(slot: SharedMatrices, adapter_name: str) -> Tensor | None:
    """The fingerprint of an adapter's bases as they are now, uint8; None while a layer's weights are on the meta device."""
    layers = slot.layers
    if not layers or any(layer.frozen.is_deferred() for layer in layers.values()):
        return None
    mode, probes = _mode(slot, adapter_name)
    prints: dict[str, LayerPrint] = {}
    for path, layer in layers.items():
        prints[path] = layer.method.take_print(adapter_name, mode, probes)
    return torch.frombuffer(bytearray(encode(prints, mode, probes)), dtype=torch.uint8)


def room_for_fingerprint(slot: SharedMatrices, adapter_name: str) -> Tensor:
    """Zeros, as many bytes as the adapter's fingerprint has: for a loader that writes a stored one into the model."""
    ranks = [layer.method.direction_count(adapter_name) for layer in slot.layers.values()]
    return torch.zeros(encoded_size(ranks, *_mode(slot, adapter_name)), dtype=torch.uint8, device="cpu")


def _mode(slot: SharedMatrices, adapter_name: str) -> tuple[Mode, int]:
    ranks = [layer.method.direction_count(adapter_name) for layer in slot.layers.values()]
    return choose_mode(ranks, sum(m.numel() for m in slot.values()))


def check_fingerprint(slot: SharedMatrices, adapter_name: str, fingerprint: Tensor) -> list[LayerCheck]:
    """Hold each layer's basis against a stored fingerprint; changes nothing.

    Returns:
        What came of it, a layer each.
    Raises:
        AdapterFileError: The fingerprint is damaged or is of other layers.
    """
    if fingerprint.dtype != torch.uint8 or fingerprint.ndim != 1:
        raise AdapterFileError(
            f"The adapter's basis fingerprint should be a row of bytes, got {fingerprint.dtype} {tuple(fingerprint.shape)}."
        )
    prints, mode, _ = decode(fingerprint.cpu().numpy().tobytes())
    if absent := [path for path in slot.layers if path_hash(path) not in prints]:
        raise AdapterFileError(
            f"The adapter was trained on other layers than it is loaded onto: its fingerprint lacks {_some(absent)}. "
            "Check target_modules in adapter_config.json, and the base model."
        )
    if len(prints) != len(slot.layers):
        raise AdapterFileError(
            f"The adapter was trained on {len(prints)} layers and is loaded onto {len(slot.layers)}. "
            "Check target_modules in adapter_config.json, and the base model."
        )
    _check_ranks(slot, adapter_name, prints)
    checks = []
    for path, layer in slot.layers.items():
        trained = prints[path_hash(path)]
        alignment, dtype, origin = layer.method.align_print(adapter_name, trained, mode)
        name = str(dtype).removeprefix("torch.")
        checks.append(LayerCheck(path, alignment, trained.dtype, name, trained.origin, origin))
    return checks


def _check_ranks(slot: SharedMatrices, adapter_name: str, prints: Mapping[bytes, LayerPrint]) -> None:
    """Refuse an adapter whose configuration gives a layer other directions of the shared matrix than it was trained with."""
    for path, layer in slot.layers.items():
        trained, rank = prints[path_hash(path)], layer.method.direction_count(adapter_name)
        # of a matrix on the input's side the print is of the transpose
        same_shape = {trained.out_features, trained.in_features} == {layer.out_features, layer.in_features}
        if same_shape and trained.rank != rank:
            raise AdapterFileError(
                f"The adapter was trained with rank {trained.rank} at {path}, and its configuration gives that layer rank "
                f"{rank}. Put r and rank_pattern right in adapter_config.json; of several patterns that match, the first "
                "counts, and files written before pica kept that order may have lost it."
            )


def align_or_refuse(
    bank: MatrixBank,
    slot: SharedMatrices,
    adapter_name: str,
    fingerprint: Tensor,
    base_name: str | None,
    *,
    new_bases: bool = False,
) -> None:
    """Make the layers' bases the ones that the adapter was trained with, or refuse.

    Other signs and rotations among equal singular values are put right; a deviation such as rounding of the weights
    gives is accepted with a warning.

    Args:
        bank: Of the method, in the base model.
        slot: The adapter's part of it.
        adapter_name: The adapter.
        fingerprint: Of the bases that it was trained with.
        base_name: The base model that it was trained on, for messages.
        new_bases: Whether the layers have just been given other bases, those of the adapter's file.
    Raises:
        BasisMismatchError: a basis is another one; nothing has been changed then.
        AdapterFileError: the fingerprint is damaged or is of other layers.
    """
    if (not new_bases and _has_already(slot, fingerprint)) or _known(bank, slot, adapter_name, fingerprint):
        slot.verified(fingerprint)
        return
    checks = check_fingerprint(slot, adapter_name, fingerprint)
    if bad := [c for c in checks if not c.acceptable]:
        raise BasisMismatchError(_mismatch_message(bad, len(checks), base_name, _remedy(slot)))
    turned = 0
    for check in checks:
        layer = slot.layers[check.path]
        if check.alignment.usable != layer.method.usable_directions(adapter_name):
            # The rounding of a weight may give it more or less, and the shared matrix has columns that mean other layers.
            layer.method.limit(adapter_name, check.alignment.usable)
        if check.alignment.rotation is not None:
            layer.method.turn(adapter_name, check.alignment.rotation)
            turned += 1
    if turned:
        logger.info("%s: put %d of %d bases into the orientation of the training", adapter_name, turned, len(checks))
    worst = max(checks, key=lambda c: c.alignment.deviation, default=None)
    if worst is not None and worst.alignment.deviation > QUIET:
        why = "; ".join(sorted({c.difference for c in checks if c.difference})) or "rounded weights?"
        warnings.warn(
            f"{_method(slot)}: the base model's weights are not exactly those of the training ({why}). The basis "
            f"deviates by up to {worst.alignment.deviation:.1%} (layer {worst.path}; accepted up to {TOLERANCE:.0%}).",
            stacklevel=3,
        )
    slot.verified(fingerprint)


def siblings(bank: MatrixBank, slot: SharedMatrices, adapter_name: str) -> Iterator[tuple[str, SharedMatrices]]:
    """Other adapters on the very bases that this one uses, whose fingerprints were held against them."""
    layers = slot.layers.values()
    for name in bank:
        other = bank.matrices(name)
        if (
            other is slot
            or other.unverified
            or not other.has_fingerprint()
            or other.layers.keys() != slot.layers.keys()
        ):
            continue
        if all(layer.method.same_basis(adapter_name, name) for layer in layers):
            yield name, other


def _has_already(slot: SharedMatrices, fingerprint: Tensor) -> bool:
    """Whether it is the adapter's own, as when a training goes on from its checkpoint (with weights sharded by then)."""
    own = slot.fingerprint
    return not slot.unverified and slot.has_fingerprint() and torch.equal(cast(Tensor, own).cpu(), fingerprint.cpu())


def _known(bank: MatrixBank, slot: SharedMatrices, adapter_name: str, fingerprint: Tensor) -> bool:
    """Whether this very fingerprint was held against these bases already."""
    # Hundreds of adapters of one base model would otherwise cost a check each.
    found = fingerprint.cpu()
    return any(
        torch.equal(cast(Tensor, other.fingerprint).cpu(), found) and _same_ranks(slot, adapter_name, name)
        for name, other in siblings(bank, slot, adapter_name)
    )


def _same_ranks(slot: SharedMatrices, one: str, other: str) -> bool:
    return all(
        layer.method.direction_count(one) == layer.method.direction_count(other) for layer in slot.layers.values()
    )


def new_fingerprint(bank: MatrixBank, slot: SharedMatrices, adapter_name: str) -> Tensor | None:
    """`take_fingerprint`, or what it gave for an adapter of the same ranks on the same bases."""
    size = room_for_fingerprint(slot, adapter_name).shape  # its mode depends on how much is shared
    for name, other in siblings(bank, slot, adapter_name):
        solved_here = other.provenance is Provenance.SOLVED
        if _same_ranks(slot, adapter_name, name) and solved_here and cast(Tensor, other.fingerprint).shape == size:
            return other.fingerprint
    return take_fingerprint(slot, adapter_name)


def _origin_words(origin: str) -> str:
    return {"": "unquantised", NAMED: "unquantised"}.get(origin, f"dequantised {origin}")


def _some(names: Iterable[str], limit: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _method(slot: SharedMatrices) -> str:
    return next((layer.method.name for layer in slot.layers.values()), "")


def _remedy(slot: SharedMatrices) -> str:
    return next((layer.method.remedy for layer in slot.layers.values()), "")


def _mismatch_message(bad: list[LayerCheck], total: int, base_name: str | None, remedy: str) -> str:
    shown = []
    for check in sorted(bad, key=lambda c: -c.alignment.deviation)[:3]:
        a = check.alignment
        shown.append(f"{check.path} ({a.reason or f'deviation {a.deviation:.0%}, gains off by {a.gain_error:.0%}'})")
    deviations = [c.alignment.deviation for c in bad]
    if any(c.alignment.reason for c in bad):
        cause = "another base model"
    elif len(bad) == total and min(deviations) > 0.8:
        cause = "another base model or another revision of it"
    elif len(bad) < total:
        cause = "a base model of which some layers were changed: an adapter merged into it, or fine-tuned"
    else:
        cause = "a merged, fine-tuned or quantised copy of the base model"
    original = f" ({base_name})" if base_name else ""
    trained, now = bad[0].trained_origin, bad[0].origin
    if bad[0].difference and trained != now:
        cause = f"{bad[0].difference}"
        if trained in ("", NAMED):
            remedy = (
                f"set basis_from in its configuration to the unquantised checkpoint (config = PicaConfig.from_pretrained"
                f"(adapter); config.basis_from = ...; PeftModel.from_pretrained(base, adapter, config=config)), or {remedy}"
            )
        else:
            remedy = f"load the base model quantised as then, or {remedy}"
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return (
        f"This adapter was trained with another basis than this base model has, so it would compute something else: "
        f"{len(bad)} of {total} layers differ: {', '.join(shown)}{more}. Likely cause: {cause}. Ways out: load the base "
        f"model that it was trained on{original}, unmerge what was merged into it, or {remedy}."
    )


BASIS_MARK = "basis:"  # in a file: pica_M.basis:<layer path>, the projector itself


def stored_bases(slot: SharedMatrices, adapter_name: str) -> dict[str, Tensor]:
    """The projectors of an adapter's layers, by file name, for `save_basis`: in the compute dtype, cut to its rank."""
    return {f"{BASIS_MARK}{path}": method.stored_basis(adapter_name) for path, method in _storing(slot).items()}


def _storing(slot: SharedMatrices) -> dict[str, StoresBasis]:
    return {path: layer.method for path, layer in slot.layers.items() if isinstance(layer.method, StoresBasis)}


@contextmanager
def stored_bases_installed(slot: SharedMatrices, adapter_name: str, stored: Mapping[str, Tensor]) -> Iterator[None]:
    """Use projectors from an adapter file, if it has any, from now on; an error in the block puts the old ones back.

    Raises:
        AdapterFileError: one is missing, not expected, not finite or of a shape that its layer does not have.
    """
    if not stored:
        yield
        return
    methods = _storing(slot)
    problems = [f"{BASIS_MARK}{p} is not expected" for p in stored if p not in methods]
    for path, method in methods.items():
        tensor = stored.get(path)
        problem = "is missing" if tensor is None else method.stored_basis_problem(adapter_name, tensor)
        if problem:
            problems.append(f"{BASIS_MARK}{path} {problem}")
    if problems:
        raise AdapterFileError(f"The adapter's stored basis does not fit this model: {_some(problems)}.")
    stores = {path: slot.layers[path].bases for path in methods}
    before = {path: store.key_of[adapter_name] for path, store in stores.items()}
    try:
        for path, method in methods.items():
            method.use_stored_basis(adapter_name, stored[path])
        yield
    except BaseException:
        for path, key in before.items():
            stores[path].key_of[adapter_name] = key
        raise
    finally:
        for store in stores.values():
            store.drop_unused()
