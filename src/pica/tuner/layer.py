"""`PicaLinear`: one adapted layer. It owns its frozen basis and refers to the shared matrices in the bank."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pica.basis import Basis, BasisRequest, Side, cached_solve_basis, full_precision, solve_basis
from pica.errors import BasisError
from pica.tuner.bank import AdapterSlot, PicaBank
from pica.tuner.mixed import MixedBatch
from pica.tuner.update import add_product, coordinates, delta_weight

# A bias this many times larger than the layer's response to a unit input drowns that response when the output is
# rounded to half precision, so the projector then reads the input although it is the wider side.
BIAS_LIMIT = 4.0


class PicaLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer (or Conv1D) y = W x + b with PiCa updates: y + M P x for each active adapter.

    State of an adapter in a layer: its group (which M in the bank), its rank here, its projection. The basis of a
    projection serves every adapter: a smaller rank uses its first rows.
    """

    adapter_layer_names = ("pica_M",)
    # plain dicts keyed by adapter name: PEFT's delete_adapter and name listing look into them
    other_param_names = ("pica_group", "r", "pica_projection")

    def __init__(self, base_layer: nn.Module, bank: PicaBank, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._bank = (bank,)  # in a tuple, so that it is not registered a second time
        self.pica_name = name
        self.pica_group: dict[str, str] = {}
        self.r: dict[str, int] = {}
        self.pica_projection: dict[str, str] = {}
        self.requests: dict[str, BasisRequest] = {}  # what each projection was asked for, to solve it later
        self._made: dict[str, tuple[Side, str]] = {}  # (side, solver) of each projection's projector
        self._unmerged_weight: Tensor | None = None
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] | str = []
        self.quantization_backend = resolve_quantization_backend(base_layer)
        self.in_features, self.out_features = features_of(base_layer)
        self.is_transposed = isinstance(base_layer, Conv1D)

    @property
    def pica_M(self) -> PicaBank:
        return self._bank[0]

    def _get_available_adapters(self) -> set[str]:
        return set(self.r)

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.r)

    # ---- adapters ----------------------------------------------------------------------------------------------

    def add_adapter(self, name: str, *, group: str, request: BasisRequest, basis: Basis | None) -> None:
        """Attach adapter `name`; `basis` is None where the layer has one that is large enough, or on the meta device."""
        projection = projection_key(request)
        self.pica_group[name] = group
        self.r[name] = request.rank
        self.pica_projection[name] = projection
        known = self.requests.get(projection)
        if known is None or known.rank < request.rank:
            self.requests[projection] = request
        self.pica_M.matrices(name).layers[self.pica_name] = self
        if basis is not None:
            known_rows = self.projector(projection)
            if known_rows is not None and not known_rows.is_meta and known_rows.shape[0] < basis.rank:
                # Adapters that were trained with the first rows keep exactly those, whatever orientation they have.
                basis.projector[: known_rows.shape[0]] = known_rows.to(basis.projector)
            self.install_basis(projection, basis)

    def install_basis(self, projection: str, basis: Basis) -> None:
        """Make `basis` the one that adapters of `projection` use, in the layer's compute dtype on its device."""
        device, dtype = self.compute_device_and_dtype()
        # The projector is derived from the base weight, so no state dict holds it; `save_basis` stores it on request.
        self.register_buffer(buffer_name(projection), basis.projector.to(device=device, dtype=dtype), persistent=False)
        self._made[projection] = (basis.side, basis.solver)

    def use_own_basis(self, name: str, basis: Basis) -> None:
        """Give adapter `name` this basis; others that used the same one before keep theirs."""
        projection = self.pica_projection[name]
        if any(p == projection for other, p in self.pica_projection.items() if other != name):
            fresh = next(f"{projection}_{i}" for i in range(2, 10_000) if f"{projection}_{i}" not in self.requests)
            self.requests[fresh] = self.requests[projection]
            self.pica_projection[name] = projection = fresh
        self.install_basis(projection, basis)

    def turn_basis(self, name: str, rotation: Tensor) -> None:
        """Replace the first rows P of adapter `name`'s basis by R P; `rotation` R is (k, k), orthogonal."""
        projection = self.pica_projection[name]
        projector = self.require_projector(projection)
        wide = projector.to(torch.promote_types(projector.dtype, torch.float32)).clone()
        count = rotation.shape[0]
        with full_precision(wide.device):
            wide[:count] = rotation.to(wide) @ wide[:count]
        side, solver = self._made[projection]
        self.use_own_basis(name, Basis(wide, side, wide.new_zeros(0), "principal", solver))

    def side(self, projection: str) -> Side:
        """Which side the projector reads: the input x ("in") or the bias-free output ("out")."""
        return self._made[projection][0]

    def solver(self, projection: str) -> str:
        return self._made[projection][1]

    def projector(self, projection: str) -> Tensor | None:
        return getattr(self, buffer_name(projection), None)

    def require_projector(self, projection: str) -> Tensor:
        """The projector, solved now if the weights were on the meta device when the adapter was added."""
        projector = self.projector(projection)
        if projector is None or projector.is_meta:
            request = self.requests[projection]
            weight = self.frozen_weight()
            self.install_basis(
                projection,
                cached_solve_basis(
                    weight,
                    request.rank,
                    projection=request.projection,
                    side=self.preferred_side(weight),
                    seed=request.seed,
                    name=request.name,
                    solve=solve_basis,
                ),
            )
            projector = cast(Tensor, self.projector(projection))
        return projector

    def usable_rank(self, adapter_name: str) -> int:
        """Directions that this layer gives the adapter: its rank, or fewer where the weight has no more."""
        projector = self.projector(self.pica_projection[adapter_name])
        rank = self.r[adapter_name]
        return rank if projector is None else min(rank, projector.shape[0])

    def matrix(self, adapter_name: str) -> Tensor:
        """The shared M of the adapter's group, (out, group rank). Looked up each time: loaders may replace it."""
        return self.pica_M.matrices(adapter_name)[self.pica_group[adapter_name]]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones; their matrices are trained unless `inference_mode`, all others are not."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.pica_M.activate(names, inference_mode, self.pica_name)
        self._active_adapter = names

    # ---- the frozen weight -------------------------------------------------------------------------------------

    def frozen_weight(self) -> Tensor:
        """W as it was trained, (out, in): dequantised where needed, without what was merged into it."""
        weight = self._unmerged_weight if self._unmerged_weight is not None else self.get_base_weight().detach()
        device, _ = self.compute_device_and_dtype()
        if weight.is_meta:
            raise BasisError(
                f"{self.pica_name}: its weights are still on the meta device. Load or materialise the base model first."
            )
        weight = weight.to(device)
        return weight.T if self.is_transposed else weight

    def compute_device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
            dtype = torch.get_default_dtype()
        return device or torch.device("cpu"), dtype

    def is_deferred(self) -> bool:
        """Whether the base weights are on the meta device, so that a basis has to wait for them."""
        weight = getattr(self.get_base_layer(), "weight", None)
        return isinstance(weight, Tensor) and weight.is_meta and self._unmerged_weight is None

    def preferred_side(self, weight: Tensor) -> Side:
        """The side with fewer features, unless a large bias would spoil the output side (see `BIAS_LIMIT`)."""
        if weight.shape[1] <= weight.shape[0]:
            return "in"
        bias = getattr(self.get_base_layer(), "bias", None)
        if bias is None or bias.is_meta:
            return "out"
        response = (
            torch.linalg.vector_norm(weight, dtype=torch.float64) / weight.shape[0] ** 0.5
        )  # rms |W x| over outputs, |x| = 1
        return "out" if float(bias.detach().abs().max()) <= BIAS_LIMIT * float(response) else "in"

    # ---- merging -----------------------------------------------------------------------------------------------

    def directions(self, projection: str, weight: Tensor) -> Tensor:
        """P as the forward pass uses it, (r, in), float32 or float64."""
        projector = self.require_projector(projection)
        dtype = torch.promote_types(projector.dtype, torch.float32)
        if self.side(projection) == "in":
            return projector.to(dtype)
        with full_precision(weight.device):
            return projector.to(dtype) @ weight.to(dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base layer's weight, in that weight's layout, float32 or float64."""
        if self._bank[0].unverified:
            verify_loaded(self._bank[0])
        weight = self.frozen_weight()
        rows = self.directions(self.pica_projection[adapter], weight)
        rank = min(self.r[adapter], rows.shape[0])
        with full_precision(weight.device):
            delta = delta_weight(self.matrix(adapter).detach()[:, :rank].to(weight.device), rows[:rank])
        return delta.T if self.is_transposed else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates to the base weight: summed in float32 (or better), rounded once.

        The weight before the first merge is kept in host memory, so that `unmerge` restores it bit for bit.

        Raises:
            ValueError: with `safe_merge`, a merged weight would not be finite; nothing is changed then.
            TypeError: the base layer's quantisation cannot be written to.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.r]
        if not names:
            return
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise TypeError(
                f"{self.pica_name}: a {self.quantization_backend.backend_name} layer cannot be merged into. "
                "Merge into an unquantised copy of the base model instead."
            )
        current = self.get_base_weight().detach()
        original = self._unmerged_weight if self._unmerged_weight is not None else current
        total = original.to(device=current.device, dtype=torch.promote_types(current.dtype, torch.float32))
        total = total.clone() if total.data_ptr() == original.data_ptr() else total
        for name in [*self.merged_adapters, *names]:
            total += self.get_delta_weight(name).to(total.device)
        merged = total.to(current.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken "
                f"(layer {self.pica_name})."
            )
        if self._unmerged_weight is None:
            # On the CPU no copy is made: set_base_weight swaps the storage in, so `current` keeps the old one.
            self._unmerged_weight = current.cpu()
        self.set_base_weight(merged)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base weight back exactly as it was before the first merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        original = cast(Tensor, self._unmerged_weight)
        self.set_base_weight(original.to(self.get_base_weight().device))
        self._unmerged_weight = None
        self.merged_adapters.clear()

    # ---- forward -----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base layer's output (..., out) for x (..., in), plus the updates of the active adapters.

        `adapter_names` (one a sample, "__base__" for none) is put in by the model's forward hook.
        """
        adapter_names: list[str] | None = kwargs.pop("adapter_names", None)
        if self._bank[0].unverified:
            verify_loaded(self._bank[0])
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            if self.merged:
                raise ValueError(
                    "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
                )
            return self._forward_mixed(x, adapter_names, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        names = [n for n in self.active_adapters if n in self.r]
        if self.merged or not names:
            return y
        in_place = self._may_overwrite(y)
        h_of = self._coordinates(x, y, names)
        for name in names:
            rank = self.usable_rank(name)
            h, matrix = h_of[self.pica_projection[name]], self.matrix(name)
            if rank < h.shape[-1]:
                h = h[..., :rank]
            if rank < matrix.shape[1]:
                matrix = matrix[:, :rank]
            y = add_product(y, h, matrix.to(y.device), in_place=in_place)
        return y

    def _coordinates(self, x: Tensor, y: Tensor, names: list[str]) -> dict[str, Tensor]:
        """h (..., largest rank) for each projection that `names` use: once, however many adapters there are.

        All of them are taken before any update is added, since on the output side they read y.
        """
        ranks: dict[str, int] = {}
        for name in names:
            projection = self.pica_projection[name]
            ranks[projection] = max(ranks.get(projection, 0), self.r[name])
        coords = {}
        for projection, rank in ranks.items():
            projector = self.require_projector(projection)
            if rank < projector.shape[0]:
                projector = projector[:rank]
            if self.side(projection) == "in":
                if x.dtype != y.dtype and not torch.is_autocast_enabled(x.device.type):
                    x = x.to(y.dtype)  # base layers that cast their input themselves
                coords[projection] = coordinates(x, projector)
            else:
                bias = getattr(self.get_base_layer(), "bias", None)
                shift = None if bias is None else projector @ bias.to(projector.dtype)  # (r,)
                coords[projection] = coordinates(y, projector, shift)
        return coords

    def _may_overwrite(self, y: Tensor) -> bool:
        """Whether the base layer's output is ours alone: a fresh tensor that no hook has seen."""
        base = self.base_layer
        return (
            type(base) is nn.Linear
            and not torch.compiler.is_compiling()  # the compiler plans memory itself
            and type(y) is Tensor
            and y.is_contiguous()
            and not y._is_view()
            and not y.is_inference()
            and not base._forward_hooks
            and not hasattr(base, "_hf_hook")
        )

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Each sample of the batch with its own adapter; h is computed once for the whole batch."""
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        y = self.base_layer(x, *args, **kwargs)
        batch = adapter_names if isinstance(adapter_names, MixedBatch) else MixedBatch(adapter_names)
        parts = batch.parts(self)
        if not parts:
            return y
        h_of = self._coordinates(x, y, [name for part in parts for name in part.rows])
        # in place on our own copy at least: an output that nobody else holds needs none
        y = (
            y
            if self._may_overwrite(y) and not torch.is_grad_enabled()
            else y.clone(memory_format=torch.contiguous_format)
        )
        for part in parts:
            batch.add(self, part, y, h_of[part.projection])
        return y

    # ---- PEFT's housekeeping -----------------------------------------------------------------------------------

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the basis, never the shared matrix: PEFT's version would drag it from layer to layer, dtype included."""
        if adapter_name not in self.r:
            return
        projection = self.pica_projection[adapter_name]
        projector = self.projector(projection)
        own_device, dtype = self.compute_device_and_dtype()
        if projector is not None and not projector.is_meta and own_device.type != "meta":
            setattr(self, buffer_name(projection), projector.to(device=device or own_device, dtype=dtype))

    def extra_repr(self) -> str:
        return f"pica={ {name: self.r[name] for name in sorted(self.r)} }"


@torch.compiler.disable
def verify_loaded(bank: PicaBank) -> None:
    """Hold adapters that a loader wrote straight into the bank against their fingerprints, once.

    Raises:
        BasisMismatchError, AdapterFileError: as `pica.tuner.meaning.establish_meaning`.
    """
    from pica.tuner.meaning import establish_meaning, take_fingerprint

    for name, module in bank.items():
        slot = cast(AdapterSlot, module)
        if slot.unverified and slot.fingerprint is not None and slot.has_fingerprint():
            establish_meaning(bank, slot, name, slot.fingerprint, None)
        elif slot.unverified and (own := take_fingerprint(slot, name)) is not None:
            slot.set_fingerprint(own)  # a new adapter made from a saved adapter's configuration
            slot.unverified = False
    bank.refresh_unverified()


def features_of(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer of any kind, quantised ones included."""
    in_features, out_features = _get_in_out_features(layer)
    if in_features is None or out_features is None:
        raise BasisError(f"cannot tell the width of a layer of type {type(layer).__name__}")
    return in_features, out_features


def projection_key(request: BasisRequest) -> str:
    """Adapters with the same key share a layer's basis."""
    return f"{request.projection}_{request.seed}" if request.projection == "random" else request.projection


def buffer_name(projection: str) -> str:
    return f"pica_basis_{projection}".replace("-", "m")
