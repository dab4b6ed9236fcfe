"""The directions in which the vectors of a stream have most of their energy: eigenvectors of their uncentred second moment.

C = sum_t x_t x_t^T over tokens t, (n, n). The paper's basis comes from the weight W alone, from W^T W; these come from what
the layer is given (C itself), or from what it makes of that (W C W^T). The vectors pass by and are not kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated as Float
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pica.basis._precision import full_precision
from pica.basis.orient import direction_signs
from pica.basis.spectral import SLICE_ELEMENTS, leading_eigenvectors

WIDE = 4096
"""Up to this width C is kept whole, 128 MiB in float64; beyond it only its product with a few directions is."""
ITERATIONS = 2
"""Times that a sketch's directions are improved before its result is read off."""
SPARE = 32
"""Directions that a sketch has beyond those wanted: its last ones are the least accurate."""


@dataclass(frozen=True)
class Leading:
    """Leading eigenvectors of a second moment.

    Attributes:
        rows: One a row, orthonormal, by falling eigenvalue, (k, n), float64 where the device has it. Those of a vanishing
            eigenvalue are left out, so a stream of fewer than k different vectors gives fewer.
        energies: Their eigenvalues, (k,).
        total: The sum of all eigenvalues: the energy of the stream. Where that is not finite there are no rows.
    """

    rows: Float[Tensor, "k n"]
    energies: Float[Tensor, "k"]
    total: float


class Stream(Protocol):
    """Takes a stream of vectors, `passes` times the same one, and finds its leading directions."""

    passes: int

    def add(self, vectors: Tensor) -> None:
        """Take some vectors, (count, n), any float dtype; count may be 0."""
        ...

    def end_pass(self) -> None:
        """The stream has ended, and begins again if this was not the last pass."""
        ...

    def leading(self, rank: int) -> Leading:
        """What was found; once, after the last pass."""
        ...


def stream_of(width: int, rank: int, device: torch.device, *, seed: int) -> Stream:
    """What finds `rank` directions of vectors of this width: exactly up to `WIDE`, else by subspace iteration."""
    return Moment(width, device) if _whole(width, rank) else Sketch(width, rank, device, seed=seed)


def stream_bytes(width: int, rank: int) -> int:
    """What `stream_of` holds at its peak, about."""
    if _whole(width, rank):
        return 8 * (width**2 + rank * width)  # a copy while it is solved comes on top, of one at a time
    return 8 * 2 * width * (rank + SPARE)


def passes_of(width: int, rank: int) -> int:
    """How often it has to see the stream."""
    return Moment.passes if _whole(width, rank) else Sketch.passes


def _whole(width: int, rank: int) -> bool:
    return width <= WIDE or rank + SPARE >= width // 2


def precise(device: torch.device) -> torch.dtype:
    """float64 where the device has it. Activations' energies span more than float32 resolves once they are squared."""
    return torch.float32 if device.type == "mps" else torch.float64


class Moment:
    """All of C."""

    passes = 1

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum = torch.zeros(width, width, dtype=precise(device), device=device)

    def add(self, vectors: Tensor) -> None:
        """See `Stream`."""
        with full_precision(self._sum.device):
            for part in _parts(vectors, self._sum):
                self._sum.addmm_(part.T, part)

    def end_pass(self) -> None:
        """See `Stream`."""

    def leading(self, rank: int) -> Leading:
        """See `Stream`."""
        with full_precision(self._sum.device):
            total = float(self._sum.diagonal().sum())
            if not math.isfinite(total):
                return Leading(self._sum[:0], self._sum[:0, 0], total)
            rows, _ = leading_eigenvectors(self._sum.clone(), min(rank, len(self._sum)), smallest=False)
            energies = (rows @ self._sum).mul_(rows).sum(dim=1)
            return _kept(rows, energies, total, len(self._sum))


class Sketch:
    """C Q for a few orthonormal columns Q, improved in each pass (subspace iteration, then Rayleigh and Ritz).

    Args:
        width: n.
        rank: Directions wanted.
        device: Where the vectors are.
        seed: Of the columns that it begins with, the same on every platform.
    """

    passes = ITERATIONS + 1

    def __init__(self, width: int, rank: int, device: torch.device, *, seed: int) -> None:
        begin = np.random.RandomState(seed).standard_normal((width, rank + SPARE))
        dtype = precise(device)
        self._columns = torch.linalg.qr(torch.from_numpy(begin).to(device=device, dtype=dtype))[0]
        self._product = torch.zeros_like(self._columns)
        self._total, self._pass = 0.0, 0
        self._inner: Tensor | None = None

    def add(self, vectors: Tensor) -> None:
        """See `Stream`."""
        with full_precision(self._columns.device):
            for part in _parts(vectors, self._columns):
                self._product.addmm_(part.T, part @ self._columns)
                if self._pass == 0:
                    self._total += float(part.square().sum())

    def end_pass(self) -> None:
        """See `Stream`."""
        self._pass += 1
        with full_precision(self._columns.device):
            if self._pass == self.passes:
                self._inner = self._columns.T @ self._product  # Q^T C Q
            else:
                self._columns = torch.linalg.qr(self._product)[0]
                self._product.zero_()

    def leading(self, rank: int) -> Leading:
        """See `Stream`."""
        assert self._inner is not None, "the last pass has not ended"
        if not math.isfinite(self._total):
            return Leading(self._columns.T[:0], self._columns[0, :0], self._total)
        with full_precision(self._columns.device):
            energies, vectors = torch.linalg.eigh((self._inner + self._inner.T) / 2)
            energies, vectors = energies.flip(0)[:rank], vectors.flip(1)[:, :rank]
            return _kept((self._columns @ vectors).T, energies, self._total, len(self._columns))


def rows_of_outputs(outputs: Float[Tensor, "k out"], weight: Float[Tensor, "out in"]) -> Float[Tensor, "rank in"]:
    """The input directions from which given output directions are read, (k, in) orthonormal, the first ones first.

    For the leading eigenvectors U_r of W C W^T this is the row space of U_r^T W, the best rank-r approximation of W on the
    stream (in the norm of C). With C the identity it is the paper's basis.

    Args:
        outputs: U_r^T, (k, out), orthonormal rows.
        weight: W, (out, in).

    Returns:
        The same dtype as `outputs`; fewer rows where W does not reach so many of them.
    """
    with full_precision(weight.device):
        rows = outputs @ weight.to(outputs.dtype)
        columns, triangle = torch.linalg.qr(rows.T)
        lengths = triangle.diagonal().abs()
        if not len(lengths):
            return rows
        keep = lengths > max(weight.shape) * torch.finfo(rows.dtype).eps * float(lengths.max())
        return columns.T[keep]


def oriented(rows: Float[Tensor, "k in"]) -> Float[Tensor, "k in"]:
    """The rows with the sign that `direction_signs` gives them, float32."""
    return (rows * direction_signs(rows).unsqueeze(1)).to(torch.float32).contiguous()


def _kept(rows: Tensor, energies: Tensor, total: float, width: int) -> Leading:
    floor = width * torch.finfo(rows.dtype).eps * (float(energies.max()) if len(energies) else 0.0)
    keep = energies > floor
    return Leading(rows[keep], energies[keep], total)


def _parts(vectors: Tensor, like: Tensor) -> Iterator[Tensor]:
    """The vectors in slices of which each is a small copy, in the precision of `like`."""
    parts = vectors.detach().split(max(1, SLICE_ELEMENTS // vectors.shape[1]))
    return (part.to(device=like.device, dtype=like.dtype).contiguous() for part in parts if len(part))
