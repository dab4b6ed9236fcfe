"""PiCa in one layer: y = W x + M P x, from the layer's frozen directions P and a matrix M that its group shares."""

from __future__ import annotations

import hashlib
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pica.basis import Basis, BasisRequest, Side, cached_solve_basis, full_precision, solve_basis
from pica.basis.alignment import Alignment, align
from pica.basis.apply import add_product, coordinates, delta_weight
from pica.basis.fingerprint import LayerPrint, Mode, take_print
from pica.tuners.base.bank import MatrixBank
from pica.tuners.base.basis_store import Projector
from pica.tuners.base.layer import SharedLayer
from pica.tuners.base.layouts import Observed, Place
from pica.tuners.base.mixed_batch import MixedBatch
from pica.tuners.base.part import Part
from pica.tuners.pica.from_file import FROM_FILE, basis_from_file
from pica.tuners.pica.source import source_of

# Cosine above which the directions of two solutions count as the same: solvers and half precision differ by far less.
SAME_DIRECTION = 1 - 1e-4


class PicaMethod(Part):
    """What PiCa does in one layer. A projection's basis serves every adapter: a smaller rank uses its first rows.

    As a rule y += M P x. Where a basis is of the layer's output (`BasisRequest.input_side`), everything here is that of the
    transposed weight: the projector's rows are U^T (k, out), the matrix is N^T (in, rank), and y += U N x.

    Attributes:
        rank_of: {adapter: directions that it asks of this layer}.
        usable_of: {adapter: those that it was trained with, where a file says so}.
    """

    name: ClassVar[str] = "PiCa"
    remedy: ClassVar[str] = "save the adapter again from there with save_basis=True, which stores the basis"
    layer: SharedLayer

    def __init__(self, layer: SharedLayer) -> None:
        super().__init__(layer)
        self.rank_of: dict[str, int] = Observed.by(layer.place_changed)
        self.usable_of: dict[str, int] = Observed.by(layer.place_changed)

    def key_of(self, name: str) -> str:
        """Key of the projector that adapter `name` uses, in the layer's store."""
        return self.layer.bases.key_of[name]

    # ---- the update --------------------------------------------------------------------------------------------

    def coordinates(self, x: Tensor, y: Tensor, names: list[str]) -> dict[str, Tensor]:
        """h = P x (..., rank): computed once for each projector that `names` use, however many adapters there are."""
        h_of = {name: self._read_by_matrix(x, y, name) for name in names if self.transposed(name)}
        names = [name for name in names if name not in h_of]
        of_key = self._coordinates(x, y, names)
        for name in names:
            h, rank = of_key[self.key_of(name)], self.usable_rank(name)
            h_of[name] = h[..., :rank] if rank < h.shape[-1] else h
        return h_of

    def _coordinates(self, x: Tensor, y: Tensor, names: list[str]) -> dict[str, Tensor]:
        """h (..., largest rank) for each projector that `names` use."""
        ranks: dict[str, int] = {}
        for name in names:
            key = self.key_of(name)
            ranks[key] = max(ranks.get(key, 0), self.usable_rank(name))
        return {key: self._coordinates_of(x, y, key, rank) for key, rank in ranks.items()}

    def _coordinates_of(self, x: Tensor, y: Tensor, key: str, rank: int) -> Tensor:
        """h (..., rank), or fewer where the projector has no more rows."""
        projector = self.require(key)
        if rank < projector.shape[0]:
            projector = projector[:rank]
        if self.layer.bases.side(key) == "out":
            bias = getattr(self.layer.get_base_layer(), "bias", None)
            shift = None if bias is None else projector @ bias.to(projector.dtype)  # (r,)
            return coordinates(y, projector, shift)
        if not x.is_floating_point():  # what an embedding is given
            # some embeddings multiply what they look up
            scale = getattr(self.layer.get_base_layer(), "embed_scale", 1.0)
            return (F.embedding(x, projector.T) * scale).to(y.dtype)
        return coordinates(_as_computed(x, y), projector)

    def _read_by_matrix(self, x: Tensor, y: Tensor, name: str) -> Tensor:
        """N x, (..., rank)."""
        matrix = self.layer.matrix(name)[:, : self.usable_directions(name)]
        return coordinates(_as_computed(x, y), matrix.T.to(y.device))

    def add(self, y: Tensor, h: Tensor, name: str, *, in_place: bool) -> Tensor:
        """y + M h, or y + U h."""
        if self.transposed(name):
            return add_product(y, h, self.first_directions(name).T, in_place=in_place)
        matrix = self.layer.matrix(name)
        if h.shape[-1] < matrix.shape[1]:
            matrix = matrix[:, : h.shape[-1]]
        return add_product(y, h, matrix.to(y.device), in_place=in_place)

    def add_mixed(self, x: Tensor, y: Tensor, batch: MixedBatch, *, in_place: bool) -> Tensor:
        """h is computed once for the whole batch; see `MixedBatch` for what its layers share."""
        parts = batch.parts(self.layer)
        if not parts:
            return y
        ranks: dict[str, int] = {}
        for part in parts:
            if not self.request(part.key).input_side:
                ranks[part.key] = max(ranks.get(part.key, 0), part.rank)
        h_of = {key: self._coordinates_of(x, y, key, rank) for key, rank in ranks.items()}  # before y changes
        # in place on our own copy at least: an output that nobody else holds needs none
        if torch.is_grad_enabled() or not in_place:
            y = y.clone(memory_format=torch.contiguous_format)
        for part in parts:
            if self.request(part.key).input_side:
                h = batch.read(self.layer, part, x.to(y.dtype))
                y = add_product(y, h, self.require(part.key)[: part.rank].T, in_place=not torch.is_grad_enabled())
                continue
            h = h_of[part.key]
            batch.add(self.layer, part, y, h if h.shape[-1] == part.rank else h[..., : part.rank])
        return y

    def place_of(self, name: str) -> Place:
        """Where adapter `name` is in this layer, for mixed batches; solves what they need."""
        if not self.layer.frozen.is_deferred():
            self.require(self.key_of(name))
        return Place(self.key_of(name), self.layer.group_of[name], self.usable_rank(name))

    # ---- the factors of the change of W ------------------------------------------------------------------------

    def directions(self, key: str, weight: Tensor) -> Tensor:
        """P as the forward pass uses it, (r, in), float32 or float64."""
        self.require(key)
        return self.layer.bases.get(key).directions(weight)

    def update(self, name: str) -> Tensor:
        """M P, or U N, (out, in)."""
        weight = self.layer.frozen.read()
        rows = self.directions(self.key_of(name), weight)
        rank = self.usable_rank(name)
        with full_precision(weight.device):
            delta = delta_weight(self.layer.matrix(name).detach()[:, :rank].to(weight.device), rows[:rank])
        return delta.T if self.transposed(name) else delta

    def transposed(self, name: str) -> bool:
        return self.request(self.key_of(name)).input_side

    def core(self, name: str) -> Tensor:
        return self.layer.matrix(name).detach()[:, : self.usable_rank(name)]

    def frames(self, name: str) -> tuple[Tensor | None, Tensor]:
        rows = self.directions(self.key_of(name), self.layer.frozen.read())
        return None, rows[: self.usable_rank(name)]

    # ---- the directions of an adapter --------------------------------------------------------------------------

    def usable_rank(self, name: str) -> int:
        """Directions that this layer gives the adapter: its rank, or fewer where the weight has no more."""
        # A new adapter leaves out what only rounding has left of the weight; one from a file uses what it was trained with.
        key, rank = self.key_of(name), self.rank_of[name]
        rows = self.layer.bases.rows(key)
        if rows is None:
            return rank
        return min(rank, len(rows), self.usable_of.get(name, self.layer.bases.clear(key)))

    def usable_directions(self, name: str) -> int:
        self.require(self.key_of(name))
        return self.usable_rank(name)

    def first_directions(self, name: str) -> Tensor:
        """The rows of the projector that the adapter uses; itself where that is all of them: experts may be thousands."""
        projector = self.require(self.key_of(name))
        usable = self.usable_rank(name)
        return projector if usable == len(projector) else projector[:usable]

    def direction_count(self, name: str) -> int:
        return self.rank_of[name]

    def group_rank(self, name: str) -> int:
        return self.layer.matrix(name).shape[1]

    def same_basis(self, name: str, other: str) -> bool:
        """Whether both have the same directions, up to the smaller of their ranks."""
        rank = min(self.rank_of[name], self.rank_of[other])
        same = self.key_of(name) == self.key_of(other)
        return same and min(rank, self.usable_rank(name)) == min(rank, self.usable_rank(other))

    # ---- verification ------------------------------------------------------------------------------------------

    def take_print(self, name: str, mode: Mode, probes: int) -> LayerPrint:
        projector, key = self.first_directions(name), self.key_of(name)
        request = self.request(key)
        source = source_of(self.layer, request)
        return take_print(
            projector,
            source.weight.T if request.input_side else source.weight,
            self.layer.bases.side(key),
            rank=self.rank_of[name],
            projection=request.projection,
            solver=self.layer.bases.solver(key),
            mode=mode,
            probes=probes,
            origin=source.origin,
        )

    def align_print(self, name: str, trained: LayerPrint, mode: Mode) -> tuple[Alignment, torch.dtype, str]:
        key = self.key_of(name)
        projector = self.require(key)
        weight, _, origin = source_of(self.layer, self.request(key))
        weight = weight.T if self.transposed(name) else weight
        side = self.layer.bases.side(key)

        def gains() -> Tensor:
            used = Projector(projector[: trained.rank].float(), side, "", trained.rank)
            return (used.directions(weight) @ weight.float().T).norm(dim=1)

        return align(trained, mode, projector, weight, side, gains), weight.dtype, origin

    def limit(self, name: str, usable: int) -> None:
        self.usable_of[name] = usable

    def turn(self, name: str, rotation: Tensor) -> None:
        self.require(self.key_of(name))
        self.layer.bases.turn(name, rotation)

    # ---- the life of a basis -----------------------------------------------------------------------------------

    def attach(self, name: str, request: BasisRequest, basis: Basis | None) -> None:
        """Take adapter `name` in; `basis` is None where the layer has one that is large enough, or on the meta device."""
        bases, key = self.layer.bases, projection_key(request)
        self.rank_of[name] = request.rank
        known, held = bases.requests.get(key), bases.rows(key)
        if known is not None and known.rank < request.rank and held is not None and not held.is_meta:
            if basis is not None and self._goes_on_from(key, basis):
                # Adapters that were trained with the first rows keep exactly those, whatever orientation they have.
                basis.projector[: len(held)] = held.to(basis.projector)
            else:  # likewise where the adapter is to bring its own
                key = bases.fresh_key(key)
                known = None
        bases.key_of[name] = key
        if known is None or known.rank < request.rank:
            bases.requests[key] = request
        if basis is not None:
            bases.put(key, Projector.of(basis))

    def _goes_on_from(self, key: str, basis: Basis) -> bool:
        """Whether the first directions of `basis` are those of `key`, up to signs."""
        # They are not where equal singular values let each solution choose its own.
        known = self.require(key).to(basis.projector)
        if self.layer.bases.side(key) != basis.side or len(known) > basis.rank:
            return False
        cosines = F.cosine_similarity(known, basis.projector[: len(known)], dim=1, eps=1e-30).abs()
        return bool((cosines >= SAME_DIRECTION).all())

    def request(self, key: str) -> BasisRequest:
        """What was asked for under `key`."""
        return self.layer.bases.requests[key]

    def require(self, key: str) -> Tensor:
        """The projector's rows, solved now if the weights were on the meta device when the adapter was added."""
        rows = self.layer.bases.rows(key)
        if rows is None or rows.is_meta:
            self.layer.bases.put(key, self._solve(self.request(key)))
            rows = cast(Tensor, self.layer.bases.rows(key))
        return rows

    def _solve(self, request: BasisRequest) -> Projector:
        if request.file is not None:
            return Projector.of(basis_from_file(self.layer, request))
        source = source_of(self.layer, request, check=True)
        return Projector.of(
            cached_solve_basis(
                source.weight,
                request.rank,
                projection=request.projection,
                side=source.side,
                seed=request.seed,
                name=request.name,
                solve=solve_basis,
            )
        )

    def forget_bases(self) -> None:
        bases = self.layer.bases
        bases.forget([k for k, r in bases.requests.items() if r.checkpoint is None and not self._from_file(k)])

    def _from_file(self, key: str) -> bool:
        return self.layer.bases.rows(key) is not None and self.layer.bases.solver(key) == FROM_FILE

    def solve_again(self) -> None:
        if self.layer.bases.forgotten:
            for key in list(self.layer.bases.requests):
                self.require(key)
            self.layer.bases.forgotten = False

    def forget_choices(self, name: str) -> None:
        self.usable_of.pop(name, None)

    def delete(self, name: str) -> None:
        for known in (self.rank_of, self.usable_of, self.layer.bases.key_of):
            known.pop(name, None)
        self.layer.bases.drop_unused()

    def describe(self) -> str:
        return f"pica={ {name: self.rank_of[name] for name in sorted(self.rank_of)} }"

    # ---- bases that a file brings ------------------------------------------------------------------------------

    def stored_basis(self, name: str) -> Tensor:
        """The projector, in the compute dtype, cut to what the adapter uses."""
        return self.first_directions(name).detach().clone().contiguous()

    def stored_basis_problem(self, name: str, stored: Tensor) -> str | None:
        rank, widths = self.rank_of[name], (self.layer.in_features, self.layer.out_features)
        widths = widths[1:] if self.transposed(name) else widths
        if stored.ndim != 2 or stored.shape[1] not in widths or stored.shape[0] > rank:
            return f"has shape {tuple(stored.shape)}, expected at most {rank} rows"
        return None if stored.is_floating_point() and bool(torch.isfinite(stored).all()) else "is not finite"

    def use_stored_basis(self, name: str, stored: Tensor) -> None:
        side: Side = "in" if self.transposed(name) or stored.shape[1] == self.layer.in_features else "out"
        rows = stored.to(torch.promote_types(stored.dtype, torch.float32))
        self.use(name, Projector(rows, side, FROM_FILE, len(rows)))

    def use(self, name: str, projector: Projector) -> None:
        """Give the adapter this projector; adapters with the very same one share it, others keep theirs."""
        bases = self.layer.bases
        rows = bases.placed(projector.rows)
        for key in dict.fromkeys(bases.key_of.values()):
            held = bases.rows(key)
            if held is None or held.is_meta or bases.side(key) != projector.side:
                continue
            if self.request(key).input_side != self.transposed(name):
                continue
            same = len(held) == len(rows) or len(rows) == self.rank_of[name] <= len(held)
            if same and torch.equal(held[: len(rows)].to(rows.device), rows):
                bases.key_of[name] = key
                return
        bases.put_apart(name, projector, projection_key(self.request(self.key_of(name))))


class PicaLinear(SharedLayer):
    """A frozen layer with PiCa adapters."""

    method: PicaMethod  # pyright: ignore[reportIncompatibleVariableOverride] - made by method_class
    method_class = PicaMethod
    basis_buffers = ("pica_basis_",)
    adapter_layer_names = ("pica_M",)

    @property
    def pica_M(self) -> MatrixBank:
        return self.bank


def _as_computed(x: Tensor, y: Tensor) -> Tensor:
    """`x` in the dtype of `y`: some base layers cast their input themselves."""
    return x if x.dtype == y.dtype or torch.is_autocast_enabled(x.device.type) else x.to(y.dtype)


def projection_key(request: BasisRequest) -> str:
    """Adapters with the same key share a layer's basis."""
    if request.file is not None:
        return f"{request.projection}_of_{request.digest[:12]}"
    key = f"{request.projection}_{request.seed}" if request.projection == "random" else request.projection
    if request.checkpoint is None:
        return key
    return f"{key}_of_{hashlib.sha256(request.checkpoint.encode()).hexdigest()[:12]}"
