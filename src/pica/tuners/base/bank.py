"""Where the shared matrices live: once, in one container that is a child of the base model's root.

A matrix that is registered in each of its layers is seen many times by FSDP, safetensors and PEFT's casts, which then
shard, store or copy it many times. A container on the tuner instead would hide it from transformers' and diffusers' own
adapter integrations, which keep the base model and drop the tuner. So: one child of the root, layers hold a reference
that is not registered, and look their matrix up by name each time (casts and loaders may replace the parameter).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Self, cast

import torch
from torch import nn

from pica.tuners.base.layouts import Layouts
from pica.tuners.base.matrix_stack import MatrixStacks
from pica.tuners.base.mixed_batch import MixedBatch
from pica.tuners.base.protocols import AdaptedLayer, Tuner

# keys of saved adapters
PICA_BANK = "pica_M"
SVFT_BANK = "svft_T"
BANK_NAMES = frozenset({PICA_BANK, SVFT_BANK})
"""Names under which a base model's root holds banks, one for each method."""

EXPERT_ADAPTERS = "expert_adapters"
"""Where a wrapper of experts keeps its layers; no target matches a path with this name."""

# What wrappers put into module names: FSDP1 and activation checkpointing, whose state dicts leave it out, and
# torch.compile, whose state dicts do not.
HIDDEN_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
WRAPPERS = HIDDEN_WRAPPERS | {"_orig_mod"}


class Provenance(Enum):
    """How the bases that give an adapter's matrices their meaning are known to be the right ones."""

    AWAITED = "not there yet"
    """The base weights are still to come, and with them a fingerprint."""
    SOLVED = "solved here"
    """The fingerprint was taken of the layers' bases as they are."""
    EXPECTED = "expected from a file"
    """The fingerprint is, or will be, one from a file, never held against the layers' bases: the adapter is unverified."""
    VERIFIED = "verified"
    """The fingerprint is one from a file, and the layers' bases were held against it."""


@dataclass
class Arrival:
    """What is known of an adapter whose weights a loader is to bring, or has brought without asking anybody.

    Attributes:
        base_name: The base model that it was trained on, for messages.
        from_zero: Whether its matrices are all zero until they are written.
        active, trainable: The model's active adapters and trainable parameters before this adapter was added.
        written: Groups that were seen to be written.
        versions: Each matrix's version counter when the adapter was added.
    """

    base_name: str | None = None
    from_zero: bool = False
    active: list[str] = field(default_factory=list)
    trainable: list[nn.Parameter] | None = None
    written: set[str] = field(default_factory=set)
    versions: dict[str, int] = field(default_factory=dict)


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


