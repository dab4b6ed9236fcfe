"""Top-r right singular basis of a frozen weight, from the eigenvectors of its smaller Gram matrix.

Notation, in PyTorch's layout (the paper writes the transpose): W = U S V^T is the weight, (out, in); the basis is
P = V_r^T, (r, in), and an adapter adds M P to W. What the update needs is h = P x, and

    in  <= out:  h = P x           from the eigenvectors V of W^T W, (in, in)
    out <  in:   h = S^-1 U^T y0   from the eigenvectors U of W W^T, (out, out), with y0 = W x

so a basis stores one *projector* with min(in, out) columns: P itself (side "in") or S^-1 U^T (side "out").
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated as Float  # jaxtyping's, when tests/test_shapes.py looks at what runs
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pica.basis._lapack import add_lower_gram, eigenvectors
from pica.basis._precision import full_precision
from pica.basis._rounding import clear_count, readable
from pica.basis.orient import direction_signs
from pica.errors import BasisError, ConfigError, RankError

logger = logging.getLogger(__name__)

Side = Literal["in", "out"]
WantedSide = Literal["auto", "in", "out"]
PROJECTIONS = ("principal", "minor", "random")
"""Bases that a weight, or a seed, decides."""
OF_INPUTS = ("activation", "weighted")
"""Bases that were made from what a layer is given on some data."""
CALIBRATED = (*OF_INPUTS, "gradient")
"""Bases that look at data, one of them at the loss there; they come from a file (`pica.basis.file`)."""

# Upcasting a half-precision weight happens in slices of this many elements, so it never costs a full copy.
SLICE_ELEMENTS = 2**18
# Solved beyond the rank and dropped: directions just inside the cut mix with those just outside it, so cut further out.
SPARE_DIRECTIONS = 8
# Rows of a solved basis whose inner products miss the identity by more than this are solved again, another way.
ORTHOGONALITY_TOLERANCE = 1e-2
# A Gram matrix squares the spectrum: in float64 it knows a direction this much shorter than the first to 1e-6 or better, and
# 1e-8 not at all, where the weight itself knows it to 1e-15. (Of float32 weights directions below 1e-6 do not count.)
SHORT = 1e-5


@dataclass(frozen=True)
class Basis:
    """Directions of one weight, as the projector that an adapter applies.

    Attributes:
        projector: (rank, in) on side "in": orthonormal rows P. (rank, out) on side "out": S^-1 U^T. float32 or float64.
        side: Whether the projector reads the layer's input x or its bias-free output W x.
        gains: |W p_i| for each direction, (rank,), same dtype: the singular values for "principal" and "minor".
        projection: "principal", "minor" or "random".
        solver: How it was computed, for the record ("eigh", "subset eigh", "svd", "qr").
        clear: How many directions, the first ones, are the weight's own and not what rounding to its dtype has left
            (`clear_count`); None where all are.
    """

    projector: Float[Tensor, "rank width"]
    side: Side
    gains: Float[Tensor, "rank"]
    projection: str
    solver: str
    clear: int | None = None

    @property
    def rank(self) -> int:
        return self.projector.shape[0]

    @property
    def clear_rank(self) -> int:
        """How many of the directions are the weight's own."""
        return self.rank if self.clear is None else self.clear

    def directions(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "rank in"]:
        """The rows P themselves, (rank, in), for the `weight` (out, in) that the basis was solved from."""
        if self.side == "in":
            return self.projector
        with full_precision(weight.device):
            return self.projector @ weight.to(self.projector.dtype)


def max_rank(out_features: int, in_features: int, projection: str = "principal") -> int:
    """Most directions that a weight (out, in) can give: min(out, in); where its values do not limit them, all `in`."""
    return in_features if projection in ("random", "activation") else min(out_features, in_features)


