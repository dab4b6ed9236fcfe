"""A batch in which each sample has its own adapter: what its layers share for the length of one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from pica.basis.apply import add_product

# On a CPU one product a sample costs little beside its arithmetic, unless samples are short and adapters are many.
BATCHED_TOKENS = 16
BATCHED_ADAPTERS = 4


class MixingLayer(Protocol):
    """A layer as a mixed batch sees it."""

    path: str
    group_of: dict[str, str]

    def matrix(self, adapter_name: str) -> Tensor: ...


class MixingMethod(Protocol):
    """A layer's method as a mixed batch sees it: y += M h, with h (..., rank) of one basis."""

    @property
    def layer(self) -> MixingLayer: ...
    def key_of(self, name: str) -> str: ...
    def usable_rank(self, name: str) -> int: ...


@dataclass(frozen=True)
class BatchPart:
    """The samples of a batch that read the same basis of a layer.

    Attributes:
        key: Of that basis, in the layer's store.
        rows: {adapter name: indices of its samples}.
        ranks: {adapter name: directions that the layer gives it}.
    """

    key: str
    rows: dict[str, list[int]]
    ranks: dict[str, int]


class MixedBatch(list[str]):
    """`adapter_names`, one a sample. All layers of a call get the same object, and keep in it what they can share.

    The matrices are cast, or stacked, once for each group instead of once for each layer, and for all the steps of a
    `generate`; they go with the call.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(names)
        self._parts: dict[str, list[BatchPart]] = {}
        self._cast: dict[tuple, Tensor] = {}
        self._stacked: dict[tuple, Tensor] = {}

    def parts(self, method: MixingMethod) -> list[BatchPart]:
        """What of the batch concerns a layer; "__base__" and adapters that leave it alone do not."""
        layer = method.layer
        if layer.path not in self._parts:
            parts: dict[str, BatchPart] = {}
            for row, name in enumerate(self):
                if name in layer.group_of:
                    key = method.key_of(name)
                    part = parts.setdefault(key, BatchPart(key, {}, {}))
                    part.rows.setdefault(name, []).append(row)
                    part.ranks.setdefault(name, method.usable_rank(name))
            self._parts[layer.path] = list(parts.values())
        return self._parts[layer.path]

    def add(self, method: MixingMethod, part: BatchPart, y: Tensor, h: Tensor) -> None:
        """y += h M^T with each sample's own M, in place.

        Args:
            method: Of the layer.
            part: Samples that read the same basis.
            y: (samples, ..., out), contiguous, no one else's.
            h: (samples, ..., rank), coordinates of all samples, for the largest rank among them.
        """
        tokens = y[0].numel() // max(1, y.shape[-1])
        few = len(part.rows) <= BATCHED_ADAPTERS or (y.device.type == "cpu" and tokens > BATCHED_TOKENS)
        if few:
            for name, rows in part.rows.items():
                self._add_to_rows(method, name, part.ranks[name], rows, y, h)
        else:
            stack = self._stack(method, part, h.shape[-1], y)  # (samples, rank, out)
            samples = (len(self), tokens)
            y.view(*samples, y.shape[-1]).baddbmm_(h.reshape(*samples, h.shape[-1]).to(y.dtype), stack)

    def _add_to_rows(self, method: MixingMethod, name: str, rank: int, rows: list[int], y: Tensor, h: Tensor) -> None:
        matrix = self._matrix(method, name, y)[:, :rank]
        first, last = rows[0], rows[-1] + 1
        if last - first == len(rows) and not torch.is_grad_enabled():  # neighbours: a view, nothing is copied
            add_product(y[first:last], h[first:last, ..., :rank], matrix, in_place=True)
            return
        index = torch.tensor(rows, device=y.device)
        y.index_copy_(0, index, add_product(y.index_select(0, index), h[..., :rank].index_select(0, index), matrix))

    def _matrix(self, method: MixingMethod, name: str, like: Tensor) -> Tensor:
        """M (out, group rank) in the dtype and on the device of `like`."""
        key = (name, method.layer.group_of[name], like.dtype, like.device)
        if key not in self._cast:
            self._cast[key] = method.layer.matrix(name).to(device=like.device, dtype=like.dtype)
        return self._cast[key]

    def _stack(self, method: MixingMethod, part: BatchPart, rank: int, like: Tensor) -> Tensor:
        """M^T of each sample, (samples, rank, out); zero where an adapter has no direction or a sample no adapter."""
        members = tuple((name, method.layer.group_of[name], part.ranks[name]) for name in part.rows)
        key = (members, rank, like.dtype, like.device)
        if key not in self._stacked:
            stack = like.new_zeros(len(self), rank, like.shape[-1])
            for name, rows in part.rows.items():
                used = min(rank, part.ranks[name])
                stack[rows, :used] = method.layer.matrix(name)[:, :used].T.to(stack)
            self._stacked[key] = stack
        return self._stacked[key]


@contextmanager
def handed_out(
    model: nn.Module, layer_class: type[nn.Module], adapter_names: Sequence[str], call: dict[str, Any]
) -> Iterator[None]:
    """Give `adapter_names`, one a sample, to each layer of a model for the length of one forward or generate call.

    Args:
        model: The base model's root.
        layer_class: Of the adapted layers.
        adapter_names: One for each input; "__base__" for none.
        call: The call's further arguments, which may ask for several rows an input.
    """
    repeats = _rows_per_input(call)
    per_input = MixedBatch(adapter_names)
    per_row = MixedBatch([n for n in adapter_names for _ in range(repeats)]) if repeats > 1 else per_input
    encoder: Any = None
    if repeats > 1 and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        encoder = cast(Any, model).get_encoder()  # decoder-only models answer this too, with all their layers
    in_encoder = {id(m) for m in encoder.modules()} if isinstance(encoder, nn.Module) else set()
    handles = []
    try:
        for module in model.modules():
            if isinstance(module, (layer_class, AuxiliaryTrainingWrapper)):
                # beams repeat the decoder's rows, while an encoder sees each input once
                names = per_input if id(module) in in_encoder else per_row
                hook = partial(_pass_adapter_names, adapter_names=names)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows_per_input(kwargs: dict[str, Any]) -> int:
    """How many rows `generate` with these arguments makes of each input: beams, or sequences to return."""
    settings = kwargs.get("generation_config")
    counts = (kwargs.get(name, getattr(settings, name, None)) for name in ("num_beams", "num_return_sequences"))
    return max((n for n in counts if isinstance(n, int)), default=1)


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: dict, *, adapter_names: list[str]) -> tuple[Any, dict]:
    kwargs["adapter_names"] = adapter_names
    return args, kwargs
