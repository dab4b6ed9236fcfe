"""`PicaLinear`: one adapted layer. It owns its frozen basis and refers to the shared matrices in the bank."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pica.basis import Basis, BasisRequest, Side, WantedSide, cached_solve_basis, full_precision, solve_basis
from pica.basis.apply import add_product, coordinates, delta_weight
from pica.basis.checkpoint import read_tensor
from pica.basis.fingerprint import NAMED, Alignment, LayerPrint, Mode, align, take_print
from pica.errors import ConfigError
from pica.tuners.base.bank import PicaBank
from pica.tuners.base.layer import AdaptedLinear, lasting
from pica.tuners.base.mixed_batch import MixedBatch
from pica.tuners.base.sharding import whole

# A bias this many times larger than the layer's response to a unit input drowns that response when the output is
# rounded to half precision, so the projector then reads the input although it is the wider side.
BIAS_LIMIT = 4.0

# Cosine above which the directions of two solutions count as the same: solvers and half precision differ by far less.
SAME_DIRECTION = 1 - 1e-4

# A checkpoint's weight that differs by more than this share of its norm from the layer's own is not the one that was
# quantised: int8 differs by 1%, NF4 by 9%, FP4 by 13%, another model's weight by 140%.
FOREIGN_WEIGHT = 0.6
FROM_FILE = "file"  # the solver of a basis that came with an adapter


@dataclass(frozen=True)
class _Made:
    """How a projection's projector came about: its side, its solver, and how many of its rows a new adapter uses."""

    side: Side
    solver: str
    clear: int