def solve_basis(
    weight: Float[Tensor, "out in"],
    rank: int,
    *,
    projection: str = "principal",
    side: WantedSide = "auto",
    seed: int = 0,
    name: str = "weight",
) -> Basis:
    """Basis of `weight`: `rank` directions of its input space, or as many as it has.

    float16 and bfloat16 weights are solved in float32, others in their own precision, on the weight's device. When a
    solver fails there (or gives rows that are not orthonormal) a full SVD is tried, then the CPU; the log says so.

    Args:
        weight: Frozen weight, (out, in), a float dtype, finite, not on the meta device; never modified.
        rank: Directions wanted, 1 <= rank <= `max_rank`.
        projection: "principal": the top right singular directions (the paper's U_r). "minor": the last ones that carry
            any energy, the very last first. "random": seeded orthonormal rows that ignore the weight's values.
        side: "in" or "out" forces where the projector acts; "auto" takes the side with fewer features, unless that is
            the output and some directions are so short there that its rounding would drown them.
        seed: For "random": with `name` and the shape it determines the rows, on every platform.
        name: The layer, for messages (and for "random").

    Returns:
        At most `rank` directions: those with a vanishing singular value are dropped, so a zero weight gives rank 0.
        Those that only rounding to `weight`'s dtype has left are there, but beyond the `clear` ones. Each row of P has its
        largest entry positive (`direction_signs`).

    Raises:
        BasisError: `weight` holds NaN or infinity, is on the meta device or has no float dtype.
        RankError: `rank` is out of range.
        ConfigError: unknown `projection` or `side`.
    """
    _check(weight, rank, projection, side, name)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    with full_precision(weight.device):
        scale = magnitude(weight, name)
        if projection == "random":
            return _random_basis(weight, rank, dtype, seed, name)
        if scale == 0.0:
            return _empty(weight, dtype, projection, side)
        # Squares of float32 entries outside this range overflow or vanish; scaling costs a copy, so only there.
        unit = weight / scale if not 1e-12 < scale < 1e12 else weight
        scale = 1.0 if unit is weight else scale
        basis = _solve_with_fallbacks(unit, rank, projection, side, dtype, name, scale)
        if unit is weight:
            return basis
        projector = basis.projector if basis.side == "in" else basis.projector / scale
        return replace(basis, projector=projector, gains=basis.gains * scale)


def working_bytes(shape: Sequence[int], rank: int) -> int:
    """Estimate the peak memory of solving a float32 (or half precision) weight.

    That is the Gram matrix at first; later the directions, twice in float64, their images and a slice of the weight.

    Args:
        shape: Of the weight, (out, in).
        rank: Number of directions.
    Returns:
        Bytes, the weight not counted.
    """
    short, long, count = min(shape), max(shape), min(rank + SPARE_DIRECTIONS, *shape)
    gram = 4 * short**2 + 4 * count * short
    finish = 2 * 8 * count * short + 4 * count * long + 8 * SLICE_ELEMENTS
    return max(gram, finish)


def _check(weight: Tensor, rank: int, projection: str, side: str, name: str) -> None:
    if projection in CALIBRATED:
        raise BasisError(
            f"{name}: the weight alone does not give projection={projection!r}; name the basis that was made in basis_from."
        )
    if projection not in PROJECTIONS:
        raise ConfigError(f"{name}: projection={projection!r} is unknown; use one of {', '.join(PROJECTIONS)}.")
    if side not in ("auto", "in", "out"):
        raise ConfigError(f"{name}: side={side!r} is unknown; use 'auto', 'in' or 'out'.")
    if weight.ndim != 2 or not weight.is_floating_point():
        raise BasisError(f"{name}: a basis needs a float matrix (out, in), got {weight.dtype} {tuple(weight.shape)}.")
    if weight.is_meta:
        raise BasisError(f"{name}: the weight is on the meta device; load the base model before solving its basis.")
    limit = max_rank(weight.shape[0], weight.shape[1], projection)
    if not 1 <= rank <= limit:
        raise RankError(f"{name}: rank={rank} is outside 1..{limit} for a weight of shape {tuple(weight.shape)}.")


