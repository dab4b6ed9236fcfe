"""LoRA factors of an update: exact, or the best of a smaller rank with an error known beforehand.

dW = M P with P (r, in) of orthonormal rows. Exact: B = M, A = P. With M = U S Q^T, the singular values of dW are those
of M, so B = U_k S_k, A = Q_k^T P is the best rank-k factorisation of dW in every layer that shares M, and it misses
dW by sqrt(sum of s_i^2, i > k) in the Frobenius norm: one decomposition a group, none a layer.
An SVFT update U T V^T is the same with T for M and V^T for P, and U, whose columns are orthonormal, before B.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pica.basis import full_precision
from pica.errors import AdapterFileError, ConfigError, RankError
from pica.tuners.base.layer import SharedLayer


@dataclass(frozen=True)
class GroupRow:
    """One line of the error table: layers that share a matrix and use equally many of its columns.

    Attributes:
        group: Key of the shared matrix.
        layers: Number of layers.
        out_features: Rows of the matrix.
        rank: Directions that the layers use.
        kept: Rank of the exported update.
        norm: Frobenius norm of each layer's update.
        error: Frobenius norm of what the export leaves out, in each layer; 0 where it is exact.
    """

    group: str
    layers: int
    out_features: int
    rank: int
    kept: int
    norm: float
    error: float

    @property
    def relative(self) -> float:
        """Error as a share of the update's norm."""
        return self.error / self.norm if self.norm else 0.0


@dataclass
class SharedSpectrum:
    """Singular value decomposition of the columns of a shared M that some layers use, M = U S Q^T.

    Attributes:
        group, rank: The key of M and the columns used.
        matrix: M, (out, rank), float64, on the CPU.
        layers: Number of layers.
        left, values, right: U (out, k), S (k,), Q^T (k, rank); empty until `solve`.
    """

    group: str
    rank: int
    matrix: Tensor
    layers: int = 0
    left: Tensor = field(default_factory=lambda: torch.zeros(0))
    values: Tensor = field(default_factory=lambda: torch.zeros(0))
    right: Tensor = field(default_factory=lambda: torch.zeros(0))

    def solve(self) -> None:
        """Decompose M, in float64."""
        if self.values.numel() == 0 and self.matrix.numel():
            self.left, self.values, self.right = torch.linalg.svd(self.matrix, full_matrices=False)

    def rank_for_energy(self, energy: float) -> int:
        """Smallest k whose first k squared singular values hold the share `energy` of their sum; at least 1."""
        self.solve()
        squares = self.values.square()
        total = float(squares.sum())
        if total == 0.0:
            return 1
        # rounding in the cumulative sum must not ask for directions that hold nothing
        reached = squares.cumsum(0) >= energy * total * (1 - 1e-12)
        return int(reached.to(torch.uint8).argmax()) + 1 if bool(reached.any()) else len(squares)

    def row(self, limit: int) -> GroupRow:
        """The line of the table for an export of rank `limit`."""
        norm = float(torch.linalg.vector_norm(self.matrix))
        if limit >= self.rank:
            return GroupRow(self.group, self.layers, self.matrix.shape[0], self.rank, self.rank, norm, 0.0)
        self.solve()
        error = float(torch.linalg.vector_norm(self.values[limit:]))
        return GroupRow(self.group, self.layers, self.matrix.shape[0], self.rank, limit, norm, error)

    def factors(self, directions: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        """LoRA's A (k, in) and B (out, k) for a layer with `directions` P (rank, in), k <= `limit`."""
        if limit >= self.rank:
            return directions, self.matrix.to(directions.dtype)
        self.solve()
        left = self.left[:, :limit] * self.values[:limit]  # U_k S_k, (out, k)
        return self.right[:limit].to(directions.dtype) @ directions, left.to(directions.dtype)


def shared_spectra(layers: dict[str, SharedLayer], adapter: str) -> dict[str, SharedSpectrum]:
    """Decompose the matrices that layers share, once for each (group, rank).

    Args:
        layers: By path.
        adapter: Its name there.
    Returns:
        For each layer, by path, the matrix that it shares, cut to the columns it uses; one object a (group, rank).
    Raises:
        AdapterFileError: A matrix holds NaN or infinity.
    """
    made: dict[tuple[str, int], SharedSpectrum] = {}
    of_layer = {}
    for path, layer in layers.items():
        core = layer.method.core(adapter)
        key = (layer.group_of[adapter], core.shape[1])
        if key not in made:
            matrix = core.to(device="cpu", dtype=torch.float64)
            if not torch.isfinite(matrix).all():
                raise AdapterFileError(
                    f"The shared matrix {key[0]} of adapter {adapter!r} holds NaN or infinity: its training went wrong, "
                    "so there is nothing to export; go back to an earlier checkpoint."
                )
            made[key] = SharedSpectrum(*key, matrix)
        made[key].layers += 1
        of_layer[path] = made[key]
    return of_layer


def choose_rank(spectra: list[SharedSpectrum], rank: int | None, energy: float | None) -> int:
    """Choose the export's uniform rank, before an engine's rules.

    Args:
        spectra: The shared matrices.
        rank: The most that is asked for.
        energy: Share of every matrix's squared norm to keep.
    Returns:
        The rank of the widest layer, or less as asked.
    Raises:
        ConfigError: Both `rank` and `energy` are given, or `energy` is out of range.
        RankError: `rank` is not at least 1.
    """
    if rank is not None and energy is not None:
        raise ConfigError(f"rank={rank} and energy={energy} both choose the size of the export; give one of them.")
    full = max([1, *(s.rank for s in spectra)])
    if rank is not None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise RankError(f"rank={rank!r} must be a whole number of at least 1.")
        return min(rank, full)
    if energy is not None:
        if not 0.0 < energy <= 1.0:
            raise ConfigError(f"energy={energy} must lie above 0 and be at most 1, for instance 0.99.")
        return max(s.rank_for_energy(energy) for s in spectra)
    return full


def layer_factors(
    layer: SharedLayer, adapter: str, spectrum: SharedSpectrum, rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Write one layer's update as dW = B A.

    Args:
        layer: The adapted layer.
        adapter: Its name there.
        spectrum: The matrix that it shares.
        rank: Of the result.
        dtype: Of the result.
    Returns:
        A (rank, in) and B (out, rank), padded with zeros, contiguous, on the CPU, sharing no storage.
    Raises:
        AdapterFileError: A value does not fit `dtype`.
    """
    with full_precision(layer.frozen.device_and_dtype()[0]):
        left, directions = layer.method.frames(adapter)
        small_a, small_b = spectrum.factors(directions.detach().cpu(), rank)
        if left is not None:
            small_b = left.detach().cpu() @ small_b
        if layer.method.transposed(adapter):
            small_a, small_b = small_b.T, small_a.T
    kept = small_a.shape[0]
    a = torch.zeros(rank, layer.in_features, dtype=dtype)
    b = torch.zeros(layer.out_features, rank, dtype=dtype)
    a[:kept], b[:, :kept] = small_a.to(dtype), small_b.to(dtype)
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise AdapterFileError(
            f"{layer.path}: its update has values beyond what {str(dtype).removeprefix('torch.')} can hold; "
            "export with dtype='bfloat16' or 'float32'."
        )
    return a, b
