"""A batch in which each sample has its own adapter: what its layers share for the length of one call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pica.basis.apply import add_product
from pica.tuners.base.layouts import Layout, Layouts, Place
from pica.tuners.base.matrix_stack import MatrixStacks, Placed

# Up to so many adapters, a product for each of them costs little; on a CPU also for more, where a graph is recorded and
# samples are longer than that.
FEW_ADAPTERS = 4
LONG_SAMPLES = 16
# On a CPU, samples up to this length look their matrices up as in an embedding table (measured: beyond it, one batched
# product is quicker, with 4 to 64 adapters of widths 192 and 1536).
SHORT_SAMPLES = 2


class MixingBank(Protocol):
    """A bank as a mixed batch sees it."""

    batch: MixedBatch | None
    layouts: Layouts
    stacks: MatrixStacks

    def matrices(self, adapter_name: str) -> Any: ...


class MixingLayer(Protocol):
    """A layer as a mixed batch sees it: y += M h, with h (..., rank) of one basis."""

    path: str

    @property
    def bank(self) -> MixingBank: ...
    def matrix(self, adapter_name: str) -> Tensor: ...


@dataclass
class BatchPart:
    """The samples of a batch that read the same basis of a layer, and matrices of the same group.

    Attributes:
        key: Of that basis, in the layer's store.
        group: Of the matrices, in the bank.
        samples: Of the whole batch.
        rows: {adapter: indices of its samples}.
        ranks: {adapter: directions that the layer gives it}.
        rank: The largest of them: the part is given coordinates (..., rank).
    """

    key: str
    group: str
    samples: int
    rows: dict[str, list[int]] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    rank: int = 0
    _kept: dict[Hashable, Any] = field(default_factory=dict)

    def in_runs(self) -> bool:
        """Whether the samples of each adapter are neighbours."""
        return all(rows[-1] - rows[0] + 1 == len(rows) for rows in self.rows.values())

    def once(self, what: Hashable, like: Tensor, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for all layers that share the part, for outputs of this dtype and device."""
        key = (what, like.dtype, like.device)
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


