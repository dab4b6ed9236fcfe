"""A few numbers of a basis that tell whether another one is the same, up to what can be put right.

A trained M means something only relative to its basis, and the basis is recomputed on load. Each direction's sign is
free, so is any rotation among directions of equal singular value, and another base model has other directions
altogether. A fingerprint holds, for each adapted layer, the inner products of each direction with fixed pseudo-random
vectors (probes), a few gains, the shape and how the basis came about. docs/adapter-format.md specifies it byte by byte.
"""

from __future__ import annotations

import functools
import hashlib
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pica.basis._precision import full_precision
from pica.errors import AdapterFileError

FORMAT_VERSION = 1
MAGIC = b"PICA"
LIMIT_BYTES = 65536
LIMIT_SHARE = 0.02  # of the shared matrices' bytes in float32; the larger of the two limits holds

HEADER = struct.Struct("<4sBBBBI")  # magic, version, mode, probes a direction, zero, layers
MOST_GAIN = 65504.0  # the largest float16
MOST_FIRST_GAIN = 3.0e38  # of what float32 holds
LAYER = struct.Struct("<8sIIHHBBBBf4e")  # path hash, out, in, rank, usable, dtype, solver, projection, origin, gains
NARROW_PROBES = 16  # narrow mode keeps, of this many, the probe that a direction shows most strongly in
NARROW_STEP = 0.04
WIDE_STEP = 1 / 4096
GAIN_SAMPLES = 4

DTYPES = ("float64", "float32", "bfloat16", "float16", "other")
SOLVERS = ("eigh", "subset eigh", "svd", "qr", "zero weight", "file", "other")
PROJECTION_CODES = ("principal", "minor", "random", "activation", "weighted", "gradient")
ORIGINS = (
    "",
    "a named checkpoint",
    "bnb int8",
    "bnb nf4",
    "bnb fp4",
    "torchao",
    "hqq",
    "gptq",
    "awq",
    "aqlm",
    "eetq",
    "another quantisation",
)
NAMED = ORIGINS[1]  # of a checkpoint that the configuration names
"""Whose weights a basis is of: "" the base model's own, unquantised; those of a named checkpoint; or dequantised ones."""

Mode = Literal["narrow", "wide"]


@dataclass(frozen=True)
class LayerPrint:
    """What is kept of one layer's basis.

    Attributes:
        out_features, in_features: Shape of its weight.
        rank: Directions that the adapter asked for.
        usable: Directions that the weight had.
        dtype, solver, projection: How the basis was made.
        origin: Of which weights, one of `ORIGINS`.
        gain: |W p_1|; 0 where there is no direction.
        samples: |W p_i| / |W p_1| at the directions of `sample_rows`, (4,).
        choice: Probe index of each direction, (usable, k); in wide mode simply 0..k-1.
        values: Inner product of each direction with those probes, (usable, k), float64, rounded to the format's step.
    """

    out_features: int
    in_features: int
    rank: int
    usable: int
    dtype: str
    solver: str
    projection: str
    gain: float
    samples: np.ndarray
    choice: np.ndarray
    values: np.ndarray
    origin: str = ""


def splitmix64(index: np.ndarray) -> np.ndarray:
    """The SplitMix64 generator's output at each index, uint64: the same numbers in every library and on every machine."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        z = (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


@functools.lru_cache(maxsize=64)  # the layers of a model have a handful of widths; 64 of Gemma-2B's take 40 MB
def probe_vectors(length: int, count: int) -> np.ndarray:
    """`count` vectors of +1 and -1, (count, length), float64: entry (j, k) is the top bit of SplitMix64(2^32 j + k)."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64
        z = np.arange(length, dtype=np.uint64)[None, :] + (np.arange(count, dtype=np.uint64) << np.uint64(32))[:, None]
    z = splitmix64(z)
    signs = 1.0 - 2.0 * (z >> np.uint64(63)).astype(np.float64)
    signs.setflags(write=False)  # it is shared between callers
    return signs


def sample_rows(usable: int) -> list[int]:
    """The directions whose gains are kept beside the first: evenly spread, the last included."""
    return [max(0, math.ceil(usable * (k + 1) / GAIN_SAMPLES) - 1) for k in range(GAIN_SAMPLES)]


def path_hash(path: str) -> bytes:
    return hashlib.sha256(path.encode()).digest()[:8]


def choose_mode(ranks: Sequence[int], matrix_elements: int) -> tuple[Mode, int]:
    """(mode, probes a direction) that keep the fingerprint small beside M; follows from the configuration alone."""
    limit = max(LIMIT_BYTES, LIMIT_SHARE * 4 * matrix_elements)
    room = (limit - HEADER.size - LAYER.size * len(ranks)) / max(1, sum(ranks))
    for probes in (8, 4):
        if room >= 2 * probes:
            return "wide", probes
    return "narrow", 1