class PicaLinear(AdaptedLinear):
    """A frozen linear layer (or Conv1D) y = W x + b with PiCa updates: y + M P x for each active adapter.

    State of an adapter in a layer: its group (which M in the bank), its rank here, its projection. The basis of a
    projection serves every adapter: a smaller rank uses its first rows.
    """

    method: ClassVar[str] = "PiCa"
    stores_basis: ClassVar[bool] = True
    mismatch_remedy: ClassVar[str] = "save the adapter again from there with save_basis=True, which stores the basis"
    adapter_layer_names = ("pica_M",)
    # plain dicts keyed by adapter name: PEFT's delete_adapter and name listing look into them
    other_param_names = ("pica_group", "r", "pica_projection", "pica_usable")

    def __init__(self, base_layer: nn.Module, bank: PicaBank, name: str, root: nn.Module | None = None) -> None:
        super().__init__(base_layer, bank, name, root)
        self.r: dict[str, int] = {}
        self.pica_projection: dict[str, str] = {}
        self.pica_usable: dict[str, int] = {}  # of adapters that were trained with as many directions as a file says
        self.requests: dict[str, BasisRequest] = {}  # what each projection was asked for, to solve it later
        self._made: dict[str, _Made] = {}

    @property
    def pica_M(self) -> PicaBank:
        return self.bank

    # ---- adapters ----------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, *, group: str, request: BasisRequest, basis: Basis | None) -> None:
        """Attach adapter `name`; `basis` is None where the layer has one that is large enough, or on the meta device."""
        projection = projection_key(request)
        self.pica_group[name] = group
        self.r[name] = request.rank
        self.bank.matrices(name).layers[self.pica_name] = self
        known, known_rows = self.requests.get(projection), self.projector(projection)
        if known is not None and known.rank < request.rank and known_rows is not None and not known_rows.is_meta:
            if basis is not None and self._goes_on_from(projection, basis):
                # Adapters that were trained with the first rows keep exactly those, whatever orientation they have.
                basis.projector[: len(known_rows)] = known_rows.to(basis.projector)
            else:  # likewise where the adapter is to bring its own
                projection = self._unused_key(projection)
                known = None
        self.pica_projection[name] = projection
        if known is None or known.rank < request.rank:
            self.requests[projection] = request
        if basis is not None:
            self.install_basis(projection, basis)

    def _goes_on_from(self, projection: str, basis: Basis) -> bool:
        """Whether the first directions of `basis` are those of `projection`, up to signs.

        They are not where equal singular values let each solution choose its own.
        """
        known = self.require_projector(projection).to(basis.projector)
        if self.side(projection) != basis.side or len(known) > basis.rank:
            return False
        first = basis.projector[: len(known)]
        cosines = F.cosine_similarity(known, first, dim=1, eps=1e-30).abs()
        return bool((cosines >= SAME_DIRECTION).all())

    def _unused_key(self, projection: str) -> str:
        return next(f"{projection}_{i}" for i in range(2, 10_000) if f"{projection}_{i}" not in self.requests)

    def install_basis(self, projection: str, basis: Basis) -> None:
        """Make `basis` the one that adapters of `projection` use, in the layer's compute dtype on its device."""
        # The projector is derived from the base weight, so no state dict holds it; `save_basis` stores it on request.
        self.register_buffer(buffer_name(projection), self._placed(basis.projector), persistent=False)
        clear = basis.rank if basis.clear is None else basis.clear
        self._made[projection] = _Made(basis.side, basis.solver, clear)
        self.frozen.note()

    def _placed(self, projector: Tensor) -> Tensor:
        device, dtype = self.frozen.device_and_dtype()
        if device.type == "meta" and not projector.is_meta:
            device = torch.device("cpu")  # another process solved it, and this one is still to receive its weights
        return lasting(projector.to(device=device, dtype=dtype))

    def use_own_basis(self, name: str, basis: Basis) -> None:
        """Give adapter `name` this basis; others that used the same one before keep theirs."""
        projection = self.pica_projection[name]
        if any(p == projection for other, p in self.pica_projection.items() if other != name):
            fresh = self._unused_key(projection)
            self.requests[fresh] = self.requests[projection]
            self.pica_projection[name] = projection = fresh
        self.install_basis(projection, basis)

    def stored_basis(self, adapter_name: str) -> Tensor:
        """The projector, in the compute dtype, cut to what the adapter uses."""
        return self.first_directions(adapter_name).detach().clone().contiguous()

    def stored_basis_problem(self, adapter_name: str, stored: Tensor) -> str | None:
        rank = self.r[adapter_name]
        if stored.ndim != 2 or stored.shape[1] not in (self.in_features, self.out_features) or stored.shape[0] > rank:
            return f"has shape {tuple(stored.shape)}, expected at most {rank} rows"
        return None if stored.is_floating_point() and bool(torch.isfinite(stored).all()) else "is not finite"

    def use_stored_basis(self, adapter_name: str, stored: Tensor) -> str:
        """Give the adapter a basis that a file brought; adapters with the very same one share it.

        Returns:
            The key of the basis that it had until now. That is kept, for whoever has to go back to it, until
            `drop_unused_bases`.
        """
        side: Side = "in" if stored.shape[1] == self.in_features else "out"
        projector = stored.to(torch.promote_types(stored.dtype, torch.float32))
        return self.use_shared_basis(
            adapter_name, Basis(projector, side, projector.new_zeros(0), "principal", FROM_FILE)
        )

    def use_shared_basis(self, name: str, basis: Basis) -> str:
        """As `use_stored_basis`, with a basis that is one already."""
        before = self.pica_projection[name]
        rows = self._placed(basis.projector)
        for key in dict.fromkeys(self.pica_projection.values()):
            held = self.projector(key)
            if held is None or held.is_meta or self.side(key) != basis.side:
                continue
            same = len(held) == len(rows) or len(rows) == self.r[name] <= len(held)
            if same and torch.equal(held[: len(rows)].to(rows.device), rows):
                self.pica_projection[name] = key
                return before
        fresh = self._unused_key(projection_key(self.requests[before]))
        self.requests[fresh] = self.requests[before]
        self.pica_projection[name] = fresh
        self.install_basis(fresh, basis)
        return before

    def go_back_to_basis(self, adapter_name: str, before: str) -> None:
        self.pica_projection[adapter_name] = before

    def limit_basis(self, name: str, usable: int) -> None:
        self.pica_usable[name] = usable

    def forget_choices(self, adapter_name: str) -> None:
        self.pica_usable.pop(adapter_name, None)

    def drop_unused_bases(self) -> None:
        used = set(self.pica_projection.values())
        for key in [key for key in self.requests if key not in used]:
            del self.requests[key]
            self._made.pop(key, None)
            if self.projector(key) is not None:
                delattr(self, buffer_name(key))

    def forget_bases(self) -> None:
        for key, request in self.requests.items():
            if request.checkpoint is None and key in self._made and self.solver(key) != FROM_FILE:
                delattr(self, buffer_name(key))
                del self._made[key]
                self._bases_forgotten = True

    def solve_again(self) -> None:
        if self._bases_forgotten:
            for key in list(self.requests):
                self.require_projector(key)
            self._bases_forgotten = False

    def turn_basis(self, name: str, rotation: Tensor) -> None:
        """Replace the first rows P of adapter `name`'s basis by R P; `rotation` R is (k, k), orthogonal."""
        projection = self.pica_projection[name]
        projector = self.require_projector(projection)
        wide = projector.to(torch.promote_types(projector.dtype, torch.float32)).clone()
        count = rotation.shape[0]
        with full_precision(wide.device):
            wide[:count] = rotation.to(wide) @ wide[:count]
        made = self._made[projection]
        self.use_own_basis(name, Basis(wide, made.side, wide.new_zeros(0), "principal", made.solver, made.clear))

    def side(self, projection: str) -> Side:
        """Which side the projector reads: the input x ("in") or the bias-free output ("out")."""
        return self._made[projection].side

    def solver(self, projection: str) -> str:
        return self._made[projection].solver

    def projector(self, projection: str) -> Tensor | None:
        return getattr(self, buffer_name(projection), None)

    def require_projector(self, projection: str) -> Tensor:
        """The projector, solved now if the weights were on the meta device when the adapter was added."""
        projector = self.projector(projection)
        if projector is None or projector.is_meta:
            request = self.requests[projection]
            weight, side, _ = self.basis_source(request, check=True)
            self.install_basis(
                projection,
                cached_solve_basis(
                    weight,
                    request.rank,
                    projection=request.projection,
                    side=side,
                    seed=request.seed,
                    name=request.name,
                    solve=solve_basis,
                ),
            )
            projector = cast(Tensor, self.projector(projection))
        return projector

    def usable_rank(self, adapter_name: str) -> int:
        """Directions that this layer gives the adapter: its rank, or fewer where the weight has no more.

        A new adapter leaves out what only rounding has left of the weight; one from a file uses what it was trained with.
        """
        projection, rank = self.pica_projection[adapter_name], self.r[adapter_name]
        projector = self.projector(projection)
        if projector is None:
            return rank
        return min(rank, len(projector), self.pica_usable.get(adapter_name, self._made[projection].clear))

    # ---- meaning -----------------------------------------------------------------------------------------------

    def usable_directions(self, adapter_name: str) -> int:
        self.require_projector(self.pica_projection[adapter_name])
        return self.usable_rank(adapter_name)

    def direction_count(self, adapter_name: str) -> int:
        return self.r[adapter_name]

    def group_rank(self, adapter_name: str) -> int:
        return self.matrix(adapter_name).shape[1]

    def same_basis(self, adapter_name: str, other_name: str) -> bool:
        """Whether both have the same directions, up to the smaller of their ranks."""
        rank = min(self.r[adapter_name], self.r[other_name])
        same = self.pica_projection[adapter_name] == self.pica_projection[other_name]
        return same and min(rank, self.usable_rank(adapter_name)) == min(rank, self.usable_rank(other_name))

    def first_directions(self, adapter_name: str) -> Tensor:
        """The rows of the projector that the adapter uses."""
        projector = self.require_projector(self.pica_projection[adapter_name])
        usable = self.usable_rank(adapter_name)
        return projector if usable == len(projector) else projector[:usable]

    def take_print(self, adapter_name: str, mode: Mode, probes: int) -> LayerPrint:
        projection = self.pica_projection[adapter_name]
        projector = self.first_directions(adapter_name)
        weight, _, origin = self.basis_source(self.requests[projection])
        return take_print(
            projector,
            weight,
            self.side(projection),
            rank=self.r[adapter_name],
            projection=self.requests[projection].projection,
            solver=self.solver(projection),
            mode=mode,
            probes=probes,
            origin=origin,
        )

    def basis_origin(self, adapter_name: str) -> tuple[torch.dtype, str]:
        weight, _, origin = self.basis_source(self.requests[self.pica_projection[adapter_name]])
        return weight.dtype, origin

    def align_print(self, adapter_name: str, trained: LayerPrint, mode: Mode) -> Alignment:
        projection = self.pica_projection[adapter_name]
        projector = self.require_projector(projection)
        weight, _, _ = self.basis_source(self.requests[projection])
        side = self.side(projection)

        def gains() -> Tensor:
            basis = Basis(projector[: trained.rank].float(), side, projector[:0, 0], "", "")
            return (basis.directions(weight) @ weight.float().T).norm(dim=1)

        return align(trained, mode, projector, weight, side, gains)

    # ---- the frozen weight -------------------------------------------------------------------------------------

    def basis_source(self, request: BasisRequest, *, check: bool = False) -> tuple[Tensor, WantedSide, str]:
        """The weight (out, in) that a basis is of, the side on which its projector reads, and the weight's origin.

        That is the layer's own weight, dequantised where it is quantised; or the one that the request names in a
        checkpoint. The projector of another weight than the layer's own cannot read the layer's output, W x, so it reads
        the input.

        Args:
            request: What was asked for.
            check: Whether to hold a checkpoint's weight against the layer's own.

        Raises:
            ConfigError: the checkpoint's weight is missing, of another shape, quantised, or another model's.
        """
        if request.checkpoint is None:
            own = self.frozen.read()
            return own, self._own_side(request, own), self.frozen.quantised_as
        named = read_tensor(request.checkpoint, request.tensor, self.pica_name)
        named = named.flatten(1) if self.frozen.kernel_dims and named.ndim > 1 else named
        named = (named.T if self.frozen.transposed else named).to(self.frozen.device_and_dtype()[0])
        if named.shape != (self.out_features, self.in_features):
            raise ConfigError(
                f"basis_from={request.checkpoint!r}: {request.tensor} is {tuple(named.shape)} and {self.pica_name} "
                f"({self.out_features}, {self.in_features}); name the unquantised checkpoint of the same model."
            )
        if check or not self.frozen.quantised:
            own = self.frozen.read()
            wide = torch.promote_types(torch.promote_types(own.dtype, named.dtype), torch.float32)
            difference = float(torch.linalg.vector_norm(own.to(wide) - named.to(wide)))
            if difference == 0 and not self.frozen.quantised:
                return own, self._own_side(request, own), ""
            size = float(torch.linalg.vector_norm(named, dtype=wide))
            if not difference <= FOREIGN_WEIGHT * size:
                raise ConfigError(
                    f"basis_from={request.checkpoint!r} is not this base model before quantisation: {self.pica_name} "
                    f"differs by {difference / max(size, 1e-30):.0%} of its norm. Name the checkpoint that was quantised."
                )
        return named, "in", NAMED

    def _own_side(self, request: BasisRequest, weight: Tensor) -> WantedSide:
        """The side for a basis of the layer's own weight.

        Minor directions are those that W shortens most: read from its output, they would be amplified rounding.
        """
        return "in" if request.projection == "minor" else self.preferred_side(weight)

    def preferred_side(self, weight: Tensor) -> WantedSide:
        """The side with fewer features ("auto", which looks at the directions), unless the output side would be spoilt.

        That is so where a large bias drowns the response (see `BIAS_LIMIT`), or the layer rounds its input. An embedding's
        output is as good as its input: nothing was computed on the way.
        """
        if isinstance(self.get_base_layer(), nn.Embedding):
            return "out"
        if weight.shape[1] <= weight.shape[0] or not self.frozen.output_is_exact():
            return "in"
        bias = getattr(self.get_base_layer(), "bias", None)
        if bias is None or bias.is_meta:
            return "auto"
        bias = whole(bias, self.out_features, self.pica_name)
        response = (
            torch.linalg.vector_norm(weight, dtype=torch.float64) / weight.shape[0] ** 0.5
        )  # rms |W x| over outputs, |x| = 1
        return "auto" if float(bias.detach().abs().max()) <= BIAS_LIMIT * float(response) else "in"

    # ---- the update --------------------------------------------------------------------------------------------

    def directions(self, projection: str, weight: Tensor) -> Tensor:
        """P as the forward pass uses it, (r, in), float32 or float64."""
        projector = self.require_projector(projection)
        dtype = torch.promote_types(projector.dtype, torch.float32)
        if self.side(projection) == "in":
            return projector.to(dtype)
        with full_precision(weight.device):
            return projector.to(dtype) @ weight.to(dtype)

    def weight_update(self, adapter_name: str) -> Tensor:
        weight = self.frozen.read()
        rows = self.directions(self.pica_projection[adapter_name], weight)
        rank = self.usable_rank(adapter_name)
        with full_precision(weight.device):
            return delta_weight(self.matrix(adapter_name).detach()[:, :rank].to(weight.device), rows[:rank])

    def core(self, adapter_name: str) -> Tensor:
        return self.matrix(adapter_name).detach()[:, : self.usable_rank(adapter_name)]

    def frames(self, adapter_name: str) -> tuple[Tensor | None, Tensor]:
        rows = self.directions(self.pica_projection[adapter_name], self.frozen.read())
        return None, rows[: self.usable_rank(adapter_name)]

    def coordinates_of(self, x: Tensor, y: Tensor, names: list[str]) -> dict[str, Tensor]:
        """h (..., rank): computed once for each projection that `names` use, however many adapters there are."""
        coords = self._coordinates(x, y, names)
        h_of = {}
        for name in names:
            h, rank = coords[self.pica_projection[name]], self.usable_rank(name)
            h_of[name] = h[..., :rank] if rank < h.shape[-1] else h
        return h_of

    def _coordinates(self, x: Tensor, y: Tensor, names: list[str]) -> dict[str, Tensor]:
        """h (..., largest rank) for each projection that `names` use."""
        ranks: dict[str, int] = {}
        for name in names:
            projection = self.pica_projection[name]
            ranks[projection] = max(ranks.get(projection, 0), self.usable_rank(name))
        coords = {}
        for projection, rank in ranks.items():
            projector = self.require_projector(projection)
            if rank < projector.shape[0]:
                projector = projector[:rank]
            if self.side(projection) == "in" and isinstance(self.get_base_layer(), nn.Embedding):
                scale = getattr(
                    self.get_base_layer(), "embed_scale", 1.0
                )  # of embeddings that multiply what they look up
                coords[projection] = (F.embedding(x, projector.T) * scale).to(y.dtype)
            elif self.side(projection) == "in":
                if x.dtype != y.dtype and not torch.is_autocast_enabled(x.device.type):
                    x = x.to(y.dtype)  # base layers that cast their input themselves
                coords[projection] = coordinates(x, projector)
            else:
                bias = getattr(self.get_base_layer(), "bias", None)
                shift = None if bias is None else projector @ bias.to(projector.dtype)  # (r,)
                coords[projection] = coordinates(y, projector, shift)
        return coords

    def add_mixed(self, x: Tensor, y: Tensor, batch: MixedBatch) -> Tensor:
        """h is computed once for the whole batch; see `MixedBatch` for what its layers share."""
        parts = batch.parts(self)
        if not parts:
            return y
        h_of = self._coordinates(x, y, [name for part in parts for name in part.rows])
        # in place on our own copy at least: an output that nobody else holds needs none
        if torch.is_grad_enabled() or not self._may_overwrite(y):
            y = y.clone(memory_format=torch.contiguous_format)
        for part in parts:
            batch.add(self, part, y, h_of[part.projection])
        return y

    def add_update(self, y: Tensor, h: Tensor, name: str, *, in_place: bool) -> Tensor:
        matrix = self.matrix(name)
        if h.shape[-1] < matrix.shape[1]:
            matrix = matrix[:, : h.shape[-1]]
        return add_product(y, h, matrix.to(y.device), in_place=in_place)

    # ---- PEFT's housekeeping -----------------------------------------------------------------------------------

    def move_basis(self, adapter_name: str, device: torch.device, dtype: torch.dtype) -> None:
        projection = self.pica_projection[adapter_name]
        projector = self.projector(projection)
        if projector is not None and not projector.is_meta:
            setattr(self, buffer_name(projection), lasting(projector.to(device=device, dtype=dtype)))

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.drop_unused_bases()

    def extra_repr(self) -> str:
        return f"pica={ {name: self.r[name] for name in sorted(self.r)} }"


def projection_key(request: BasisRequest) -> str:
    """Adapters with the same key share a layer's basis."""
    key = f"{request.projection}_{request.seed}" if request.projection == "random" else request.projection
    if request.checkpoint is None:
        return key
    return f"{key}_of_{hashlib.sha256(request.checkpoint.encode()).hexdigest()[:12]}"


def buffer_name(projection: str) -> str:
    return f"pica_basis_{projection}".replace("-", "m")
