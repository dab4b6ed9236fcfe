"""Tensors that a forward pass makes out of others, and that its backward pass makes again instead of keeping them.

For a module that runs on W + M P in the place of its weights: autograd would keep that sum until the backward pass, one of
every block, although W, M and P exist all the time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _autograd

from pica.tuners.base.sharding import is_dtensor

Packing = Callable[[Tensor], Any]
Unpacking = Callable[[Any], Tensor]
_PLAIN = (Tensor, nn.Parameter)


class Recomputed:
    """How one tensor is made.

    What is made a second time has the bits of the first: the same operations run, in one piece, on the same numbers.

    Args:
        make: Makes the tensor; of the sources alone, so not of anything that a context like autocast changes.
        sources: What it is made of.
        name: For messages.
    """

    def __init__(self, make: Callable[[], Tensor], sources: Iterable[Tensor], name: str) -> None:
        self._make, self._name = make, name
        self._versions = [(source, _version(source)) for source in sources]
        self._again: Tensor | None = None

    def again(self) -> Tensor:
        """Make the tensor again, once for all views of it that one backward pass asks for.

        Returns:
            The tensor.
        Raises:
            RuntimeError: A source was written to since.
        """
        if self._again is None:
            if any(_version(source) != before for source, before in self._versions):
                raise RuntimeError(
                    f"The adapter or the weights of {self._name} were modified in place between the forward pass and its "
                    "backward pass; call backward before the optimizer's step, or before merging."
                )
            with torch.no_grad():
                self._again = self._make()
        return self._again

    def forget(self) -> None:
        """Free what was made for the backward pass."""
        self._again = None


@dataclass(frozen=True, slots=True)
class _View:
    """What is kept for backward of a recomputed tensor, or of a view of it."""

    origin: Recomputed
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def tensor(self) -> Tensor:
        return self.origin.again().as_strided(self.size, self.stride, self.offset)


def can_be_recomputed(sources: Iterable[Tensor]) -> bool:
    """Whether `kept_as_recipes` applies here, to tensors made of these."""
    # Not without autograd, while compiling (the compiler decides itself what to make again), within torch.func, and for
    # sources that a framework takes apart outside of autograd's sight (DeepSpeed ZeRO-3, tensors over a mesh of devices).
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if not hasattr(_autograd, "_top_saved_tensors_default_hooks"):  # torch 2.6 and 2.7
        return False
    if not _autograd._saved_tensors_hooks_is_enabled():  # pyright: ignore[reportAttributeAccessIssue]
        return False
    return not any(hasattr(s, "ds_id") or (type(s) not in _PLAIN and is_dtensor(s)) for s in sources)


@contextmanager
def kept_as_recipes(made: Sequence[tuple[Recomputed, Tensor]]) -> Iterator[None]:
    """A forward pass in which of these tensors, and of views of them, only the way to make them again is kept.

    Everything else is kept as it would be without: by hooks that are active outside of this (gradient checkpointing,
    offloading), else by autograd. When the gradient of a recomputed tensor is known, nothing needs the tensor any more.
    """
    outer: tuple[Packing, Unpacking] | None = _autograd._top_saved_tensors_default_hooks(False)
    outer_pack, outer_unpack = outer or (_detached, _itself)
    origins = {tensor.untyped_storage()._cdata: (origin, tensor.dtype) for origin, tensor in made}
    for origin, tensor in made:
        if tensor.requires_grad:
            tensor.register_hook(_Forget(origin))

    def pack(tensor: Tensor) -> Any:
        if tensor.layout is torch.strided:
            origin, dtype = origins.get(tensor.untyped_storage()._cdata, (None, None))
            if origin is not None and tensor.dtype == dtype:
                return _View(origin, tensor.size(), tensor.stride(), tensor.storage_offset())
        return outer_pack(tensor)

    def unpack(packed: Any) -> Tensor:
        return packed.tensor() if isinstance(packed, _View) else outer_unpack(packed)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        origins.clear()  # autograd holds on to `pack`: a recipe is to go with the last view that needs it


class _Forget:
    """A gradient's hook; holds the recipe weakly, so that the copy is freed with what was kept for backward."""

    def __init__(self, origin: Recomputed) -> None:
        self._origin = weakref.ref(origin)

    def __call__(self, gradient: Tensor) -> None:
        origin = self._origin()
        if origin is not None:
            origin.forget()


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach()  # itself would be a cycle where an operation keeps its own output


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