def magnitude(weight: Tensor, name: str) -> float:
    """Largest |entry|; raises where one is not finite. `aminmax` carries NaN through and needs no mask."""
    if weight.numel() == 0:
        return 0.0
    low, high = (float(v) for v in torch.aminmax(weight))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise BasisError(
            f"{name}: the frozen weight holds NaN or infinity, so it has no basis. Check the base model's files, "
            "or leave this layer out with exclude_modules."
        )
    return max(abs(low), abs(high))


def _empty(weight: Tensor, dtype: torch.dtype, projection: str, side: str) -> Basis:
    resolved: Side = _smaller_side(weight) if side == "auto" else "out" if side == "out" else "in"
    columns = weight.shape[1] if resolved == "in" else weight.shape[0]
    none = torch.zeros(0, columns, dtype=dtype, device=weight.device)
    return Basis(none, resolved, none.new_zeros(0), projection, "zero weight")


def _solve_with_fallbacks(
    w: Tensor, rank: int, projection: str, side: str, dtype: torch.dtype, name: str, scale: float = 1.0
) -> Basis:
    attempts: list[tuple[Callable[..., Basis], torch.device]] = [(_from_gram, w.device), (_from_svd, w.device)]
    if w.device.type != "cpu":
        attempts += [(_from_gram, torch.device("cpu")), (_from_svd, torch.device("cpu"))]
    failures: list[str] = []
    for solve, device in attempts:
        try:
            basis = solve(w.to(device), rank, projection, side, dtype, scale)
        except (RuntimeError, TypeError, np.linalg.LinAlgError) as error:  # TypeError: no float64 on this device
            failures.append(f"{solve.__name__[6:]} on {device}: {str(error).splitlines()[0]}")
            logger.warning("%s: basis by %s failed, trying another way", name, failures[-1])
            continue
        return replace(basis, projector=basis.projector.to(w.device), gains=basis.gains.to(w.device))
    raise BasisError(f"{name}: no solver could compute its basis ({'; '.join(failures)}).")


def _smaller_side(w: Tensor) -> Side:
    return "in" if w.shape[1] <= w.shape[0] else "out"


def _gram(w: Tensor, side: Side, dtype: torch.dtype) -> Tensor:
    """W^T W (side "in") or W W^T (side "out") in `dtype`, upcasting slice by slice. On a CPU only its lower triangle."""
    summed_dim, kept = (0, w.shape[1]) if side == "in" else (1, w.shape[0])
    on_cpu = w.device.type == "cpu"
    total = torch.zeros(kept, kept, dtype=dtype, device=w.device)
    for part in _slices(w, summed_dim, dtype):
        rows = part if side == "in" else part.T  # (summed, kept): total += rows^T rows
        if on_cpu:
            add_lower_gram(total, rows)
        else:
            total.addmm_(rows.T, rows)
    return total


