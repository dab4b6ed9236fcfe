"""What a method has to say of one layer; PiCa and SVFT are two of them."""

from __future__ import annotations

from typing import ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from pica.basis.alignment import Alignment
from pica.basis.fingerprint import LayerPrint, Mode
from pica.tuners.base.mixed_batch import MixedBatch


class Method(Protocol):
    """How the adapters of one layer change its output: y += update(x), from frozen bases and trained matrices.

    The layer (`pica.tuners.base.layer.SharedLayer`) decides when, the layer's store which projectors there are, the bank
    holds what is trained.
    """

    name: ClassVar[str]
    """The method's, for messages."""
    remedy: ClassVar[str]
    """One more way out of a basis mismatch."""

    # ---- the update

    def coordinates(self, x: Tensor, y: Tensor, names: list[str]) -> dict[str, Tensor]:
        """What the frozen basis sees of each token, (..., k), for each adapter; `y` is W x (+ bias), still unchanged."""
        ...

    def add(self, y: Tensor, h: Tensor, name: str, *, in_place: bool) -> Tensor:
        """y plus the adapter's update at coordinates `h`."""
        ...

    def add_mixed(self, x: Tensor, y: Tensor, batch: MixedBatch, *, in_place: bool) -> Tensor:
        """y plus each sample's own update."""
        ...

    # ---- the factors of the change of W

    def update(self, name: str) -> Tensor:
        """What the adapter adds to W, (out, in), float32 or float64."""
        ...

    def core(self, name: str) -> Tensor:
        """C of the update L C R: the trained matrix, cut to what this layer uses. L and R are orthonormal."""
        ...

    def frames(self, name: str) -> tuple[Tensor | None, Tensor]:
        """(L, R) of the update L C R, (out, k) and (k, in), in at least float32; None where L is the identity."""
        ...

    def transposed(self, name: str) -> bool:
        """Whether `core` and `frames` are those of the update's transpose, as the trained matrix is on the input's side."""
        ...

    # ---- the directions of an adapter

    def direction_count(self, name: str) -> int:
        """Directions that the adapter asks of this layer, whether or not the weight has them."""
        ...

    def usable_directions(self, name: str) -> int:
        """Directions that the adapter has here: what it asks of this layer, or fewer where the weight has no more."""
        ...

    def group_rank(self, name: str) -> int:
        """Directions of the adapter's group: the largest `direction_count` of its layers."""
        ...

    def same_basis(self, name: str, other: str) -> bool:
        """Whether two adapters of this layer use the very same frozen basis."""
        ...

    # ---- verification

    def take_print(self, name: str, mode: Mode, probes: int) -> LayerPrint:
        """Fingerprint of the basis that the adapter uses here."""
        ...

    def align_print(self, name: str, trained: LayerPrint, mode: Mode) -> tuple[Alignment, torch.dtype, str]:
        """Hold that basis against the one that `trained` was taken of; changes nothing.

        Returns:
            How it lies to that one; and of which weights it is: their dtype, and one of `pica.basis.fingerprint.ORIGINS`.
        """
        ...

    def limit(self, name: str, usable: int) -> None:
        """Leave the adapter its first `usable` directions only, in this layer."""
        ...

    def turn(self, name: str, rotation: Tensor) -> None:
        """Rotate the adapter's first directions by `rotation` (k, k), orthogonal."""
        ...

    # ---- the life of a basis

    def forget_bases(self) -> None:
        """Drop the bases that were made from the layer's own weight; they are made again when they are needed."""
        ...

    def solve_again(self) -> None:
        """Make the bases again that were dropped, if any were."""
        ...

    def forget_choices(self, name: str) -> None:
        """Drop what else of an adapter was chosen by the weight."""
        ...

    def delete(self, name: str) -> None:
        """Forget an adapter, and what it alone used."""
        ...

    def describe(self) -> str:
        """The adapters, for a module's repr."""
        ...

    def of(self, replica: object) -> Self:
        """The same for a shallow copy of the layer."""
        ...


@runtime_checkable
class StoresBasis(Protocol):
    """A method whose adapters' files may hold the basis itself."""

    def stored_basis(self, name: str) -> Tensor:
        """What an adapter's file holds of its basis here."""
        ...

    def stored_basis_problem(self, name: str, stored: Tensor) -> str | None:
        """What is wrong with a basis from a file, or None."""
        ...

    def use_stored_basis(self, name: str, stored: Tensor) -> None:
        """Use a basis from a file; the one until now is kept until the layer's store drops what is unused."""
        ...
