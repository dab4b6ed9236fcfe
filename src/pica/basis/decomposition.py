"""Both sides of the singular value decomposition of a frozen weight, all of it: W = U S V^T with n = min(out, in).

`spectral.solve_basis` gives the top directions of one side, from a Gram matrix. Here every direction of both sides is
wanted, and two things are different. First, neighbouring singular values in the bulk of a spectrum lie within about
s_1 / n of each other, the closest within s_1 / n^2; a singular vector is only determined to (rounding * s_1 / gap), which
in float32 is nothing at all for the closest pairs of a 2048-wide weight. So the decomposition is done in float64, where
two correct solvers agree to 1e-9 or so. Second, a Gram matrix squares the spectrum and loses the small singular values,
whose directions count as much as the others here. So W itself is decomposed, by LAPACK's divide and conquer (measured
on one core for 2048 x 2048: 5.2 s, against 2.9 s in float32 and 3.8 s from the Gram matrix in float64).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated as Float  # jaxtyping's, when tests/test_shapes.py looks at what runs

import torch
from torch import Tensor

from pica.basis import spectral
from pica.basis._precision import full_precision
from pica.basis.orient import direction_signs
from pica.errors import BasisError

logger = logging.getLogger(__name__)

# Where one side is at least this many times longer, a QR decomposition takes it off first: the result is the same.
TALL = 2


@dataclass(frozen=True)
class Factorisation:
    """W = U S V^T of one weight (out, in), n = min(out, in).

    A direction whose singular value vanishes is not determined by W, so it could not mean the same elsewhere: it is a
    row (a column) of zeros on both sides.

    Attributes:
        left: U, (out, n), float32 or float64, on the weight's device.
        values: Singular values in falling order, (n,), same dtype.
        right: V^T, (n, in), same dtype. The largest entry of each row is positive.
        usable: Number of directions that do not vanish; they come first.
    """

    left: Float[Tensor, "out n"]
    values: Float[Tensor, "n"]
    right: Float[Tensor, "n in"]
    usable: int


def factorise(weight: Float[Tensor, "out in"], *, name: str = "weight") -> Factorisation:
    """Decompose `weight` (out, in) in float64, on its device or, where that has no float64, on the CPU.

    Args:
        weight: Frozen weight, a float dtype, finite, not on the meta device; never modified.
        name: The layer, for messages.
    Returns:
        float64 for a float64 weight, else float32.
    Raises:
        BasisError: `weight` holds NaN or infinity, is on the meta device or has no float dtype, or no solver succeeds.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise BasisError(f"{name}: a basis needs a float matrix (out, in), got {weight.dtype} {tuple(weight.shape)}.")
    if weight.is_meta:
        raise BasisError(f"{name}: the weight is on the meta device; load the base model before solving its basis.")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with full_precision(weight.device):
        spectral.magnitude(weight, name)
        left, values, right = _decompose(weight, name)
        floor = max(weight.shape) * torch.finfo(torch.float64).eps * (float(values[0]) if len(values) else 0.0)
        usable = int((values > floor).sum())
        left[:, usable:], right[usable:] = 0.0, 0.0
        signs = direction_signs(right)
        left, right = left * signs, right * signs.unsqueeze(1)
        left, values, right = (t.to(device=weight.device, dtype=dtype).contiguous() for t in (left, values, right))
        return Factorisation(left, values, right, usable)


def _decompose(weight: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    devices = [weight.device] if weight.device.type == "cpu" else [weight.device, torch.device("cpu")]
    failures = []
    for device in devices:
        try:
            wide = weight.shape[1] > weight.shape[0]
            tall = weight.to(device).to(torch.float64)
            left, values, right = _of_tall(tall.T if wide else tall)
        except (RuntimeError, TypeError) as error:  # TypeError: no float64 on this device
            failures.append(f"svd on {device}: {str(error).splitlines()[0]}")
            logger.warning("%s: decomposition failed, %s", name, failures[-1])
            continue
        return (right.T, values, left.T) if wide else (left, values, right)
    raise BasisError(f"{name}: no solver could compute its basis ({'; '.join(failures)}).")


def _of_tall(tall: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of a matrix with at least as many rows as columns: LAPACK is four times slower on its transpose."""
    if tall.shape[0] < TALL * tall.shape[1]:
        return tuple(torch.linalg.svd(tall, full_matrices=False))
    tower, triangle = torch.linalg.qr(tall)
    left, values, right = torch.linalg.svd(triangle, full_matrices=False)
    return tower @ left, values, right
