"""Share the bases of a model out between the processes of a distributed job, and exchange what each has solved.

All processes end up with the same bits, whatever machines they run on. Only plain tensors travel, over the default
process group. Whether all processes are there is settled first, through the job's key-value store and with patience for
a bounded time: a script may well load an adapter in its first process alone, and must not hang for that.

`PICA_SPLIT_BASIS=0` switches this off; each process then solves all bases itself.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from pica import errors
from pica.errors import BasisError, ConfigError

logger = logging.getLogger(__name__)

SWITCH = "PICA_SPLIT_BASIS"
# Seconds to wait for the other processes: for as long as the work would take, within these bounds.
LEAST_PATIENCE, MOST_PATIENCE = 10.0, 120.0
OPERATIONS_PER_SECOND = 1e11  # a rough guess, for that only
_WORDS, _MESSAGE = 24, 4096  # bytes

_met: Counter[str] = Counter()  # how often this process came for each piece of work
_alone = False  # whether this process works without the others, see `alone`
_left_alone = False  # others did not come the last time: do not wait for long again


@dataclass(frozen=True)
class Solved:
    """What travels: tensors (float32 or float64, at most two dimensions) and a word or two on how they were made."""

    tensors: tuple[Tensor, ...]
    words: str


@dataclass(frozen=True)
class Holdings:
    """What is known of the weights before any of them is loaded.

    Attributes:
        shapes: (out, in) of each.
        sample: Some of their values, so that processes with different models do not take each other's bases; empty
            where no process could compare.
        in_parts: Whether every process holds a part of each weight, so that all must take part in loading one.
        here: Whether this process has the weights at all. Where some have not (FSDP may load them in one process only),
            the others solve, and all receive.
    """

    shapes: Sequence[tuple[int, int]]
    sample: bytes = b""
    in_parts: bool = False
    here: bool = True

    @property
    def costs(self) -> list[float]:
        """Operations that each basis takes, roughly: its Gram matrix and that one's eigenvectors."""
        narrow = [min(shape) for shape in self.shapes]
        return [2.0 * out * in_ * n + 9.0 * n**3 for (out, in_), n in zip(self.shapes, narrow)]


def process_count() -> int:
    """Processes of the distributed job that this one belongs to; 1 outside of one."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 1
    return torch.distributed.get_world_size()


def process_index() -> int:
    """This process's place among them, from 0."""
    return torch.distributed.get_rank() if process_count() > 1 else 0


def enabled() -> bool:
    """Ask whether work is shared out.

    Returns:
        True in a distributed job, unless `PICA_SPLIT_BASIS` is 0.
    Raises:
        ConfigError: The variable is neither 0 nor 1.
    """
    text = os.environ.get(SWITCH, "") or "1"
    if text not in ("0", "1"):
        raise ConfigError(f"{SWITCH}={text!r} must be 0 (each process solves all bases itself) or 1.")
    return text == "1" and process_count() > 1 and not _alone