def measure(projector: Tensor, weight: Tensor, side: str, count: int) -> Tensor:
    """Inner products of each direction with the first `count` probes, (rank, count), float64, on the CPU."""
    # On side "out" the directions are projector @ W; only W's images of the probes are formed, never the directions.
    dtype = torch.promote_types(projector.dtype, torch.float32)
    numpy_dtype = np.float64 if dtype == torch.float64 else np.float32  # of +1 and -1, either is exact
    probes = torch.from_numpy(probe_vectors(weight.shape[1], count).astype(numpy_dtype)).T  # (in, count)
    with full_precision(weight.device):
        g = probes.to(weight.device)
        if side == "out":
            g = weight.to(dtype) @ g  # (out, count)
        return (projector.to(dtype) @ g).double().cpu()


def sampled_gains(projector: Tensor, weight: Tensor, side: str) -> tuple[float, np.ndarray]:
    """(|W p_1|, the other sampled gains relative to it, (4,)) as the projector and the weight give them."""
    if projector.shape[0] == 0:
        return 0.0, np.zeros(GAIN_SAMPLES)
    with full_precision(weight.device):
        dtype = torch.promote_types(projector.dtype, torch.float32)
        rows = projector[[0, *sample_rows(projector.shape[0])]].to(dtype)
        w = weight.to(dtype)
        gains = ((rows if side == "in" else rows @ w) @ w.T).norm(dim=1).double().cpu().numpy()
    # Of minor directions the first is the least, and the others many times it: more than the file's float16 can hold.
    return float(gains[0]), np.minimum(gains[1:] / max(gains[0], 1e-300), MOST_GAIN)


def observe(projector: Tensor, weight: Tensor, side: str, count: int) -> tuple[np.ndarray, float, np.ndarray]:
    """`measure` and `sampled_gains`; where the weight's entries are so large that these overflow, made in other units."""
    with np.errstate(invalid="ignore"):
        measured, (gain, samples) = (
            measure(projector, weight, side, count).numpy(),
            sampled_gains(projector, weight, side),
        )
    if not (np.isfinite(measured).all() and np.isfinite(gain) and np.isfinite(samples).all()):
        wide = weight.cpu().double()
        peak = float(wide.abs().max())
        rows = projector.cpu().double() * (peak if side == "out" else 1.0)
        measured = measure(rows, wide / peak, side, count).numpy()
        gain, samples = sampled_gains(rows, wide / peak, side)
        gain *= peak
    return measured, min(gain, MOST_FIRST_GAIN), samples


def take_print(
    projector: Tensor,
    weight: Tensor,
    side: str,
    *,
    rank: int,
    projection: str,
    solver: str,
    mode: Mode,
    probes: int,
    origin: str = "",
) -> LayerPrint:
    """Fingerprint of one layer from its projector (rows beyond `rank` are ignored) and its weight (out, in)."""
    projector = projector[:rank]
    usable = projector.shape[0]
    if mode == "wide":
        measured, gain, samples = observe(projector, weight, side, probes)
        choice = np.tile(np.arange(probes), (usable, 1))
        values = np.clip(np.round(measured / WIDE_STEP), -32767, 32767) * WIDE_STEP
    else:
        measured, gain, samples = observe(projector, weight, side, NARROW_PROBES)
        choice = np.abs(measured).argmax(axis=1)[:, None] if usable else np.zeros((0, 1), dtype=np.int64)
        strongest = np.take_along_axis(measured, choice, axis=1)
        values = np.sign(strongest) * np.clip(np.round(np.abs(strongest) / NARROW_STEP), 0, 127) * NARROW_STEP
    dtype = str(weight.dtype).removeprefix("torch.")
    return LayerPrint(
        weight.shape[0],
        weight.shape[1],
        rank,
        usable,
        dtype if dtype in DTYPES else "other",
        solver if solver in SOLVERS else "other",
        projection,
        gain,
        samples,
        choice,
        values,
        origin if origin in ORIGINS else ORIGINS[-1],
    )


def encode(prints: Mapping[str, LayerPrint], mode: Mode, probes: int) -> bytes:
    """Bytes of the prints of all layers (by module path)."""
    parts = [HEADER.pack(MAGIC, FORMAT_VERSION, mode == "wide", probes, 0, len(prints))]
    for path in sorted(prints, key=path_hash):
        p = prints[path]
        codes = (DTYPES.index(p.dtype), SOLVERS.index(p.solver), PROJECTION_CODES.index(p.projection))
        gains = (p.gain, *(float(s) for s in p.samples))
        shape = (p.out_features, p.in_features, p.rank, p.usable)
        parts.append(LAYER.pack(path_hash(path), *shape, *codes, ORIGINS.index(p.origin), *gains))
        parts.append(_pack_wide(p, probes) if mode == "wide" else _pack_narrow(p))
    return b"".join(parts)


