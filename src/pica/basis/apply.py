"""The update y += h M^T as pure functions of tensors; the layer and the tests call the same ones."""

from __future__ import annotations

from typing import Annotated as Float  # jaxtyping's, when tests/test_shapes.py looks at what runs
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def coordinates(
    source: Float[Tensor, "*batch n"], projector: Float[Tensor, "r n"], shift: Float[Tensor, "r"] | None = None
) -> Float[Tensor, "*batch r"]:
    """h = source projector^T (- shift): what the frozen basis sees of each token.

    Args:
        source: The layer's input x (..., in), or its output y (..., out) where the projector reads that side.
        projector: (r, in) or (r, out), frozen. Nothing of `source`'s width is kept for backward because of that.
        shift: (r,), subtracted; the projected bias where y holds one.
    Returns:
        (..., r) in the dtype that the product has (autocast included).
    """
    if source.dtype != projector.dtype and not torch.is_autocast_enabled(source.device.type):
        projector = projector.to(source.dtype)
    if _lies_by_columns(source):
        columns = projector.T.expand(len(source), -1, -1)  # (N, in, r), one matrix N times
        if shift is None:
            return torch.bmm(source, columns)
        return torch.baddbmm(-shift.to(projector.dtype), source, columns)
    return F.linear(source, projector, None if shift is None else -shift.to(projector.dtype))


def add_product(
    y: Float[Tensor, "*batch out"],
    h: Float[Tensor, "*batch r"],
    matrix: Float[Tensor, "out r"],
    *,
    in_place: bool = False,
) -> Float[Tensor, "*batch out"]:
    """Add an update to a layer's output (the paper's x U_r B, transposed).

    The product runs in y's dtype; M's gradient comes back in M's. Only h and M are saved for backward.

    Args:
        y: Base layer's output, (..., out).
        h: Coordinates, (..., r).
        matrix: M, (out, r).
        in_place: Whether y's memory may be overwritten: the caller knows that nobody else holds it.
    Returns:
        y + h M^T, (..., out), in y's dtype; y itself where it was overwritten.
    """
    h, matrix = h.to(y.dtype), matrix.to(y.dtype)
    if _lies_by_columns(y):
        return torch.baddbmm(y.mT, matrix.expand(len(y), -1, -1), h.mT).mT  # lies as y does
    if torch.jit.is_tracing():  # no token count may become a constant of the graph
        return y + F.linear(h, matrix)
    if in_place and not torch.is_grad_enabled():
        _rows(y).addmm_(_rows(h), matrix.T)
        return y
    if in_place:
        return _AddProductInPlace.apply(y, h, matrix)  # pyright: ignore[reportReturnType] - untyped in torch
    return torch.addmm(_rows(y), _rows(h), matrix.T).view_as(y)


def _lies_by_columns(tensor: Tensor) -> bool:
    """Whether (N, tokens, n) is a transposed view, as of an image's channels: flattening its tokens would copy it."""
    return tensor.ndim == 3 and not tensor.is_contiguous() and tensor.mT.is_contiguous()


def _rows(tensor: Tensor) -> Tensor:
    """(..., n) as (tokens, n), a view where it can be one; tokens and n may be zero."""
    return tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1])


class _AddProductInPlace(torch.autograd.Function):
    """y.addmm_ on a flattened view, without the copy-on-write bookkeeping that autograd adds to in-place views."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, matrix: Tensor) -> Tensor:
        ctx.mark_dirty(y)
        ctx.save_for_backward(h if ctx.needs_input_grad[2] else None, matrix)
        _rows(y).addmm_(_rows(h), matrix.T)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        (dy,) = grad_outputs
        h, matrix = ctx.saved_tensors
        dh = dy @ matrix if ctx.needs_input_grad[1] else None  # (..., out) (out, r) -> (..., r)
        dm = None
        if ctx.needs_input_grad[2]:
            dm = _rows(dy).T @ _rows(h)  # (out, tokens) (tokens, r)
        return dy, dh, dm


def delta_weight(matrix: Float[Tensor, "out r"], directions: Float[Tensor, "r in"]) -> Float[Tensor, "out in"]:
    """Multiply an update out (the paper's U_r B, transposed).

    Args:
        matrix: M, (out, r).
        directions: P, (r, in), orthonormal rows.
    Returns:
        dW = M P, (out, in), in at least float32.
    """
    dtype = torch.promote_types(torch.promote_types(matrix.dtype, directions.dtype), torch.float32)
    return matrix.to(dtype) @ directions.to(dtype)