class SharedMatrices(nn.ParameterDict):
    """One adapter's matrices {group key: M (out, rank)}, with the fingerprint of the bases that give them meaning.

    Attributes:
        fingerprint: uint8 buffer, stored with the matrices; None or all zeros until the adapter's bases exist, or until
            the one that a file holds is read into it.
        layers: The adapter's layers by path. A plain dict: they are not children of the bank.
        mixes: Whether samples of a batch with other adapters can have it.
        provenance: How its bases are known to be the right ones.
        arrival: What an adapter that a loader has yet to fill is held against; None once it has been.
        shapes: Of each matrix as a whole: a sharding framework may leave less of it in this process.
        drawn: The version counter of each matrix that began with random numbers.
        checks: For each further buffer, what says what is wrong with its value; a function that can be pickled.
        stored: Those of them that files hold.
    """

    fingerprint: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fingerprint", None)
        self.layers: dict[str, AdaptedLayer] = {}
        self.mixes = True
        self.provenance = Provenance.AWAITED
        self.arrival: Arrival | None = None
        self.shapes: dict[str, torch.Size] = {}
        self.drawn: dict[str, int] = {}
        self.checks: dict[str, Callable[[torch.Tensor], str | None]] = {}
        self.stored: set[str] = set()

    def add_buffer(
        self, key: str, value: torch.Tensor, *, persistent: bool, check: Callable[[torch.Tensor], str | None]
    ) -> None:
        """Keep a frozen tensor beside the matrices, unless it is there already; `check` says what is wrong with one."""
        if key not in self.checks:
            self.register_buffer(key, value, persistent=persistent)
            self.checks[key] = check
            if persistent:
                self.stored.add(key)

    def buffer_problem(self, key: str, value: torch.Tensor, name: str) -> str | None:
        """What is wrong with a file's value for one of the buffers, or None."""
        own = self.get_buffer(key)
        if value.shape != own.shape or value.dtype != own.dtype:
            return f"{name} is {value.dtype} {tuple(value.shape)} where {own.dtype} {tuple(own.shape)} is expected"
        problem = self.checks[key](value)
        return f"{name} {problem}" if problem else None

    @property
    def unverified(self) -> bool:
        return self.provenance is Provenance.EXPECTED

    def solved(self, fingerprint: torch.Tensor) -> None:
        """The layers' bases are those of the adapter, and this was taken of them."""
        self._settle(fingerprint, Provenance.SOLVED)

    def verified(self, fingerprint: torch.Tensor) -> None:
        """The layers' bases were held against this, which is the adapter's own."""
        self._settle(fingerprint, Provenance.VERIFIED)

    def verified_like(self, twin: SharedMatrices) -> None:
        """The bases are those of `twin`, on the same layers."""
        self._settle(cast(torch.Tensor, twin.fingerprint), twin.provenance)

    def awaits(self, room: torch.Tensor) -> None:
        """Leave room for a fingerprint only, until one is taken or read."""
        self._settle(room, Provenance.AWAITED)

    def _settle(self, fingerprint: torch.Tensor, provenance: Provenance) -> None:
        with torch.inference_mode(False):  # a loader may write to it outside of that mode
            self.fingerprint = fingerprint.clone()
        self.provenance, self.arrival = provenance, None

    def forget_fingerprint(self) -> None:
        """Leave room only, until one is taken again."""
        if self.fingerprint is not None:
            self.awaits(torch.zeros_like(self.fingerprint))

    def untouched(self) -> bool:
        """Whether every matrix is as it was made, or zero: it means nothing yet, in whatever basis."""
        return all(
            not matrix.is_meta
            and (group in self.drawn and _version(matrix) <= self.drawn[group] or not bool(matrix.detach().any()))
            for group, matrix in self.items()
        )

    # ---- loaders that write straight into the model ------------------------------------------------------------

    def expect(self, arrival: Arrival) -> None:
        """From now on the adapter is unverified, and what is written into it is noted."""
        arrival.versions = {group: _version(matrix) for group, matrix in self.items()}
        self.arrival = arrival
        self._mark_unverified()

    def _mark_unverified(self) -> None:
        self.provenance = Provenance.EXPECTED
        for layer in self.layers.values():
            layer.bank.unverified = True

    def written(self) -> set[str]:
        """Groups whose matrices somebody has written since `expect`."""
        arrival = self.arrival
        if arrival is None:
            return set()
        found = set(arrival.written)
        for group, matrix in self.items():
            if _version(matrix) > arrival.versions.get(group, 0):
                found.add(group)
            elif arrival.from_zero and not matrix.is_meta and bool(matrix.detach().any()):
                found.add(group)  # written in a way that leaves no trace, such as `.data`
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        arrival = self.__dict__.get("arrival")
        if arrival is not None and name in self:  # transformers' loader replaces the parameter
            arrival.written.add(name)
        super().__setattr__(name, value)

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride] - torch gives all by position
        self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any
    ) -> None:
        """Torch's; a fingerprint other than the present one means matrices that were trained elsewhere.

        Their bases are held against it before the next forward pass. Whoever reads adapter files has done that before.
        """
        own = None if self.fingerprint is None else self.fingerprint.clone()
        expected = self.arrival
        if expected is None:  # to see which matrices this writes
            self.arrival = Arrival(versions={group: _version(matrix) for group, matrix in self.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)
        if own is None or own.is_meta or torch.equal(own, cast(torch.Tensor, self.fingerprint)):
            self.arrival = expected
            return
        self._mark_unverified()

    def keep_fingerprint_aside(self) -> None:
        """Leave the fingerprint out of state dicts; saving an adapter adds it anyway.

        Accelerate, when it sends the weights of the first process to the others for FSDP, takes every entry of a state
        dict for a sharded parameter and fails at a buffer.
        """
        self.register_buffer("fingerprint", self.fingerprint, persistent=False)

    def has_fingerprint(self) -> bool:
        """Whether there is one, and not only room for it."""
        found = self.fingerprint
        return found is not None and not found.is_meta and bool(found[:8].any())


class MatrixBank(nn.ModuleDict):
    """{adapter name: SharedMatrices}.

    Attributes:
        unverified: Whether some slot may be; layers look at it in each forward pass, so it is one flag for all of them.
        tuner: Who added the last adapter, in a tuple, so that it is no child of the bank: for taking one out again.
        verifier: Holds what a loader wrote into the bank against its fingerprint; given by whoever adds adapters.
        batch: The mixed batch of the call that is under way, if it is one.
        layouts, stacks: What mixed batches found out about adapters and made of their matrices, kept for the next one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unverified = False
        self.tuner: tuple[Tuner, ...] = ()
        self.verifier: Callable[[MatrixBank], None] | None = None
        self.batch: MixedBatch | None = None
        self.layouts, self.stacks = Layouts(), MatrixStacks()
        self._activated: tuple[tuple[str, ...], bool, set[str]] | None = None

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        self.stacks.forget(key)

    def train(self, mode: bool = True) -> Self:
        """Torch's; what is kept for mixed batches goes: there are none in training, and matrices are about to change."""
        if mode:
            self.stacks.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Torch's, of moves and casts."""
        self.stacks.clear()
        return super()._apply(*args, **kwargs)

    def matrices(self, adapter_name: str) -> SharedMatrices:
        return cast(SharedMatrices, self[adapter_name])

    def refresh_unverified(self) -> None:
        self.unverified = any(cast(SharedMatrices, slot).unverified for slot in self.values())

    def activate(self, adapter_names: Sequence[str], inference_mode: bool, layer: str) -> None:
        """Let the matrices of these adapters be trained, and no other's.

        PEFT asks each layer in turn, and each means all matrices. The first layer of a round does it for all: with 256
        adapters on 150 layers the others would spend seconds on setting again what is set.

        Args:
            adapter_names: Adapters to activate.
            inference_mode: Whether these are not to be trained either.
            layer: Who asks. A round ends when one asks a second time, or something else.
        """
        asked = (tuple(adapter_names), inference_mode)
        if self._activated is not None and self._activated[:2] == asked and layer not in self._activated[2]:
            self._activated[2].add(layer)
            return
        for name in self:
            for parameter in self.matrices(name).values():
                parameter.requires_grad_(name in adapter_names and not inference_mode)
        self._activated = (*asked, {layer})

    def forward(self, x: Any) -> Any:
        """The identity: a base model that runs its children in turn (`nn.Sequential`) runs its bank too."""
        return x

    def add_matrix(self, adapter_name: str, group: str, matrix: torch.Tensor) -> None:
        """Register M for a group of an adapter unless it is there already (a reload keeps the parameter object)."""
        if adapter_name not in self:
            self[adapter_name] = SharedMatrices()
        if group not in self.matrices(adapter_name):
            self.matrices(adapter_name)[group] = nn.Parameter(matrix)
            slot = self.matrices(adapter_name)
            slot.shapes[group] = matrix.shape
            if not matrix.is_meta and bool(matrix.any()):
                slot.drawn[group] = _version(slot[group])
            self._activated = None


PicaBank = MatrixBank
"""Its name in models that were pickled whole when only PiCa had a bank."""


@torch.compiler.disable
def verify_loaded(bank: MatrixBank) -> None:
    """Hold adapters that a loader wrote straight into the bank against their fingerprints, once.

    Raises:
        BasisMismatchError, AdapterFileError: as `pica.tuners.base.arrival.verify_arrived`; the adapter is taken out then.
    """
    if bank.verifier is not None:
        bank.verifier(bank)


def plain_name(name: str) -> str:
    """A module or state-dict name as it is without wrappers, so that an adapter does not depend on them."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _unwrapped(root: nn.Module) -> nn.Module:
    compiled = root._modules.get("_orig_mod")  # of torch.compile(model)
    return root if compiled is None else compiled


def get_bank(root: nn.Module, name: str = PICA_BANK) -> MatrixBank | None:
    """A method's bank of a base model, or None where no adapter of that method was ever added."""
    # A PeftModel put into another tuner has it deeper inside: its layers refer to that one already.
    bank = _unwrapped(root)._modules.get(name)
    if isinstance(bank, MatrixBank):
        return bank
    return next((inner for path, inner in find_banks(root) if path.rpartition(".")[2] == name), None)


def ensure_bank(root: nn.Module, name: str, verifier: Callable[[MatrixBank], None]) -> MatrixBank:
    """The bank of a base model, made if need be, with this verifier."""
    bank = get_bank(root, name)
    if bank is None:
        bank = MatrixBank()
        # `add_module` refuses a name that a forwarded attribute of an inner model has (a PeftModel within a PeftModel).
        _unwrapped(root)._modules[name] = bank
    bank.verifier = verifier
    return bank


def drop_bank(root: nn.Module, name: str = PICA_BANK) -> None:
    """Remove the bank of a base model, if there is one."""
    for module in list(root.modules()):
        if isinstance(module._modules.get(name), MatrixBank):
            del module._modules[name]


def find_banks(model: nn.Module) -> list[tuple[str, MatrixBank]]:
    """(name in the state dict, bank) for each bank in `model`, whatever wraps it."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, MatrixBank):
            found.append((".".join(p for p in name.split(".") if p not in HIDDEN_WRAPPERS), module))
    return found