def _pack_wide(p: LayerPrint, probes: int) -> bytes:
    full = np.zeros((p.rank, probes), dtype="<i2")
    full[: p.usable] = np.round(p.values / WIDE_STEP)
    return full.tobytes()


def _pack_narrow(p: LayerPrint) -> bytes:
    words = np.zeros(p.rank + p.rank % 2, dtype=np.uint32)
    magnitude = np.round(np.abs(p.values[:, 0]) / NARROW_STEP).astype(np.uint32)
    words[: p.usable] = (
        (p.choice[:, 0].astype(np.uint32) << 8) | ((p.values[:, 0] < 0).astype(np.uint32) << 7) | magnitude
    )
    pairs = words[0::2] | (words[1::2] << 12)  # two 12-bit words in three bytes
    return np.stack([pairs & 255, (pairs >> 8) & 255, pairs >> 16], axis=1).astype(np.uint8).tobytes()


def encoded_size(ranks: Sequence[int], mode: Mode, probes: int) -> int:
    """Bytes of a fingerprint of layers with these ranks; known before any basis is."""
    blocks = sum(r * probes * 2 if mode == "wide" else (r + r % 2) // 2 * 3 for r in ranks)
    return HEADER.size + LAYER.size * len(ranks) + blocks


def decode(data: bytes) -> tuple[dict[bytes, LayerPrint], Mode, int]:
    """Read what `encode` has written.

    Returns:
        Prints by `path_hash`, the mode and the number of probes.
    Raises:
        AdapterFileError: Not a fingerprint, cut short, or of a later format.
    """
    try:
        magic, version, wide, probes, _, count = HEADER.unpack_from(data)
        if magic != MAGIC:
            raise AdapterFileError("The adapter's basis fingerprint is damaged (it does not begin as one).")
        if version != FORMAT_VERSION:
            raise AdapterFileError(
                f"The adapter's basis fingerprint has format {version}, this pica reads {FORMAT_VERSION}; upgrade pica."
            )
        if not (wide in (0, 1) and 1 <= probes <= NARROW_PROBES and count * LAYER.size <= len(data)):
            raise AdapterFileError("The adapter's basis fingerprint is damaged (its header makes no sense).")
        mode: Mode = "wide" if wide else "narrow"
        prints: dict[bytes, LayerPrint] = {}
        at = HEADER.size
        for _ in range(count):
            key, out, inn, rank, usable, dtype, solver, projection, origin, gain, *samples = LAYER.unpack_from(data, at)
            at += LAYER.size
            length = rank * probes * 2 if mode == "wide" else (rank + rank % 2) // 2 * 3
            block = data[at : at + length]
            if len(block) < length or usable > rank:
                raise AdapterFileError("The adapter's basis fingerprint is damaged (a layer's entry is cut short).")
            at += length
            choice, values = (_read_wide if mode == "wide" else _read_narrow)(block, rank, usable, probes)
            prints[key] = LayerPrint(
                out,
                inn,
                rank,
                usable,
                DTYPES[dtype],
                SOLVERS[solver],
                PROJECTION_CODES[projection],
                gain,
                np.asarray(samples, dtype=np.float64),
                choice,
                values,
                ORIGINS[min(origin, len(ORIGINS) - 1)],
            )
        if at != len(data):
            raise AdapterFileError("The adapter's basis fingerprint is damaged (bytes follow its end).")
    except (struct.error, IndexError) as error:
        raise AdapterFileError("The adapter's basis fingerprint is damaged (it is cut short or garbled).") from error
    return prints, mode, probes


def _read_wide(block: bytes, rank: int, usable: int, probes: int) -> tuple[np.ndarray, np.ndarray]:
    values = np.frombuffer(block, dtype="<i2").reshape(rank, probes)[:usable] * WIDE_STEP
    return np.tile(np.arange(probes), (usable, 1)), values


def _read_narrow(block: bytes, rank: int, usable: int, probes: int) -> tuple[np.ndarray, np.ndarray]:
    triples = np.frombuffer(block, dtype=np.uint8).reshape(-1, 3).astype(np.uint32)
    pairs = triples[:, 0] | (triples[:, 1] << 8) | (triples[:, 2] << 16)
    words = np.stack([pairs & 0xFFF, pairs >> 12], axis=1).reshape(-1)[:usable]
    sign = np.where(words & 0x80, -1.0, 1.0)
    return (words >> 8).astype(np.int64)[:, None], (sign * (words & 0x7F) * NARROW_STEP)[:, None]
