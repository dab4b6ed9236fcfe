"""The matrices of many adapters side by side, in the dtype that layers compute in, kept from call to call.

A stack takes the memory of those matrices once more in that dtype (over a bfloat16 base half of what they take in
float32), and up to a quarter of that as room for adapters to come. It holds the adapters that mixed batches have used
lately, and nothing from when the model is set to train.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

IDLE_CALLS = 1024
"""Calls with mixed batches after which an adapter that none of them used may lose its place."""


@dataclass
class _Held:
    """One adapter in a stack.

    Attributes:
        place: Where it is.
        last_call: Number of the last call that used it.
        copied: The matrix that was copied there, detached: its memory cannot become that of another matrix meanwhile.
        version: Of that matrix then; None where it may have been written to since without a new version.
    """

    place: int
    last_call: int
    copied: Tensor | None = None
    version: int | None = None

    def is_current(self, matrix: Tensor) -> bool:
        """Whether `matrix` is what was copied, and unchanged as far as versions tell."""
        if matrix.requires_grad or matrix.is_inference() or self.copied is None:
            return False
        return self.version == matrix._version and self.copied.is_set_to(matrix)


class Placed(NamedTuple):
    """Where the matrices of some adapters are.

    Attributes:
        rows: (places, rank, out): M^T of one adapter each, zero beyond its own rank.
        places: {adapter: its place}.
    """

    rows: Tensor
    places: dict[str, int]


class MatrixStack:
    """M^T of the adapters of one group.

    A place is never given to another adapter: where there is no room left, a new tensor takes over those that are still
    used. So what was handed out stays right for whoever holds it.

    Attributes:
        rows: (places, rank, out), as in `Placed`.
    """

    def __init__(self, like: Tensor) -> None:
        """Empty, for outputs (..., out) like this one."""
        self.rows = _zeros(like, 0, 0, like.shape[-1])
        self._held: dict[str, _Held] = {}
        self._taken = 0

    def __len__(self) -> int:
        return len(self._held)

    def placed(self, matrices: Mapping[str, Tensor], call: int) -> Placed:
        """Hold these matrices {adapter: M (out, rank)} as they are now; `call` is the number of this call."""
        self._update(matrices, call)
        return Placed(self.rows, {name: self._held[name].place for name in matrices})

    def _update(self, matrices: Mapping[str, Tensor], call: int) -> None:
        changed: dict[str, Tensor] = {}
        counted = _versions_count()
        for name, matrix in matrices.items():
            held = self._held.get(name)
            if held is not None:
                held.last_call = call
            if held is None or not (counted and held.is_current(matrix)):
                changed[name] = matrix
        if not changed:
            return
        rank = max(matrix.shape[1] for matrix in changed.values())
        fresh = [name for name, matrix in changed.items() if not self._has_room_for(name, matrix)]
        if rank > self.rows.shape[1] or self._taken + len(fresh) > len(self.rows):
            self._move(self._used_lately(call), len(fresh), rank)
        for name in fresh:
            self._held[name] = _Held(self._taken, call)
            self._taken += 1
        for name, matrix in changed.items():
            held = self._held[name]
            self.rows[held.place, : matrix.shape[1]].copy_(matrix.detach().T)
            held.copied = matrix.detach()
            held.version = None if matrix.requires_grad or matrix.is_inference() or not counted else matrix._version

    def _has_room_for(self, name: str, matrix: Tensor) -> bool:
        """Whether the adapter has a place already, and a matrix of this shape is what it holds."""
        held = self._held.get(name)
        return held is not None and held.copied is not None and held.copied.shape == matrix.shape

    def forget(self, name: str) -> None:
        """An adapter is gone."""
        if self._held.pop(name, None) is not None:
            self._shrink(self._held)

    def forget_idle(self, call: int) -> None:
        """No call has used some of the adapters for long, perhaps."""
        self._shrink(self._used_lately(call))

    def _used_lately(self, call: int) -> list[str]:
        return [name for name, held in self._held.items() if held.last_call > call - IDLE_CALLS]

    def _shrink(self, names: Collection[str]) -> None:
        """Keep these adapters only, if that gives back half of the memory."""
        if 2 * len(names) < len(self.rows):
            self._move(names, 0, self.rows.shape[1])

    def _move(self, names: Collection[str], more: int, rank: int) -> None:
        """Into a new tensor with these adapters, and room for `more`."""
        before, old_rank = self.rows, self.rows.shape[1]
        places = torch.tensor([self._held[name].place for name in names], dtype=torch.long, device=before.device)
        spare = len(names) // 4 if more else 0
        self.rows = _zeros(before, len(names) + more + spare, max(rank, old_rank), before.shape[2])
        self.rows[: len(names), :old_rank] = before.index_select(0, places)
        self._held = {name: self._held[name] for name in names}
        for place, held in enumerate(self._held.values()):
            held.place = place
        self._taken = len(names)


class MatrixStacks(dict[tuple, MatrixStack]):
    """The stacks of a bank, by group, width and device. A copy of the bank, or a saved one, begins with none."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def begin_call(self) -> None:
        """A call with a mixed batch begins."""
        if torch.compiler.is_compiling():  # whose graphs use no stack, and would be made anew for each number
            return
        self.calls += 1
        if self.calls % IDLE_CALLS == 0:
            for stack in self.values():
                stack.forget_idle(self.calls)
            self._drop_empty()

    def placed(self, group: str, matrices: Mapping[str, Tensor], like: Tensor) -> Placed:
        """Hold matrices of a group as they are now.

        Args:
            group: Key of the matrices in the bank.
            matrices: {adapter: M (out, rank)}.
            like: Output (..., out) of a layer that uses them; its dtype and device are the stack's.
        Returns:
            Where they are.
        """
        key = (group, like.shape[-1], like.device)
        stack = self.get(key)
        if stack is None or stack.rows.dtype != like.dtype:
            self[key] = stack = MatrixStack(like)
        return stack.placed(matrices, self.calls)

    def forget(self, name: str) -> None:
        """An adapter is gone."""
        for stack in self.values():
            stack.forget(name)
        self._drop_empty()

    def _drop_empty(self) -> None:
        for key in [key for key, stack in self.items() if not len(stack)]:
            del self[key]

    @property
    def nbytes(self) -> int:
        return sum(stack.rows.nbytes for stack in self.values())

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return MatrixStacks, ()


def _versions_count() -> bool:
    """Whether nothing writes to matrices that are not trained without giving them a new version."""
    # FSDP fills what it has lent again, and keeps the version
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def _zeros(like: Tensor, *shape: int) -> Tensor:
    with torch.inference_mode(False):  # a later call may write to it outside of that mode
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
