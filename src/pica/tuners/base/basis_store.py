"""The frozen bases of one layer: each solved once, shared by adapters, kept as buffers of the layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from pica.basis import Basis, Side, full_precision
from pica.tuners.base.layouts import Observed
from pica.tuners.base.part import Part


@dataclass(frozen=True)
class Projector:
    """Frozen directions P of a layer, in the form in which it uses them.

    Attributes:
        rows: (k, in) on side "in": P itself, orthonormal. (k, out) on side "out": what makes P x of W x.
        side: Which of the two they read, the layer's input x or its bias-free output W x.
        solver: How they came about, one of `pica.basis.fingerprint.SOLVERS`.
        clear: How many of the rows, the first ones, a new adapter uses; of the others rounding has left no more than noise.
        left: (out, k): the left singular vectors that belong to the rows, for a method that uses both.
    """

    rows: Tensor
    side: Side
    solver: str
    clear: int
    left: Tensor | None = None

    @classmethod
    def of(cls, basis: Basis) -> Projector:
        return cls(basis.projector, basis.side, basis.solver, basis.clear_rank)

    def directions(self, weight: Tensor) -> Tensor:
        """P itself, (k, in), in at least float32, of a projector that was made from `weight` (out, in)."""
        dtype = torch.promote_types(self.rows.dtype, torch.float32)
        if self.side == "in":
            return self.rows.to(dtype)
        with full_precision(weight.device):
            return self.rows.to(dtype) @ weight.to(dtype)


class BasisStore(Part):
    """The projectors of one layer, by key; adapters with the same key share one.

    Their tensors are buffers of the layer, in its compute dtype on its device, so that whatever moves the layer moves
    them. They follow from the base weights, so no state dict holds them.

    Attributes:
        key_of: {adapter: key of its projector}.
        requests: {key: what was asked for}, from which a method makes a projector that is not there (any more).
        forgotten: Whether `forget` dropped some that nobody has asked for since.
    """

    def __init__(self, layer: Any, rows: str, left: str = "") -> None:
        """Of `layer`, whose buffers are to be called `rows` + key and `left` + key."""
        super().__init__(layer)
        self._rows, self._left = rows, left
        self._made: dict[str, tuple[Side, str, int]] = Observed.by(self._basis_changed)  # side, solver, clear
        self.forgotten = False
        self.key_of: dict[str, str] = Observed.by(layer.place_changed)
        self.requests: dict[str, Any] = {}

    def _basis_changed(self, _: str) -> None:
        self.layer.bank.layouts.clear()  # of all adapters that use it

    # ---- reading -----------------------------------------------------------------------------------------------

    def rows(self, key: str) -> Tensor | None:
        return getattr(self.layer, _buffer(self._rows, key), None)

    def left(self, key: str) -> Tensor:
        return cast(Tensor, getattr(self.layer, _buffer(self._left, key)))

    def has(self, key: str) -> bool:
        """Whether the projector is there, and not only room for it on the meta device."""
        rows = self.rows(key)
        return rows is not None and not rows.is_meta

    def side(self, key: str) -> Side:
        return self._made[key][0]

    def solver(self, key: str) -> str:
        return self._made[key][1]

    def clear(self, key: str) -> int:
        return self._made[key][2]

    def get(self, key: str) -> Projector:
        rows = self.rows(key)
        assert rows is not None
        return Projector(rows, *self._made[key], self.left(key) if self._left else None)

    # ---- sharing -----------------------------------------------------------------------------------------------

    def put(self, key: str, projector: Projector) -> None:
        """Make `projector` the one of all adapters with this key."""
        self.layer.register_buffer(_buffer(self._rows, key), self.placed(projector.rows), persistent=False)
        if projector.left is not None:
            self.layer.register_buffer(_buffer(self._left, key), self.placed(projector.left), persistent=False)
        self._made[key] = (projector.side, projector.solver, projector.clear)
        self.layer.frozen.note()

    def placed(self, tensor: Tensor) -> Tensor:
        """`tensor` where and in the dtype that the layer computes in."""
        device, dtype = self.layer.frozen.device_and_dtype()
        if device.type == "meta" and not tensor.is_meta:
            device = torch.device("cpu")  # another process solved it, and this one is still to receive its weights
        return _lasting(tensor.to(device=device, dtype=dtype))

    def fresh_key(self, stem: str) -> str:
        """A key that begins like `stem` and is not in use."""
        return next(f"{stem}_{i}" for i in range(2, 10_000) if f"{stem}_{i}" not in self.requests)

    def put_apart(self, name: str, projector: Projector, stem: str | None = None) -> None:
        """Give adapter `name` a projector under a key of its own; `stem` is what the key begins with."""
        before = self.key_of[name]
        self.key_of[name] = fresh = self.fresh_key(stem or before)
        self.requests[fresh] = self.requests[before]
        self.put(fresh, projector)

    def put_for(self, name: str, projector: Projector) -> None:
        """Give adapter `name` this projector; others that used the same one before keep theirs."""
        key = self.key_of[name]
        if any(used == key for other, used in self.key_of.items() if other != name):
            self.put_apart(name, projector)
        else:
            self.put(key, projector)

    def turn(self, name: str, rotation: Tensor) -> None:
        """Replace the first rows P of adapter `name` by R P, and left vectors U by U R^T; R (k, k) is orthogonal."""
        old = self.get(self.key_of[name])
        count, wide = rotation.shape[0], torch.promote_types(old.rows.dtype, torch.float32)
        rows = old.rows.to(wide, copy=True)
        left = None if old.left is None else old.left.to(wide, copy=True)
        with full_precision(rows.device):
            r = rotation.to(rows)
            rows[:count] = r @ rows[:count]
            if left is not None:
                left[:, :count] = left[:, :count] @ r.T
        self.put_for(name, Projector(rows, old.side, old.solver, old.clear, left))

    # ---- moving and dropping -----------------------------------------------------------------------------------

    def move(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        """Move what adapter `name` uses."""
        key = self.key_of[name]
        if self.has(key):
            for buffer in self._buffers_of(key):
                setattr(self.layer, buffer, _lasting(getattr(self.layer, buffer).to(device=device, dtype=dtype)))

    def forget(self, keys: Iterable[str]) -> None:
        """Drop these projectors, as the weight that they were made from is another one; `requests` stay."""
        for key in [key for key in keys if key in self._made]:
            self._drop(key)
            self.forgotten = True

    def drop_unused(self, keep: Iterable[str] = ()) -> None:
        """Free what no adapter uses any more."""
        used = {*keep, *self.key_of.values()}
        for key in [key for key in self.requests if key not in used]:
            del self.requests[key]
            self._drop(key)

    def _drop(self, key: str) -> None:
        self._made.pop(key, None)
        if self.rows(key) is not None:
            for buffer in self._buffers_of(key):
                delattr(self.layer, buffer)

    def _buffers_of(self, key: str) -> list[str]:
        return [_buffer(prefix, key) for prefix in (self._rows, self._left) if prefix]


def _buffer(prefix: str, key: str) -> str:
    return f"{prefix}{key}".replace("-", "m")


def _lasting(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy where inference mode made it one that autograd must not keep: what is solved in there stays."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
