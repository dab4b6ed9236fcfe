"""Which entries of the square matrix T are trained, as positions i * n + j in rising order.

Values of T are kept as one row of numbers in the order of their positions. The positions of a plain, banded or random
pattern follow from the configuration alone; those of top_k follow from singular vectors, so its file holds them.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from pica.basis.fingerprint import splitmix64


def entry_count(n: int, off_diagonals: int) -> int:
    """Entries of an n x n band with `off_diagonals` d on each side, n (2d + 1) - d (d + 1); d is at most n - 1."""
    d = min(off_diagonals, max(n - 1, 0))
    return n * (2 * d + 1) - d * (d + 1)


def band_mask(n: int, off_diagonals: int, device: torch.device | None = None) -> Tensor:
    """Which cells of an (n, 2d + 1) array lie inside the matrix: cell (i, k) stands for the entry (i, i + k - d)."""
    offsets = torch.arange(-off_diagonals, off_diagonals + 1, device=device)
    columns = torch.arange(n, device=device).unsqueeze(1) + offsets
    return (columns >= 0) & (columns < n)


def band_positions(n: int, off_diagonals: int) -> Tensor:
    """Positions of a band, (entry_count,), int32."""
    d = min(off_diagonals, max(n - 1, 0))
    offsets = torch.arange(-d, d + 1)
    cells = torch.arange(n).unsqueeze(1) * (n + 1) + offsets  # i * n + (i + k - d)
    return cells[band_mask(n, d)].to(torch.int32)


def random_positions(n: int, count: int, seed: int, label: str) -> Tensor:
    """Draw different positions of an n x n matrix, all equally likely.

    They are the first different values of SplitMix64, started by a hash of `seed` and `label`, modulo n^2 (whose bias is
    below 2^-30): the same with every library. Of more than half of all positions, those left out are drawn.

    Args:
        n: Rows of the matrix.
        count: How many.
        seed: Of the configuration.
        label: What they are for.
    Returns:
        (count,), int32, rising.
    """
    cells = n * n
    draw = count if 2 * count <= cells else cells - count
    start = np.frombuffer(hashlib.sha256(f"{seed}\n{label}".encode()).digest()[:8], dtype="<u8").astype(np.uint64)
    found = np.zeros(0, dtype=np.int64)
    drawn = 0
    while len(found) < draw:
        batch = 2 * (draw - len(found)) + 16
        with np.errstate(over="ignore"):  # arithmetic modulo 2^64
            index = start + np.arange(drawn, drawn + batch, dtype=np.uint64)
        new = (splitmix64(index) % np.uint64(cells)).astype(np.int64)
        drawn += batch
        everything = np.concatenate([found, new])
        first = np.sort(np.unique(everything, return_index=True)[1])  # in the order of drawing
        found = everything[first][:draw]
    if draw < count:
        left_out = np.ones(cells, dtype=bool)
        left_out[found] = False
        found = np.flatnonzero(left_out)
    return torch.from_numpy(np.sort(found).astype(np.int32))


def affinity(left: Tensor, right: Tensor) -> Tensor:
    """Measure how strongly left and right singular vectors align, which no sign changes.

    The SVFT paper selects by the inner product of u_i and v_j, which exists for square weights only. For others it is
    taken here over the coordinates that both vectors have, the first n = min(out, in); its authors' code takes entries of
    one side's vectors there. It also takes signed values, which depend on the signs that a solver happens to give.

    Args:
        left: U, (out, n).
        right: V^T, (n, in).
    Returns:
        |<u_i, v_j>|, (n, n), float32.
    """
    shared = min(left.shape[0], right.shape[1])
    return (left[:shared].T.float() @ right[:, :shared].T.float()).abs()


def top_positions(scores: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest entries of `scores` (n, n), (count,), int32; of equal ones the first."""
    flat = scores.detach().cpu().numpy().reshape(-1)
    last = np.partition(flat, len(flat) - count)[len(flat) - count] if count else np.inf  # the smallest that is chosen
    above, equal = np.flatnonzero(flat > last), np.flatnonzero(flat == last)
    chosen = np.concatenate([above, equal[: count - len(above)]])
    return torch.from_numpy(np.sort(chosen).astype(np.int32))


def position_problem(positions: Tensor, n: int) -> str | None:
    """What is wrong with positions that came from a file, or None."""
    if positions.is_meta or not len(positions):
        return None
    if int(positions[0]) < 0 or int(positions[-1]) >= n * n or bool((positions.diff() <= 0).any()):
        return f"must hold rising positions in a {n} x {n} matrix"
    return None
