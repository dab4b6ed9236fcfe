"""SVFT in one layer: y = W x + U T V^T x, from the layer's frozen singular vectors and a sparse T that its group trains."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor

from pica.basis import Factorisation, factorise, full_precision
from pica.basis.alignment import Alignment, align
from pica.basis.apply import add_product, coordinates
from pica.basis.fingerprint import LayerPrint, Mode, take_print
from pica.tuners.base.bank import MatrixBank
from pica.tuners.base.basis_store import Projector
from pica.tuners.base.layer import SharedLayer
from pica.tuners.base.mixed_batch import MixedBatch
from pica.tuners.base.part import Part
from pica.tuners.svft.pattern import (
    affinity,
    band_positions,
    entry_count,
    position_problem,
    random_positions,
    top_positions,
)
from pica.tuners.svft.update import apply_band, apply_diagonal, apply_entries, dense_matrix, is_narrow

# the key of the singular vectors as this base model's weight gave them; adapters that need them turned have their own
SHARED = "w"


@dataclass(frozen=True)
class Entries:
    """Which entries of a group's T (n, n) are trained.

    Attributes:
        n: Width of T.
        pattern: "plain", "banded", "random" or "top_k".
        off_diagonals: Diagonals on each side that decide how many entries there are, at most n - 1.
        seed: Of "random".
    """

    n: int
    pattern: str
    off_diagonals: int = 0
    seed: int = 0

    @property
    def count(self) -> int:
        return entry_count(self.n, self.off_diagonals)

    @property
    def has_positions(self) -> bool:
        """Whether the product with T needs a list of positions."""
        return self.pattern in ("random", "top_k") or (
            self.pattern == "banded" and not is_narrow(self.n, self.off_diagonals)
        )


class SvftMethod(Part):
    """What SVFT does in one layer.

    U (out, n) and V^T (n, in) are kept in the layer's compute dtype and serve every adapter. (V^T x could be had from the
    base layer's output as S^-1 U^T W x, as PiCa has it for its leading directions; but here every direction counts, and
    those with a small singular value would be nothing but amplified rounding.)

    Attributes:
        entries_of: {adapter: which entries of its group's T are trained}.
    """

    name: ClassVar[str] = "SVFT"
    remedy: ClassVar[str] = "merge the adapter there, which gives a plain model (pica merge)"
    layer: SharedLayer

    def __init__(self, layer: SharedLayer) -> None:
        super().__init__(layer)
        self.entries_of: dict[str, Entries] = {}

    @property
    def width(self) -> int:
        """n = min(out, in), the width of T."""
        return min(self.layer.in_features, self.layer.out_features)

    # ---- the update --------------------------------------------------------------------------------------------

    def coordinates(self, x: Tensor, y: Tensor, names: list[str]) -> dict[str, Tensor]:
        """h = V^T x, (..., n): computed once for each basis, however many adapters use it."""
        if x.dtype != y.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(y.dtype)  # base layers that cast their input themselves
        key_of = self.layer.bases.key_of
        of_key: dict[str, Tensor] = {}
        for name in names:
            if key_of[name] not in of_key:
                of_key[key_of[name]] = coordinates(x, self.sides(name)[1])
        return {name: of_key[key_of[name]] for name in names}

    def add(self, y: Tensor, h: Tensor, name: str, *, in_place: bool) -> Tensor:
        """y + U T h."""
        entries, values = self.entries_of[name], self.layer.matrix(name).to(h.device)
        if entries.has_positions:
            z = apply_entries(h, values, self.positions(name).to(h.device))
        elif entries.pattern == "banded":
            z = apply_band(h, values, entries.off_diagonals)
        else:
            z = apply_diagonal(h, values)
        return add_product(y, z, self.sides(name)[0], in_place=in_place)

    def add_mixed(self, x: Tensor, y: Tensor, batch: MixedBatch, *, in_place: bool) -> Tensor:
        """h = V^T x is computed once for the whole batch, the rest adapter by adapter."""
        # neither "__base__" nor an adapter that leaves this layer alone
        rows_of = {name: rows for name, rows in batch.rows.items() if name in self.layer.group_of}
        if not rows_of:
            return y
        h_of = self.coordinates(x, y, list(rows_of))
        out = y.clone()
        for name, rows in rows_of.items():
            index = torch.tensor(rows, device=y.device)
            h = h_of[name].index_select(0, index)
            out.index_copy_(0, index, self.add(y.index_select(0, index), h, name, in_place=False))
        return out

    def positions(self, name: str) -> Tensor:
        """Positions of the trained entries, (count,), int32."""
        entries = self.entries_of[name]
        if entries.pattern in ("plain", "banded") and not entries.has_positions:
            return band_positions(entries.n, entries.off_diagonals)
        slot, group = self.layer.bank.matrices(name), self.layer.group_of[name]
        found = slot.get_buffer(positions_key(group))
        if found.is_meta and not self.layer.frozen.is_deferred():
            scores = None
            if entries.pattern == "top_k":
                members = [m for m in slot.layers.values() if m.group_of.get(name) == group]
                scores = sum(affinity(*cast(SvftMethod, m.method).sides(name)).square() for m in members)
            found = choose_positions(entries, group, scores).to(self.layer.frozen.device_and_dtype()[0])
            setattr(slot, positions_key(group), found)
        return found

    # ---- the factors of the change of W ------------------------------------------------------------------------

    def update(self, name: str) -> Tensor:
        """U T V^T, (out, in)."""
        left, right = self.frames(name)
        assert left is not None
        square = self.core(name).to(right.device)
        dtype = torch.promote_types(right.dtype, square.dtype)
        with full_precision(right.device):
            return left.to(dtype) @ (square.to(dtype) @ right.to(dtype))

    def core(self, name: str) -> Tensor:
        """T itself, (n, n), in at least float32."""
        values = self.layer.matrix(name).detach()
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return dense_matrix(values, self.positions(name).to(values.device), self.width)

    def frames(self, name: str) -> tuple[Tensor | None, Tensor]:
        left, right = self.sides(name)
        dtype = torch.promote_types(right.dtype, torch.float32)
        return left.to(dtype), right.to(dtype)

    def transposed(self, name: str) -> bool:
        return False

    # ---- the directions of an adapter --------------------------------------------------------------------------

    def usable_directions(self, name: str) -> int:
        return len(self._usable_rows(name))

    def _usable_rows(self, name: str) -> Tensor:
        _, right = self.sides(name)
        return right[: self.layer.bases.clear(self.layer.bases.key_of[name])]

    def direction_count(self, name: str) -> int:
        return self.width

    def group_rank(self, name: str) -> int:
        return self.width

    def same_basis(self, name: str, other: str) -> bool:
        return self.layer.bases.key_of[name] == self.layer.bases.key_of[other]

    # ---- verification ------------------------------------------------------------------------------------------

    def take_print(self, name: str, mode: Mode, probes: int) -> LayerPrint:
        """Of V^T alone: W ties each u_i to its v_i, sign included."""
        return take_print(
            self._usable_rows(name),
            self.layer.frozen.read(),
            "in",
            rank=self.width,
            projection="principal",
            solver="svd",
            mode=mode,
            probes=probes,
            origin=self.layer.frozen.quantised_as,
        )

    def align_print(self, name: str, trained: LayerPrint, mode: Mode) -> tuple[Alignment, torch.dtype, str]:
        rows, weight = self._usable_rows(name), self.layer.frozen.read()

        def gains() -> Tensor:
            dtype = torch.promote_types(rows.dtype, torch.float32)
            return (rows[: trained.usable].to(dtype) @ weight.to(dtype).T).norm(dim=1)

        return align(trained, mode, rows, weight, "in", gains), weight.dtype, self.layer.frozen.quantised_as

    def limit(self, name: str, usable: int) -> None:
        left, right = (side.clone() for side in self.sides(name))
        left[:, usable:], right[usable:] = 0.0, 0.0
        self.layer.bases.put_apart(name, Projector(right, "in", "svd", usable, left))

    def turn(self, name: str, rotation: Tensor) -> None:
        """Replace the first rows of V^T by R V^T and the first columns of U by U R^T, so that their products stay."""
        self.sides(name)
        self.layer.bases.turn(name, rotation)

    # ---- the life of a basis -----------------------------------------------------------------------------------

    def attach(self, name: str, entries: Entries, basis: Factorisation | None) -> None:
        """Take adapter `name` in; `basis` is None where the layer has one, or on the meta device."""
        self.entries_of[name] = entries
        self.layer.bases.key_of[name] = SHARED
        self.layer.bases.requests[SHARED] = None  # there is but one way to make it
        if basis is not None:
            self.layer.bases.put(SHARED, as_projector(basis))

    def sides(self, name: str) -> tuple[Tensor, Tensor]:
        """(U, V^T) that adapter `name` uses, solved now if the weight was on the meta device when it was added."""
        bases, key = self.layer.bases, self.layer.bases.key_of[name]
        if not bases.has(key):
            bases.put(key, as_projector(factorise(self.layer.frozen.read(), name=self.layer.path)))
        return bases.left(key), cast(Tensor, bases.rows(key))

    def forget_bases(self) -> None:
        bases = self.layer.bases
        bases.forget(list(bases.requests))
        bases.key_of.update(dict.fromkeys(bases.key_of, SHARED))
        bases.drop_unused()

    def solve_again(self) -> None:
        if self.layer.bases.forgotten:
            for name in self.layer.bases.key_of:
                self.sides(name)
            self.layer.bases.forgotten = False

    def forget_choices(self, name: str) -> None:
        if self.entries_of[name].pattern == "top_k":
            slot, key = self.layer.bank.matrices(name), positions_key(self.layer.group_of[name])
            setattr(slot, key, torch.empty_like(slot.get_buffer(key), device="meta"))

    def delete(self, name: str) -> None:
        """Also free the singular vectors that it alone used; those of the weight itself stay, since they are dear."""
        self.entries_of.pop(name, None)
        self.layer.bases.key_of.pop(name, None)
        self.layer.bases.drop_unused(keep=(SHARED,))

    def describe(self) -> str:
        return f"svft={ {name: self.entries_of[name].pattern for name in sorted(self.entries_of)} }"


class SvftLinear(SharedLayer):
    """A frozen layer with SVFT adapters."""

    method: SvftMethod  # pyright: ignore[reportIncompatibleVariableOverride] - made by method_class
    method_class = SvftMethod
    basis_buffers = ("svft_basis_right_", "svft_basis_left_")
    adapter_layer_names = ("svft_T",)

    @property
    def svft_T(self) -> MatrixBank:
        return self.bank


def as_projector(basis: Factorisation) -> Projector:
    """V^T as rows, U beside them."""
    return Projector(basis.right.contiguous(), "in", "svd", basis.usable, basis.left.contiguous())


def positions_key(group: str) -> str:
    """Name of a group's positions beside its entries in the bank and in a file."""
    return f"positions:{group}"


def choose_positions(entries: Entries, group: str, scores: Tensor | int | None) -> Tensor:
    """Positions of a group's entries, (count,), int32; `scores` (n, n) are those of "top_k"."""
    if entries.pattern == "top_k":
        assert isinstance(scores, Tensor)
        return top_positions(scores, entries.count)
    if entries.pattern == "random":
        return random_positions(entries.n, entries.count, entries.seed, group)
    return band_positions(entries.n, entries.off_diagonals)


def add_positions(layer: SvftLinear, adapter_name: str, positions: Tensor | None) -> None:
    """Put a group's positions into the bank unless they are there; None on the meta device, to be chosen later."""
    entries, slot = layer.method.entries_of[adapter_name], layer.bank.matrices(adapter_name)
    if entries.has_positions:
        if positions is None:
            positions = torch.empty(entries.count, dtype=torch.int32, device="meta")
        slot.add_buffer(
            positions_key(layer.group_of[adapter_name]),
            positions,
            persistent=entries.pattern == "top_k",
            check=partial(position_problem, n=entries.n),
        )
