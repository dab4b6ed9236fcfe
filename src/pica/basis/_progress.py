"""Solve the bases of many weights, small ones side by side, with a progress bar when that takes more than a few seconds.

In a distributed job the processes share the work; the first one shows the bar.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import NoReturn, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pica.basis._lapack import one_blas_thread
from pica.basis._precision import full_precision
from pica.basis._split import SWITCH, Holdings, Solved, meet, process_index, share_out
from pica.basis.cache import cached_solve_basis
from pica.basis.request import BasisRequest
from pica.basis.spectral import Basis, WantedSide, solve_basis, working_bytes
from pica.errors import BasisError

Result = TypeVar("Result")

# In a log file each update is a line, so there one now and then has to do.
LOG_SECONDS = 15.0
# A bar that flashes up for half a second is noise; one after this long is news.
QUIET_SECONDS = 3.0
# Weights whose smaller side is at most this long are solved side by side: a Gram matrix of 4 MB.
SIDE_BY_SIDE = 1024
# Larger ones as well, as long as all that are solved at a time take at most this many bytes beyond one Gram matrix.
ROOM = 60 * 2**20


def solve_many(
    requests: Sequence[BasisRequest],
    load: Callable[[BasisRequest], tuple[Tensor, WantedSide]],
    holdings: Holdings | None = None,
) -> list[Basis]:
    """Solve many bases, or read them from the cache where they are in it.

    In a distributed job whose processes all ask for the same, each solves its share, and all get the same bits.

    Args:
        requests: What to solve; a request's own `side` is used unless it is "auto".
        load: Gives a request's weight (out, in) and the side that "auto" means for it; the weight is released after use.
        holdings: What is known of the weights, in the order of `requests`; without it nothing is shared out.
    Returns:
        A basis for each of `requests`, in order.
    Raises:
        BasisError: As `solve_basis`, for the first layer that fails, and nothing is kept then; or this process holds no
            weights, and the others ask for something else.
        RankError: As `solve_basis`, likewise.
    """
    if holdings is None or not requests or not meet(repr(list(requests)), holdings):
        if holdings is not None and not holdings.here:
            raise BasisError(
                f"{requests[0].name}: this process has no weights (FSDP's cpu_ram_efficient_loading leaves them to the "
                f"first one), and the others did not add the same adapter with it. Add it in all processes and leave "
                f"{SWITCH} alone, or set fsdp_cpu_ram_efficient_loading to false."
            )
        return with_progress(_solve_each(requests, load), len(requests))

    def solve(shares: list[list[int]]) -> dict[int, Solved]:
        mine = shares[process_index()]
        each = (
            _solve_in_rounds(requests, load, shares)
            if holdings.in_parts
            else _solve_each([requests[i] for i in mine], load)
        )
        bases = with_progress(each, len(mine))
        return {i: Solved((b.projector, b.gains), f"{b.side} {b.clear_rank} {b.solver}") for i, b in zip(mine, bases)}

    found = []
    for request, solved in zip(requests, share_out(holdings, solve)):
        side, clear, solver = solved.words.split(" ", 2)
        projector, gains = solved.tensors
        found.append(Basis(projector, "out" if side == "out" else "in", gains, request.projection, solver, int(clear)))
    return found


def _solve_in_rounds(
    requests: Sequence[BasisRequest],
    load: Callable[[BasisRequest], tuple[Tensor, WantedSide]],
    shares: list[list[int]],
) -> Iterator[Basis]:
    """Solve this process's share of weights that all processes have to load together.

    In each round all load one weight for each of them, one after another and in the same order, and keep their own; then
    all solve at the same time. One whole weight a process is the most that is held.

    Yields:
        The bases of this process's share, in its order.
    Raises:
        Exception: What the first solving that failed here raised, once all rounds are over.
    """
    failure: Exception | None = None
    for items in zip_longest(*shares):
        kept: tuple[BasisRequest, Tensor, WantedSide] | None = None
        for owner, item in enumerate(items):
            if item is not None:
                weight, side = load(requests[item])
                if owner == process_index() and failure is None:
                    kept = (requests[item], weight, side)
                del weight
        if kept is not None:
            try:
                yield _solve(*kept)
            except Exception as error:  # the others still need this process to load theirs
                failure = error
    if failure is not None:
        raise failure


def with_progress(results: Iterable[Result], total: int, *, unit: str = "layer") -> list[Result]:
    """The `total` results of an iterable that works for them, with a progress bar once that takes a few seconds."""
    started = time.monotonic()
    bar: tqdm[NoReturn] | None = None
    done: list[Result] = []
    try:
        for result in results:
            done.append(result)
            if bar is not None:
                bar.update()
            elif time.monotonic() - started > QUIET_SECONDS and len(done) < total and process_index() == 0:
                bar = _bar(total, len(done), unit)
    finally:
        if isinstance(results, Generator):  # an interrupted notebook keeps it, and with it what it has set meanwhile
            results.close()
        if bar is not None:
            bar.close()
    return done


def _solve_each(
    requests: Sequence[BasisRequest], load: Callable[[BasisRequest], tuple[Tensor, WantedSide]]
) -> Iterator[Basis]:
    """Solve side by side, a core each, what is small or fits into `ROOM`; the rest one after another.

    An eigenvalue problem gains little from several cores, the products of a large weight gain from all. So large ones
    share the machine only where every core then has one, and where that costs little memory.

    Yields:
        The bases, in the order of `requests`.
    """
    workers = torch.get_num_threads()
    waiting: deque[Future[Basis]] = deque()
    with ExitStack() as stack:
        pool: ThreadPoolExecutor | None = None
        for request in requests:
            weight, side = load(request)
            shared = weight.device.type == "cpu" and fits_beside(weight.shape, request.rank, workers)
            if not (shared and workers > 1 and len(requests) > 1):
                while waiting:
                    yield waiting.popleft().result()
                stack.close()  # this one gets all cores again
                pool = None
                yield _solve(request, weight, side)
                continue
            if pool is None:
                pool = stack.enter_context(_one_thread_each(workers))
            waiting.append(pool.submit(_solve, request, weight, side))
            if len(waiting) > workers:  # no more weights are held (or upcast) than are worked on
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def fits_beside(shape: Sequence[int], rank: int, workers: int) -> bool:
    """Whether `workers` weights of this shape, (out, in), are solved side by side on the CPU."""
    short = min(shape)
    return short <= SIDE_BY_SIDE or workers * working_bytes(shape, rank) - 4 * short**2 <= ROOM


def _solve(request: BasisRequest, weight: Tensor, side: WantedSide) -> Basis:
    return cached_solve_basis(
        weight,
        request.rank,
        projection=request.projection,
        side=side if request.side == "auto" else request.side,
        seed=request.seed,
        name=request.name,
        solve=solve_basis,
    )


@contextmanager
def _one_thread_each(workers: int) -> Generator[ThreadPoolExecutor]:
    """Threads that solve; linear algebra inside them (torch's, and scipy's BLAS) does not start threads of its own."""
    before = torch.get_num_threads()
    # the solver sets precision switches that are global, so they are set out here and stay as they are meanwhile
    with full_precision(torch.device("cpu")), one_blas_thread():
        torch.set_num_threads(1)
        pool = ThreadPoolExecutor(
            workers, thread_name_prefix="pica-basis", initializer=torch.set_num_threads, initargs=(1,)
        )
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)


def _bar(total: int, done: int, unit: str) -> tqdm[NoReturn]:
    pause = 0.1 if sys.stderr.isatty() else LOG_SECONDS
    return tqdm(
        total=total, initial=done, desc="PiCa basis", unit=unit, leave=False, mininterval=pause, maxinterval=pause
    )