class MixedBatch(list[str]):
    """`adapter_names`, one a sample. All layers of a call meet the same object, and keep in it what they can share.

    Which samples there are of which adapter, and where their matrices lie, is worked out once for all layers of a group
    and all the steps of a `generate`; it goes with the call.
    """

    def __init__(self, names: Sequence[str], repeats: int = 1) -> None:
        """One name for each input, of which some layers see `repeats` rows each."""
        super().__init__(names)
        self.rows: dict[str, list[int]] = {}
        for row, name in enumerate(names):
            self.rows.setdefault(name, []).append(row)
        self._adapters = [name for name in self.rows if name != "__base__"]
        self._layouts: dict[Layout, list[str]] = {}
        self._parts: dict[str, list[BatchPart]] = {}
        self._parts_at: dict[tuple[Place | None, ...], list[BatchPart]] = {}
        self._repeated = MixedBatch([n for n in names for _ in range(repeats)]) if repeats > 1 else self

    def of(self, samples: int) -> MixedBatch:
        """The batch as a layer with so many samples sees it.

        Returns:
            The batch, or one with each name repeated: beams do that in a decoder, while an encoder sees each input once.
        Raises:
            ValueError: There are not as many names.
        """
        for batch in (self._repeated, self):
            if len(batch) == samples:
                return batch
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(self._repeated)} and {samples} respectively."
        )

    def parts(self, layer: MixingLayer) -> list[BatchPart]:
        """What of the batch concerns a layer; "__base__" and adapters that leave it alone do not."""
        if layer.path not in self._parts:
            if not self._layouts:
                bank = layer.bank
                for name in self._adapters:
                    layout = bank.layouts.of(name, bank.matrices(name).layers)
                    self._layouts.setdefault(layout, []).append(name)
            places = tuple(layout.place(layer.path) for layout in self._layouts)
            if places not in self._parts_at:
                self._parts_at[places] = self._divided(places)
            self._parts[layer.path] = self._parts_at[places]
        return self._parts[layer.path]

    def _divided(self, places: Sequence[Place | None]) -> list[BatchPart]:
        """The parts of the batch, for the place that each layout has in a layer."""
        parts: dict[tuple[str, str], BatchPart] = {}
        for place, names in zip(places, self._layouts.values()):
            if place is not None:
                part = parts.setdefault(place[:2], BatchPart(place.key, place.group, len(self)))
                part.rows.update((name, self.rows[name]) for name in names)
                part.ranks.update(dict.fromkeys(names, place.rank))
                part.rank = max(part.rank, place.rank)
        return list(parts.values())

    def add(self, layer: MixingLayer, part: BatchPart, y: Tensor, h: Tensor) -> None:
        """y += h M^T with each sample's own M, in place.

        Args:
            layer: The layer.
            part: Samples that read the same basis.
            y: (samples, ..., out), contiguous, no one else's.
            h: (samples, ..., rank), coordinates of all samples, for the part's rank.
        """
        tokens = y.numel() // max(1, part.samples * y.shape[-1])
        on_cpu, few = y.device.type == "cpu", len(part.rows) <= FEW_ADAPTERS
        h = h.to(y.dtype)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():  # whose graphs need the matrices themselves
            if few or (on_cpu and tokens > LONG_SAMPLES):
                _add_one_by_one(part, _cast(layer, part, y), y, h)
            else:
                _add_batched(part.once("stack", y, lambda: _stack(part, _cast(layer, part, y), y)), y, h)
            return
        placed: Placed = part.once("placed", y, lambda: _place(layer, part, y))
        if on_cpu and tokens <= SHORT_SAMPLES:
            part.once(("bags", tokens), y, lambda: Bags(part, placed, tokens)).add(y, h)
        elif few and part.in_runs():
            _add_one_by_one(part, {name: placed.rows[place].T for name, place in placed.places.items()}, y, h)
        else:
            _add_batched(part.once("gathered", y, lambda: _gathered(part, placed)), y, h)

    def read(self, layer: MixingLayer, part: BatchPart, x: Tensor) -> Tensor:
        """x M with each sample's own M (in, rank), where matrices are on the side of the layer's input.

        Args:
            layer: The layer.
            part: Samples with the same basis.
            x: (samples, ..., in), of all samples.
        Returns:
            (samples, ..., rank), for the part's rank; zero for a sample without an adapter.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            stack = part.once("stack", x, lambda: _stack(part, _cast(layer, part, x), x))
        else:
            placed: Placed = part.once("placed", x, lambda: _place(layer, part, x))
            stack = part.once("gathered", x, lambda: _gathered(part, placed))
        return torch.bmm(x.reshape(part.samples, -1, x.shape[-1]), stack.mT).view(*x.shape[:-1], part.rank)


class Bags:
    """y += h M^T for short samples on a CPU: the matrices' rows as an embedding table, from which each token takes its own.

    A sum over rows of a table, weighted by h, is what the product is, and that operator reads bfloat16 rows where they lie
    at the bandwidth of memory, where a batched product takes several times as long (measured at 16 to 256 samples).
    """

    def __init__(self, part: BatchPart, placed: Placed, tokens: int) -> None:
        """Of `tokens` tokens a sample."""
        first, ranks = [0] * part.samples, [0] * part.samples
        for name, rows in part.rows.items():
            for row in rows:
                first[row], ranks[row] = placed.places[name] * placed.rows.shape[1], part.ranks[name]
        start = torch.tensor(first, dtype=torch.int32).repeat_interleave(tokens)
        counts = torch.tensor(ranks, dtype=torch.int32).repeat_interleave(tokens)
        column = torch.arange(part.rank, dtype=torch.int32)
        used = column < counts[:, None]  # (samples * tokens, rank)
        self._table = placed.rows.view(-1, placed.rows.shape[2])
        self._index = (start[:, None] + column)[used]
        self._bounds = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        self._used = None if bool(used.all()) else used.view(-1).nonzero().view(-1)

    def add(self, y: Tensor, h: Tensor) -> None:
        weights = h.reshape(-1)
        if self._used is not None:
            weights = weights.index_select(0, self._used)
        sums = F.embedding_bag(
            self._index, self._table, self._bounds, mode="sum", per_sample_weights=weights, include_last_offset=True
        )
        y.view(sums.shape).add_(sums)


def _place(layer: MixingLayer, part: BatchPart, like: Tensor) -> Placed:
    return layer.bank.stacks.placed(part.group, {name: layer.matrix(name) for name in part.rows}, like)


def _cast(layer: MixingLayer, part: BatchPart, like: Tensor) -> dict[str, Tensor]:
    """Each adapter's M (out, rank), in the dtype and on the device of `like`."""
    return part.once("cast", like, lambda: {n: layer.matrix(n).to(like.device, like.dtype) for n in part.rows})


