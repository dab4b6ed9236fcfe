"""`SvftLinear`: one adapted layer. It owns its frozen singular vectors and refers to the trained entries in the bank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from pica.basis import Factorisation, factorise, full_precision
from pica.basis.apply import add_product, coordinates
from pica.basis.fingerprint import Alignment, LayerPrint, Mode, align, take_print
from pica.tuners.base.bank import PicaBank
from pica.tuners.base.layer import AdaptedLinear, lasting
from pica.tuners.base.mixed_batch import MixedBatch
from pica.tuners.svft.pattern import (
    affinity,
    band_positions,
    entry_count,
    position_problem,
    random_positions,
    top_positions,
)
from pica.tuners.svft.update import apply_band, apply_diagonal, apply_entries, dense_matrix, is_narrow

SHARED = (
    "w"  # the singular vectors as this base model's weight gave them; adapters that need them turned have their own
)


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


class SvftLinear(AdaptedLinear):
    """A frozen linear layer (or Conv1D) y = W x + b with SVFT updates: y + U T V^T x for each active adapter.

    U (out, n) and V^T (n, in) are kept in the layer's compute dtype and serve every adapter. (V^T x could be had from the
    base layer's output as S^-1 U^T W x, as PiCa has it for its leading directions; but here every direction counts, and
    those with a small singular value would be nothing but amplified rounding.)
    """

    method: ClassVar[str] = "SVFT"
    mismatch_remedy: ClassVar[str] = "merge the adapter there, which gives a plain model (pica merge)"
    adapter_layer_names = ("svft_T",)
    # plain dicts keyed by adapter name: PEFT's delete_adapter and name listing look into them
    other_param_names = ("pica_group", "svft_entries", "svft_basis")

    def __init__(self, base_layer: nn.Module, bank: PicaBank, name: str, root: nn.Module | None = None) -> None:
        super().__init__(base_layer, bank, name, root)
        self.svft_entries: dict[str, Entries] = {}
        self.svft_basis: dict[str, str] = {}
        self._usable: dict[str, int] = {}  # of each basis, the directions with a singular value above rounding

    @property
    def svft_T(self) -> PicaBank:
        return self.bank

    @property
    def width(self) -> int:
        """n = min(out, in), the width of T."""
        return min(self.in_features, self.out_features)

    # ---- adapters ----------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, *, group: str, entries: Entries, basis: Factorisation | None) -> None:
        """Attach adapter `name`; `basis` is None where the layer has one, or on the meta device."""
        self.pica_group[name] = group
        self.svft_entries[name] = entries
        self.svft_basis[name] = SHARED
        self.bank.matrices(name).layers[self.pica_name] = self
        if basis is not None:
            self.install_basis(SHARED, basis)

    def has_basis(self, key: str = SHARED) -> bool:
        right = getattr(self, f"svft_basis_right_{key}", None)
        return right is not None and not right.is_meta

    def install_basis(self, key: str, basis: Factorisation) -> None:
        """Keep singular vectors under `key`, in the layer's compute dtype on its device; no state dict holds them."""
        device, dtype = self.frozen.device_and_dtype()
        for side, tensor in (("left", basis.left), ("right", basis.right)):
            kept = lasting(tensor.to(device=device, dtype=dtype).contiguous())
            self.register_buffer(f"svft_basis_{side}_{key}", kept, persistent=False)
        self._usable[key] = basis.usable
        self.frozen.note()

    def forget_bases(self) -> None:
        for key in list(self._usable):
            for side in ("left", "right"):
                delattr(self, f"svft_basis_{side}_{key}")
        self._bases_forgotten = bool(self._usable)
        self._usable.clear()
        self.svft_basis = dict.fromkeys(self.svft_basis, SHARED)

    def solve_again(self) -> None:
        if self._bases_forgotten:
            for name in self.svft_basis:
                self.sides(name)
            self._bases_forgotten = False

    def forget_choices(self, adapter_name: str) -> None:
        if self.svft_entries[adapter_name].pattern == "top_k":
            slot, key = self.bank.matrices(adapter_name), positions_key(self.pica_group[adapter_name])
            setattr(slot, key, torch.empty_like(slot.get_buffer(key), device="meta"))

    def sides(self, name: str) -> tuple[Tensor, Tensor]:
        """(U, V^T) that adapter `name` uses, solved now if the weight was on the meta device when it was added."""
        key = self.svft_basis[name]
        if not self.has_basis(key):
            self.install_basis(key, factorise(self.frozen.read(), name=self.pica_name))
        left, right = getattr(self, f"svft_basis_left_{key}"), getattr(self, f"svft_basis_right_{key}")
        return cast(Tensor, left), cast(Tensor, right)

    def turn_basis(self, name: str, rotation: Tensor) -> None:
        """Replace the first rows of V^T by R V^T and the first columns of U by U R^T, so that their products stay."""
        left, right = self.sides(name)
        key = self.svft_basis[name]
        wide = torch.promote_types(right.dtype, torch.float32)
        new_left, new_right = left.to(wide, copy=True), right.to(wide, copy=True)
        count = rotation.shape[0]
        with full_precision(right.device):
            r = rotation.to(new_right)
            new_right[:count] = r @ new_right[:count]
            new_left[:, :count] = new_left[:, :count] @ r.T
        usable = self._usable[key]
        if any(used == key for other, used in self.svft_basis.items() if other != name):
            self.svft_basis[name] = key = self._unused_key()
        self.install_basis(key, Factorisation(new_left, new_right[:, 0], new_right, usable))

    def _unused_key(self) -> str:
        return next(f"own{i}" for i in range(10_000) if f"own{i}" not in self._usable)

    def limit_basis(self, name: str, usable: int) -> None:
        left, right = (side.clone() for side in self.sides(name))
        left[:, usable:], right[usable:] = 0.0, 0.0
        self.svft_basis[name] = key = self._unused_key()
        self.install_basis(key, Factorisation(left, right[:, 0], right, usable))

    # ---- meaning -----------------------------------------------------------------------------------------------

    def usable_directions(self, adapter_name: str) -> int:
        return len(self._usable_rows(adapter_name))

    def direction_count(self, adapter_name: str) -> int:
        return self.width

    def group_rank(self, adapter_name: str) -> int:
        return self.width

    def same_basis(self, adapter_name: str, other_name: str) -> bool:
        return self.svft_basis[adapter_name] == self.svft_basis[other_name]

    def take_print(self, adapter_name: str, mode: Mode, probes: int) -> LayerPrint:
        """Of V^T alone: W ties each u_i to its v_i, sign included."""
        return take_print(
            self._usable_rows(adapter_name),
            self.frozen.read(),
            "in",
            rank=self.width,
            projection="principal",
            solver="svd",
            mode=mode,
            probes=probes,
            origin=self.frozen.quantised_as,
        )

    def align_print(self, adapter_name: str, trained: LayerPrint, mode: Mode) -> Alignment:
        rows, weight = self._usable_rows(adapter_name), self.frozen.read()

        def gains() -> Tensor:
            dtype = torch.promote_types(rows.dtype, torch.float32)
            return (rows[: trained.usable].to(dtype) @ weight.to(dtype).T).norm(dim=1)

        return align(trained, mode, rows, weight, "in", gains)

    def _usable_rows(self, adapter_name: str) -> Tensor:
        _, right = self.sides(adapter_name)
        return right[: self._usable[self.svft_basis[adapter_name]]]

    # ---- the update --------------------------------------------------------------------------------------------

    def positions(self, adapter_name: str) -> Tensor:
        """Positions of the trained entries, (count,), int32."""
        entries = self.svft_entries[adapter_name]
        if entries.pattern in ("plain", "banded") and not entries.has_positions:
            return band_positions(entries.n, entries.off_diagonals)
        slot, group = self.bank.matrices(adapter_name), self.pica_group[adapter_name]
        found = slot.get_buffer(positions_key(group))
        if found.is_meta and not self.frozen.is_deferred():
            scores = None
            if entries.pattern == "top_k":
                members = [m for m in slot.layers.values() if m.pica_group.get(adapter_name) == group]
                scores = sum(affinity(*cast(SvftLinear, m).sides(adapter_name)).square() for m in members)
            found = choose_positions(entries, group, scores).to(self.frozen.device_and_dtype()[0])
            setattr(slot, positions_key(group), found)
        return found

    def coordinates_of(self, x: Tensor, y: Tensor, names: list[str]) -> dict[str, Tensor]:
        """h = V^T x, (..., n): computed once for each basis, however many adapters use it."""
        if x.dtype != y.dtype and not torch.is_autocast_enabled(x.device.type):
            x = x.to(y.dtype)  # base layers that cast their input themselves
        of_basis: dict[str, Tensor] = {}
        for name in names:
            if self.svft_basis[name] not in of_basis:
                of_basis[self.svft_basis[name]] = coordinates(x, self.sides(name)[1])
        return {name: of_basis[self.svft_basis[name]] for name in names}

    def add_update(self, y: Tensor, h: Tensor, name: str, *, in_place: bool) -> Tensor:
        entries, values = self.svft_entries[name], self.matrix(name).to(h.device)
        if entries.has_positions:
            z = apply_entries(h, values, self.positions(name).to(h.device))
        elif entries.pattern == "banded":
            z = apply_band(h, values, entries.off_diagonals)
        else:
            z = apply_diagonal(h, values)
        return add_product(y, z, self.sides(name)[0], in_place=in_place)

    def add_mixed(self, x: Tensor, y: Tensor, batch: MixedBatch) -> Tensor:
        """h = V^T x is computed once for the whole batch, the rest adapter by adapter."""
        rows_of: dict[str, list[int]] = {}
        for row, name in enumerate(batch):
            if name in self.pica_group:  # neither "__base__" nor an adapter that leaves this layer alone
                rows_of.setdefault(name, []).append(row)
        if not rows_of:
            return y
        h_of = self.coordinates_of(x, y, list(rows_of))
        out = y.clone()
        for name, rows in rows_of.items():
            index = torch.tensor(rows, device=y.device)
            h = h_of[name].index_select(0, index)
            out.index_copy_(0, index, self.add_update(y.index_select(0, index), h, name, in_place=False))
        return out

    def core(self, adapter_name: str) -> Tensor:
        """T itself, (n, n), in at least float32."""
        values = self.matrix(adapter_name).detach()
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return dense_matrix(values, self.positions(adapter_name).to(values.device), self.width)

    def frames(self, adapter_name: str) -> tuple[Tensor | None, Tensor]:
        left, right = self.sides(adapter_name)
        dtype = torch.promote_types(right.dtype, torch.float32)
        return left.to(dtype), right.to(dtype)

    def weight_update(self, adapter_name: str) -> Tensor:
        left, right = self.frames(adapter_name)
        assert left is not None
        square = self.core(adapter_name).to(right.device)
        dtype = torch.promote_types(right.dtype, square.dtype)
        with full_precision(right.device):
            return left.to(dtype) @ (square.to(dtype) @ right.to(dtype))

    # ---- PEFT's housekeeping -----------------------------------------------------------------------------------

    def move_basis(self, adapter_name: str, device: torch.device, dtype: torch.dtype) -> None:
        key = self.svft_basis[adapter_name]
        if self.has_basis(key):
            for side in ("left", "right"):
                name = f"svft_basis_{side}_{key}"
                setattr(self, name, lasting(getattr(self, name).to(device=device, dtype=dtype)))

    def delete_adapter(self, adapter_name: str) -> None:
        """Also free the singular vectors that it alone used; those of the weight itself stay, since they are dear."""
        super().delete_adapter(adapter_name)
        for key in [key for key in self._usable if key != SHARED and key not in self.svft_basis.values()]:
            del self._usable[key]
            for side in ("left", "right"):
                delattr(self, f"svft_basis_{side}_{key}")

    def extra_repr(self) -> str:
        return f"svft={ {name: self.svft_entries[name].pattern for name in sorted(self.svft_entries)} }"


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
    entries, slot = layer.svft_entries[adapter_name], layer.bank.matrices(adapter_name)
    if entries.has_positions:
        if positions is None:
            positions = torch.empty(entries.count, dtype=torch.int32, device="meta")
        slot.add_buffer(
            positions_key(layer.pica_group[adapter_name]),
            positions,
            persistent=entries.pattern == "top_k",
            check=partial(position_problem, n=entries.n),
        )
