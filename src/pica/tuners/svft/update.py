"""z = T h for a sparse square T, as pure functions of tensors; the layer and the tests call the same ones.

T is used in the way that measured fastest on a CPU (2048 wide, 512 tokens, one core, forward): its diagonal as a scale;
a narrow band as 2d + 1 shifted products (d = 16: 4 ms, dense 49 ms, CSR 7 ms); everything else scattered into a dense
matrix for the length of one product, since no sparse product has a gradient for its entries that is as quick.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pica.tuners.svft.pattern import band_mask

# Shifted products win while a band takes less than this share of the matrix (measured at widths 64, 576 and 2048).
NARROW_BAND = 1 / 8


def is_narrow(n: int, off_diagonals: int) -> bool:
    """Whether a band is applied as shifted products."""
    return (2 * off_diagonals + 1) <= NARROW_BAND * n


def dense_matrix(values: Tensor, positions: Tensor, n: int) -> Tensor:
    """T (n, n) from its entries `values` (k,) at `positions` (k,)."""
    return values.new_zeros(n * n).index_copy(0, positions.long(), values).view(n, n)


def apply_diagonal(h: Tensor, values: Tensor) -> Tensor:
    """T h for a diagonal T, (..., n)."""
    return h * values.to(h.dtype)


def apply_band(h: Tensor, values: Tensor, off_diagonals: int) -> Tensor:
    """T h for a band with `off_diagonals` d < n / 2 on each side, (..., n); `values` in the order of their positions."""
    if torch.jit.is_tracing():  # a function of autograd is traced as a call of Python, which no file can hold
        return _band_product(h, values, off_diagonals)
    return _Band.apply(h, values, off_diagonals)  # pyright: ignore[reportReturnType] - untyped in torch


def apply_entries(h: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    """T h for a T with `values` (k,) at `positions` (k,), zero elsewhere, (..., n)."""
    if torch.jit.is_tracing():
        return _entries_product(h, values, positions)
    return _Entries.apply(h, values, positions)  # pyright: ignore[reportReturnType] - untyped in torch


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


def _bounds(n: int, offset: int) -> tuple[slice, slice]:
    """(rows i, columns i + offset) of one diagonal."""
    return slice(max(0, -offset), n - max(0, offset)), slice(max(0, offset), n - max(0, -offset))


class _Band(torch.autograd.Function):
    """Only h and the entries are saved for backward, not one product a diagonal."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, values: Tensor, off_diagonals: int) -> Tensor:
        ctx.save_for_backward(h if ctx.needs_input_grad[1] else None, values)
        ctx.off_diagonals = off_diagonals
        return _band_product(h, values, off_diagonals)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - once_differentiable has no types
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        (dz,) = grad_outputs
        h, values = ctx.saved_tensors
        d, n = ctx.off_diagonals, dz.shape[-1]
        dh = dvalues = None
        if ctx.needs_input_grad[0]:
            cells = _cells(values.to(dz.dtype), n, d)
            dh = torch.zeros_like(dz)
            for k in range(2 * d + 1):
                rows, columns = _bounds(n, k - d)
                dh[..., columns].addcmul_(dz[..., rows], cells[rows, k])
        if ctx.needs_input_grad[1]:
            flat_dz, flat_h = _rows(dz), _rows(h)
            total = torch.zeros(n, 2 * d + 1, dtype=values.dtype, device=values.device)
            for k in range(2 * d + 1):
                rows, columns = _bounds(n, k - d)
                total[rows, k] = (flat_dz[:, rows] * flat_h[:, columns]).sum(0, dtype=values.dtype)
            # rows whose band lies whole within the matrix, between those that it is cut off in on either side
            top = [total[i, d - i :] for i in range(d)]
            end = [total[i, : n - i + d] for i in range(n - d, n)]
            dvalues = torch.cat([*top, total[d : n - d].reshape(-1), *end])
        return dh, dvalues, None


def _band_product(h: Tensor, values: Tensor, off_diagonals: int) -> Tensor:
    n = h.shape[-1]
    cells = _cells(values.to(h.dtype), n, off_diagonals)
    z = torch.zeros_like(h)
    for k in range(2 * off_diagonals + 1):
        rows, columns = _bounds(n, k - off_diagonals)
        z[..., rows].addcmul_(h[..., columns], cells[rows, k])
    return z


def _cells(values: Tensor, n: int, off_diagonals: int) -> Tensor:
    """The band as (n, 2d + 1), column k holding the diagonal k - d; zero outside of the matrix."""
    mask = band_mask(n, off_diagonals, values.device)
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


class _Entries(torch.autograd.Function):
    """The dense matrix lives for one product; it is made again for backward instead of being kept."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        ctx.save_for_backward(h if ctx.needs_input_grad[1] else None, values, positions)
        return _entries_product(h, values, positions)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - once_differentiable has no types
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor | None, ...]:
        (dz,) = grad_outputs
        h, values, positions = ctx.saved_tensors
        dh = dvalues = None
        if ctx.needs_input_grad[0]:
            dh = _product(dz, dense_matrix(values.to(dz.dtype), positions, dz.shape[-1]))
        if ctx.needs_input_grad[1]:
            dense = _rows(dz).T @ _rows(h)  # (n, tokens) (tokens, n)
            dvalues = dense.reshape(-1)[positions.long()].to(values.dtype)
        return dh, dvalues, None


def _entries_product(h: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    return _product(h, dense_matrix(values.to(h.dtype), positions, h.shape[-1]).T)


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):  # the operands have the dtype that the product is to have
        return rows @ matrix