def _slices(w: Tensor, dim: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """`w` in `dtype`, in parts along `dim` of which each is a small copy; as it is where it needs no copy."""
    plain = w.is_contiguous() or w.T.is_contiguous()
    if w.dtype == dtype and (plain or w.device.type != "cpu"):
        yield w
        return
    for part in w.split(max(1, SLICE_ELEMENTS // w.shape[1 - dim]), dim=dim):
        yield part.to(dtype).contiguous()


def leading_eigenvectors(gram: Tensor, count: int, smallest: bool) -> tuple[Tensor, str]:
    """(count, n) eigenvectors as rows, of the largest eigenvalues in falling order (or smallest in rising order)."""
    # reads the lower triangle of `gram` (n, n), and may overwrite all of it
    n = gram.shape[0]
    if gram.device.type == "cpu" and 2 * count <= n:
        # LAPACK's MRRR for a part of the spectrum: up to three times faster than all of it, and orthogonal in clusters.
        first = 0 if smallest else n - count
        rows, solver = eigenvectors(gram, first, first + count - 1), "subset eigh"
    else:
        _, all_vectors = torch.linalg.eigh(gram, UPLO="L")
        rows, solver = (all_vectors[:, :count] if smallest else all_vectors[:, n - count :]).T, "eigh"
    return (rows if smallest else rows.flip(0)).contiguous(), solver


def _from_gram(w: Tensor, rank: int, projection: str, side: str, dtype: torch.dtype, scale: float = 1.0) -> Basis:
    """Always from the smaller Gram matrix; `side` only says in which form the projector is wanted."""
    solved_side = _smaller_side(w)
    if projection == "minor":
        # A Gram matrix squares the spectrum: the small singular values need double precision to be told apart, and
        # all of them are wanted, since only then is it known which is the last that carries energy.
        gram = _gram(w, solved_side, torch.float64)
        rows, solver = leading_eigenvectors(gram, gram.shape[0], smallest=True)
    else:
        gram = _gram(w, solved_side, dtype)
        rows, solver = leading_eigenvectors(gram, min(rank + SPARE_DIRECTIONS, gram.shape[0]), smallest=False)
    del gram
    eye = torch.eye(rows.shape[0], dtype=rows.dtype, device=w.device)
    if not float((rows @ rows.T - eye).abs().max()) <= ORTHOGONALITY_TOLERANCE:
        raise RuntimeError("the eigenvectors are not orthonormal")
    basis = _finish(w, scale, rows, rank, solved_side, side, dtype, projection, solver)
    short = dtype == torch.float64 and bool((basis.gains < SHORT * torch.linalg.matrix_norm(w)).any())
    return _from_svd(w, rank, projection, side, dtype, scale) if short else basis


def _from_svd(w: Tensor, rank: int, projection: str, side: str, dtype: torch.dtype, scale: float = 1.0) -> Basis:
    solved_side = "in" if dtype == torch.float64 else _smaller_side(w)  # S^-1 U^T W would lose what is short
    left, _, right = torch.linalg.svd(w.to(dtype), full_matrices=False)
    rows = right if solved_side == "in" else left.T
    rows = rows.flip(0) if projection == "minor" else rows[:rank]
    return _finish(w, scale, rows.contiguous(), rank, solved_side, side, dtype, projection, "svd")


def _finish(
    w: Tensor,
    scale: float,
    rows: Tensor,
    rank: int,
    solved_side: Side,
    side: str,
    dtype: torch.dtype,
    projection: str,
    solver: str,
) -> Basis:
    """Measure each direction's gain, drop the vanishing ones, fix signs, and form the projector of `side`.

    Args:
        w: The weight over `scale`, (out, in).
        scale: What it was divided by.
        rows: Right singular vectors, (k, in), where `solved_side` is "in"; left ones, (k, out), where it is "out".
        rank: How many to keep at most.
        solved_side: Which they are.
        side: In which form the projector is wanted; "auto" decides by the gains.
        dtype: Of the result, and what the weight itself resolves.
        projection: "principal" or "minor".
        solver: Who found them.
    Returns:
        The basis; its gains are those of `w`, not of the weight.
    """
    # |W v| and |W^T u| are accurate to eps * |W|, where the square root of an eigenvalue is only to sqrt(eps) * |W|.
    rows = _orthonormal(rows.double())
    image, products = _images(w, rows, solved_side, dtype)  # W v: (k, out), or W^T u: (k, in)
    if projection == "principal" and not (solver == "svd" and dtype == torch.float64):  # which has done that
        rows = _separate(rows, image, products)
    few = image.split(max(1, SLICE_ELEMENTS // image.shape[1]))  # a norm in another dtype copies what it is of
    gains = torch.cat([torch.linalg.vector_norm(part, dim=1, dtype=rows.dtype) for part in few])
    floor = max(w.shape) * torch.finfo(dtype).eps * float(gains.max())  # `dtype`: what the weight itself resolves
    keep = (gains > floor).nonzero().squeeze(1)[:rank]
    if len(keep) and int(keep[-1]) + 1 == len(keep):  # the first ones, as always but for "minor": views
        rows, image, gains = rows[: len(keep)], image[: len(keep)], gains[: len(keep)].unsqueeze(1)
    else:
        rows, image, gains = rows[keep], image[keep], gains[keep].unsqueeze(1)
    lengths = gains.squeeze(1)
    clear = clear_count(w, lengths) if projection == "principal" else None
    resolved: Side = "in" if side == "in" or (side == "auto" and not readable(w, scale, lengths)) else "out"
    # P = V^T = S^-1 U^T W; a positive factor leaves its signs alone
    signs = direction_signs(rows if solved_side == "in" else image).unsqueeze(1)
    # `image` is divided in place: it can be the largest thing in memory
    if resolved == "in":
        projector = rows * signs if solved_side == "in" else image.mul_(signs / gains)
    else:  # S^-1 U^T, U^T = S^-1 V^T W^T
        projector = rows * (signs / gains) if solved_side == "out" else image.mul_(signs / gains**2)
    return Basis(projector.to(dtype).contiguous(), resolved, lengths.to(dtype), projection, solver, clear)


def _orthonormal(rows: Tensor) -> Tensor:
    """Rows that are orthonormal to float32 rounding, made so to float64 rounding (Cholesky QR)."""
    factor = torch.linalg.cholesky(rows @ rows.T)
    return torch.linalg.solve_triangular(factor, rows, upper=False)


def _separate(rows: Tensor, image: Tensor, products: Tensor) -> Tensor:
    """Rotate the directions within their span so that their images are orthogonal, in falling order of length.

    A float32 Gram matrix tells two directions apart only to eps * (s_1 / s_i)^2 over their relative gap, so neighbours
    come out mixed, differently on each device. The span is far more accurate than its directions, and within it the
    problem is (k, k): small enough for float64.

    Args:
        rows: The directions, (k, n), float64.
        image: Their images, (k, m); rotated in place.
        products: Inner products of the images, (k, k), float64.
    Returns:
        The rotated directions.
    """
    rotation = torch.linalg.eigh(products)[1].flip(1).T  # (k, k), rows: new directions in terms of the old
    for part in image.split(max(1, SLICE_ELEMENTS // len(image)), dim=1):
        part.copy_(rotation @ part.to(rotation.dtype))
    return rotation @ rows


def _images(w: Tensor, rows: Tensor, side: Side, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Map directions through the weight, slice by slice, so that nothing else is as large as their images.

    Returns:
        rows W^T (side "in": images W v) or rows W (side "out"), rounded to `dtype`; and their inner products, (k, k), not
        rounded, in the dtype of `rows`.
    """
    dim, kept = (0, w.shape[0]) if side == "in" else (1, w.shape[1])
    images, products = rows.new_empty(len(rows), kept, dtype=dtype), rows.new_zeros(len(rows), len(rows))
    at = 0
    for part in _slices(w, dim, rows.dtype):
        count = part.shape[dim]
        image = rows @ (part.T if side == "in" else part)
        products.addmm_(image, image.T)
        images[:, at : at + count] = image
        at += count
    return images, products


def _random_basis(weight: Tensor, rank: int, dtype: torch.dtype, seed: int, name: str) -> Basis:
    """Orthonormal rows from Gram-Schmidt of Gaussian ones, so that the rows for a smaller rank come first."""
    # numpy's legacy generator is frozen by its maintainers: the same numbers in every version and on every platform
    columns = weight.shape[1]
    digest = hashlib.sha256(f"{seed}\n{name}\n{columns}".encode()).digest()
    generator = np.random.RandomState(np.frombuffer(digest[:16], dtype="<u4"))
    gaussian = torch.from_numpy(generator.standard_normal((rank, columns)))
    rows = torch.linalg.qr(gaussian.T)[0].T  # (rank, in); QR leaves the signs open
    rows = (rows * direction_signs(rows).unsqueeze(1)).contiguous().to(device=weight.device, dtype=dtype)
    gains = _images(weight, rows, "in", dtype)[0].norm(dim=1)
    return Basis(rows, "in", gains, "random", "qr")
