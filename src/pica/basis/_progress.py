"""Solve the bases of many weights, one at a time, with a progress bar when that takes more than a few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from torch import Tensor
from tqdm.auto import tqdm

from pica.basis.cache import cached_solve_basis
from pica.basis.spectral import Basis, BasisRequest, Side, solve_basis

# In a log file each update is a line, so there one now and then has to do.
LOG_SECONDS = 15.0
# A bar that flashes up for half a second is noise; one after this long is news.
QUIET_SECONDS = 3.0


def solve_many(requests: Sequence[BasisRequest], load: Callable[[BasisRequest], tuple[Tensor, Side]]) -> list[Basis]:
    """Basis for each of `requests`, in order, from the cache where they are in it.

    Args:
        requests: What to solve; a request's own `side` is used unless it is "auto".
        load: Gives a request's weight (out, in) and the side that "auto" means for it; the weight is released after use.

    Raises:
        BasisError, RankError: as `solve_basis`, for the first layer that fails; nothing is kept then.
    """
    solved: list[Basis] = []
    started = time.monotonic()
    bar: tqdm | None = None
    try:
        for request in requests:
            weight, side = load(request)
            solved.append(
                cached_solve_basis(
                    weight,
                    request.rank,
                    projection=request.projection,
                    side=side if request.side == "auto" else request.side,
                    seed=request.seed,
                    name=request.name,
                    solve=solve_basis,
                )
            )
            if bar is not None:
                bar.update()
            elif time.monotonic() - started > QUIET_SECONDS and len(solved) < len(requests):
                bar = _bar(len(requests), len(solved))
    finally:
        if bar is not None:
            bar.close()
    return solved


def _bar(total: int, done: int) -> tqdm:
    pause = 0.1 if sys.stderr.isatty() else LOG_SECONDS
    return tqdm(
        total=total, initial=done, desc="PiCa basis", unit="layer", leave=False, mininterval=pause, maxinterval=pause
    )