def _stack(part: BatchPart, matrices: dict[str, Tensor], like: Tensor) -> Tensor:
    """M^T of each sample, (samples, rank, out); zero where an adapter has no direction or a sample no adapter."""
    stack = like.new_zeros(part.samples, part.rank, like.shape[-1])
    for name, rows in part.rows.items():
        stack[rows, : part.ranks[name]] = matrices[name][:, : part.ranks[name]].T
    return stack


def _gathered(part: BatchPart, placed: Placed) -> Tensor:
    """As `_stack`, from what lies in a stack already: a view of it where it can be one."""
    places = [-1] * part.samples
    for name, rows in part.rows.items():
        for row in rows:
            places[row] = placed.places[name]
    alike = -1 not in places and set(part.ranks.values()) == {part.rank}
    if alike and places == list(range(places[0], places[0] + part.samples)):
        return placed.rows[places[0] : places[0] + part.samples, : part.rank]
    index = torch.tensor(places, device=placed.rows.device)
    stack = placed.rows[:, : part.rank].index_select(0, index.clamp(min=0))
    stack[index < 0] = 0.0
    for name, rows in part.rows.items():
        stack[rows, part.ranks[name] :] = 0.0
    return stack


def _add_batched(stack: Tensor, y: Tensor, h: Tensor) -> None:
    samples = len(stack)
    y.view(samples, -1, y.shape[-1]).baddbmm_(h.reshape(samples, -1, h.shape[-1]), stack)


def _add_one_by_one(part: BatchPart, matrices: dict[str, Tensor], y: Tensor, h: Tensor) -> None:
    for name, rows in part.rows.items():
        rank = part.ranks[name]
        matrix, first, last = matrices[name][:, :rank], rows[0], rows[-1] + 1
        if last - first == len(rows) and not torch.is_grad_enabled():  # neighbours: a view, nothing is copied
            add_product(y[first:last], h[first:last, ..., :rank], matrix, in_place=True)
            continue
        index = part.once(("index", name), y, lambda rows=rows: torch.tensor(rows, device=y.device))
        y.index_copy_(0, index, add_product(y.index_select(0, index), h[..., :rank].index_select(0, index), matrix))


@contextmanager
def handed_out(
    banks: Sequence[MixingBank], wrappers: Iterable[nn.Module], adapter_names: Sequence[str], call: dict[str, Any]
) -> Iterator[None]:
    """Give `adapter_names`, one a sample, to each layer for the length of one forward or generate call.

    Args:
        banks: The layers', which they look into.
        wrappers: PEFT's own modules that want them as an argument.
        adapter_names: One for each input; "__base__" for none.
        call: The call's further arguments, which may ask for several rows an input.
    """
    batch = MixedBatch(adapter_names, _rows_per_input(call))
    before = [bank.batch for bank in banks]
    handles = []
    try:
        for bank in banks:
            bank.stacks.begin_call()
            bank.batch = batch
        for wrapper in wrappers:
            hook = partial(_pass_adapter_names, batch=batch)
            handles.append(wrapper.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for bank, earlier in zip(banks, before):
            bank.batch = earlier


def _rows_per_input(kwargs: dict[str, Any]) -> int:
    """How many rows `generate` with these arguments makes of each input: beams, or sequences to return."""
    settings = kwargs.get("generation_config")
    counts = (kwargs.get(name, getattr(settings, name, None)) for name in ("num_beams", "num_return_sequences"))
    return max((n for n in counts if isinstance(n, int)), default=1)


def _pass_adapter_names(module: nn.Module, args: Any, kwargs: dict, *, batch: MixedBatch) -> tuple[Any, dict]:
    kwargs["adapter_names"] = batch.of(len(args[0])) if args else batch
    return args, kwargs