@contextmanager
def alone() -> Generator[None]:
    """Solve all bases in this process meanwhile: for what one process of a job does without the others."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def divide(costs: Sequence[float], workers: Sequence[int], size: int) -> list[list[int]]:
    """Share out items by their costs: the dearest that is left to whoever has least to do, again and again.

    The longest share is at most 4/3 of what the best division has.

    Args:
        costs: Of each item.
        workers: The processes that get any.
        size: Number of processes.
    Returns:
        For each process the items that it works on, dear ones first.
    """
    loads = dict.fromkeys(workers, 0.0)
    shares: list[list[int]] = [[] for _ in range(size)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = min(workers, key=lambda rank: (loads[rank], rank))
        loads[least] += costs[item]
        shares[least].append(item)
    return shares


def meet(work: str, holdings: Holdings) -> bool:
    """Whether all processes of the job have come to do the same work on the same weights. All get the same answer."""
    global _left_alone
    if not enabled():
        return False
    content = f"{work}\n{list(holdings.shapes)}\n{holdings.in_parts}\n".encode() + holdings.sample
    key = hashlib.sha256(content).hexdigest()[:32]
    _met[key] += 1
    default = torch.distributed.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage] - no public way
    store = torch.distributed.PrefixStore(f"pica/basis/{key}/{_met[key]}", default)
    patience = min(max(sum(holdings.costs) / OPERATIONS_PER_SECOND, LEAST_PATIENCE), MOST_PATIENCE)
    complete = store.add("arrived", 1) == process_count()
    if not complete:
        try:
            store.wait(["answer"], timedelta(seconds=1.0 if _left_alone else patience))
        except RuntimeError:  # DistStoreError: time is up
            logger.info("Other processes did not come for the same bases within %.0f s; solving all here", patience)
    # Whoever is first to claim it answers: the last to arrive, or one that has lost patience.
    if store.add("claims", 1) == 1:
        store.set("answer", "yes" if complete else "no")
    together = store.get("answer") == b"yes"
    _left_alone = not together
    return together


def share_out(holdings: Holdings, solve: Callable[[list[list[int]]], dict[int, Solved]]) -> list[Solved]:
    """Solve together with all processes; call it after `meet` said yes.

    Args:
        holdings: As for `meet`.
        solve: From everybody's items to the results of this process's own.
    Returns:
        What all have solved, in the order of the items, the same bits in each process.
    Raises:
        BasisError: No process has the weights, or one failed; as any other error of the package that one ran into.
    """
    size, rank, wire = process_count(), process_index(), wire_device()
    here = torch.zeros(size, dtype=torch.int64, device=wire)
    here[rank] = int(holdings.here)
    torch.distributed.all_reduce(here)
    workers = [index for index, has in enumerate(here.tolist()) if has]
    if not workers:
        raise BasisError("No process has the base model's weights; load them before adding an adapter.")
    shares = divide(holdings.costs, workers, size)
    found: dict[int, Solved] = {}
    failure: Exception | None = None
    try:
        found = solve(shares)
    except Exception as error:  # told to the others, who would wait for ever
        failure = error
    _raise_together(failure, wire)
    owners = {item: owner for owner, items in enumerate(shares) for item in items}
    described = torch.zeros(len(holdings.shapes), 16 + _WORDS, dtype=torch.int64, device=wire)
    for item, solved in found.items():
        described[item] = torch.tensor(_describe(solved), device=wire)
    torch.distributed.all_reduce(described)
    results = []
    for item, row in enumerate(described.tolist()):
        own = found.pop(item, None)
        tensors = []
        for at, (shape, dtype) in enumerate(_layout(row)):
            if own is not None:
                tensor = own.tensors[at].to(wire).contiguous()
            else:
                tensor = torch.empty(shape, dtype=dtype, device=wire)
            torch.distributed.broadcast(tensor, src=owners[item])
            tensors.append(tensor)
        results.append(Solved(tuple(tensors), bytes(v for v in row[16:] if v).decode()))
    return results


def wire_device() -> torch.device:
    """Where tensors have to be to be sent."""
    if "cpu:" in torch.distributed.get_backend_config():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None, "a process group without a CPU backend, and no accelerator"
    return torch.device(accelerator.type, torch.get_device_module(accelerator.type).current_device())


def _describe(solved: Solved) -> list[int]:
    """Count, then (dimensions, rows, columns, whether float64) of each tensor, then the words, as 16 + _WORDS numbers."""
    numbers = [len(solved.tensors)]
    for tensor in solved.tensors:
        rows, columns = (*tensor.shape, 0)[:2]
        numbers += [tensor.ndim, rows, columns, int(tensor.dtype == torch.float64)]
    text = list(solved.words.encode()[:_WORDS])
    return numbers + [0] * (16 - len(numbers)) + text + [0] * (_WORDS - len(text))


def _layout(row: list[int]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    found = []
    for at in range(row[0]):
        dimensions, rows, columns, wide = row[1 + 4 * at : 5 + 4 * at]
        found.append(((rows, columns)[:dimensions], torch.float64 if wide else torch.float32))
    return found


def _raise_together(failure: Exception | None, wire: torch.device) -> None:
    """Raise in every process where one has failed: its own error there, one that reads the same in the others."""
    text = "" if failure is None else f"{type(failure).__name__}\n{failure or type(failure).__name__}"
    content = text.encode()[:_MESSAGE].ljust(_MESSAGE, b"\0")
    mine = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(wire)
    everybody = [torch.empty_like(mine) for _ in range(process_count())]
    torch.distributed.all_gather(everybody, mine)
    if failure is not None:
        raise failure
    for rank, theirs in enumerate(everybody):
        if told := theirs.cpu().numpy().tobytes().rstrip(b"\0").decode(errors="replace"):
            kind, _, message = told.partition("\n")
            known = getattr(errors, kind, None)
            if isinstance(known, type) and issubclass(known, errors.PicaError):
                raise known(message)
            raise BasisError(f"Process {rank} could not solve its share of the bases ({kind}: {message}).")
