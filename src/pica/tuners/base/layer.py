"""What an adapted layer is, whatever the method: a frozen base layer, adapters in a bank, exact merging, mixed batches."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

from pica.basis.fingerprint import Alignment, LayerPrint, Mode
from pica.tuners.base.bank import PicaBank, verify_loaded
from pica.tuners.base.frozen_weight import FrozenWeight
from pica.tuners.base.mixed_batch import MixedBatch
from pica.tuners.base.pointwise import as_images, as_positions, is_pointwise, read_positions
from pica.tuners.base.replaced_weight import loaded_weight_differs, rebase


class AdaptedLinear(nn.Module, BaseTunerLayer):
    """A frozen linear layer (Conv1D, 1x1 convolution, embedding) y = W x + b, to which adapters add updates of W.

    A method says what an update is: its coordinates of the input, the product with its parameters, the change of the
    weight, and how its frozen basis is held against a fingerprint.
    """

    method: ClassVar[str] = ""  # for messages
    mixes: ClassVar[bool] = True  # whether the samples of a batch can have an adapter each
    mismatch_remedy: ClassVar[str] = ""  # one more way out of a basis mismatch, where the method has one
    frozen_weight_class: ClassVar[type[FrozenWeight]] = FrozenWeight
    stores_basis: ClassVar[bool] = False  # whether an adapter's file may hold the basis itself; then the four below

    def __init__(self, base_layer: nn.Module, bank: PicaBank, name: str, root: nn.Module | None = None) -> None:
        """Wrap a base layer of the base model `root`, which is asked about quantisation only and not kept."""
        super().__init__()
        self.base_layer = base_layer
        self._bank = (bank,)  # in a tuple, so that it is not registered a second time
        self.pica_name = name
        self.pica_group: dict[str, str] = {}
        self._bases_forgotten = False
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] | str = []
        self.frozen = self.frozen_weight_class(self, name, root)
        self.in_features, self.out_features = self.frozen.in_features, self.frozen.out_features

    # ---- what a method defines ---------------------------------------------------------------------------------

    @abstractmethod
    def direction_count(self, adapter_name: str) -> int:
        """Directions that the adapter asks of this layer, whether or not the weight has them."""

    @abstractmethod
    def usable_directions(self, adapter_name: str) -> int:
        """Directions that the adapter has here: what it asks of this layer, or fewer where the weight has no more."""

    @abstractmethod
    def group_rank(self, adapter_name: str) -> int:
        """Directions of the adapter's group: the largest `direction_count` of its layers."""

    @abstractmethod
    def take_print(self, adapter_name: str, mode: Mode, probes: int) -> LayerPrint:
        """Fingerprint of the basis that the adapter uses here."""

    @abstractmethod
    def align_print(self, adapter_name: str, trained: LayerPrint, mode: Mode) -> Alignment:
        """How that basis lies to the one that `trained` was taken of; changes nothing."""

    def basis_origin(self, adapter_name: str) -> tuple[torch.dtype, str]:
        """Of which weights the adapter's basis is: their dtype, and one of `pica.basis.fingerprint.ORIGINS`."""
        return self.frozen.read().dtype, self.frozen.quantised_as

    @abstractmethod
    def turn_basis(self, name: str, rotation: Tensor) -> None:
        """Rotate adapter `name`'s first directions by `rotation` (k, k), orthogonal."""

    @abstractmethod
    def limit_basis(self, name: str, usable: int) -> None:
        """Leave adapter `name` its first `usable` directions only, in this layer."""

    @abstractmethod
    def forget_bases(self) -> None:
        """Drop the bases that were made from the layer's own weight; they are made again when they are needed."""

    @abstractmethod
    def solve_again(self) -> None:
        """Make the bases again that were dropped, if any were."""

    def forget_choices(self, adapter_name: str) -> None:
        """Drop what else of an adapter was chosen by the weight."""

    @abstractmethod
    def move_basis(self, adapter_name: str, device: torch.device, dtype: torch.dtype) -> None:
        """Move the frozen basis that the adapter uses."""

    @abstractmethod
    def coordinates_of(self, x: Tensor, y: Tensor, names: list[str]) -> dict[str, Tensor]:
        """What the frozen basis sees of each token, for each adapter; `y` is the base layer's output, still unchanged."""

    @abstractmethod
    def add_update(self, y: Tensor, h: Tensor, name: str, *, in_place: bool) -> Tensor:
        """y plus the adapter's update at coordinates `h`."""

    @abstractmethod
    def add_mixed(self, x: Tensor, y: Tensor, batch: MixedBatch) -> Tensor:
        """The base layer's output `y` plus each sample's own update; `y` may be overwritten where `_may_overwrite`."""

    @abstractmethod
    def same_basis(self, adapter_name: str, other_name: str) -> bool:
        """Whether two adapters of this layer use the very same frozen basis."""

    @abstractmethod
    def weight_update(self, adapter_name: str) -> Tensor:
        """What the adapter adds to W, (out, in), float32 or float64."""

    @abstractmethod
    def core(self, adapter_name: str) -> Tensor:
        """C of the update L C R: the trained matrix, cut to what this layer uses. L and R are orthonormal."""

    @abstractmethod
    def frames(self, adapter_name: str) -> tuple[Tensor | None, Tensor]:
        """(L, R) of the update L C R, (out, k) and (k, in), in at least float32; None where L is the identity."""

    def stored_basis(self, adapter_name: str) -> Tensor:
        """What an adapter's file holds of its basis here."""
        raise NotImplementedError

    def stored_basis_problem(self, adapter_name: str, stored: Tensor) -> str | None:
        """What is wrong with a basis from a file, or None."""
        raise NotImplementedError

    def use_stored_basis(self, adapter_name: str, stored: Tensor) -> str:
        """Use a basis from a file; returns what `go_back_to_basis` takes, until `drop_unused_bases`."""
        raise NotImplementedError

    def go_back_to_basis(self, adapter_name: str, before: str) -> None:
        """Undo `use_stored_basis`."""
        raise NotImplementedError

    def drop_unused_bases(self) -> None:
        """Free what no adapter uses any more."""

    # ---- adapters ----------------------------------------------------------------------------------------------

    @property
    def bank(self) -> PicaBank:
        return self._bank[0]

    def _get_available_adapters(self) -> set[str]:
        return set(self.pica_group)

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.pica_group)

    def matrix(self, adapter_name: str) -> Tensor:
        """The trained parameter of the adapter's group. Looked up each time: loaders may replace it."""
        return self.bank.matrices(adapter_name)[self.pica_group[adapter_name]]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones; their matrices are trained unless `inference_mode`, all others are not."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.bank.activate(names, inference_mode, self.pica_name)
        self._active_adapter = names

    # ---- the frozen weight -------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Torch's, called before the base layer's own: a new weight has another basis."""
        if f"{prefix}base_layer.weight" in state_dict and loaded_weight_differs(self, state_dict, prefix):
            rebase(self)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base layer's weight, in that weight's layout, float32 or float64."""
        if self._bank[0].unverified:
            verify_loaded(self._bank[0])
        return self.frozen.as_stored(self.weight_update(adapter))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return not self.frozen.kernel_dims  # PEFT's conversion knows matrices only; `pica.export_lora` does these too

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' updates to the base weight: summed in float32 (or better), rounded once.

        The weight before the first merge is kept (in host memory; of a quantised layer as it is, packed), so that
        `unmerge` restores it bit for bit. A quantised layer's weight is dequantised, and the sum quantised again.

        Raises:
            ValueError: with `safe_merge`, a merged weight would not be finite; nothing is changed then.
            ValueError: the weight is split between processes.
            QuantisationError: the base layer's quantisation cannot be written to.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.pica_group]
        if not names:
            return
        self.frozen.check_mergeable()
        broken = (
            f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken "
            f"(layer {self.pica_name})."
        )
        updates = (self.get_delta_weight(name) for name in [*self.merged_adapters, *names])
        self.frozen.merge(updates, method=self.method, refusal=broken if safe_merge else None)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base weight back exactly as it was before the first merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.frozen.restore()
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
        names = [n for n in self.active_adapters if n in self.pica_group]
        if self.merged or not names:
            return y
        in_place = self._may_overwrite(y)
        result = y
        if self.frozen.kernel_dims:
            x, result = self._as_positions(x, y)
        h_of = self.coordinates_of(x, result, names)  # all of them before any update is added
        for name in names:
            result = self.add_update(result, h_of[name], name, in_place=in_place)
        return as_images(result, y) if self.frozen.kernel_dims else result

    def _as_positions(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """A convolution's input and output as (N, places, channels)."""
        base = self.get_base_layer()
        assert is_pointwise(base)
        return read_positions(base, x), as_positions(base, y)

    def _may_overwrite(self, y: Tensor) -> bool:
        """Whether the base layer's output is ours alone: a fresh tensor that no hook has seen."""
        base = self.base_layer
        return (
            type(base) is nn.Linear
            and not torch.compiler.is_compiling()  # the compiler plans memory itself
            and not torch.jit.is_tracing()  # which cannot record a function of autograd that writes in place
            and not torch._C._are_functorch_transforms_active()  # torch.func asks more of an autograd function
            and not _global_forward_hooks
            and type(y) is Tensor
            and y.is_contiguous()
            and not y._is_view()
            and not y.is_inference()
            and not base._forward_hooks
            and not hasattr(base, "_hf_hook")
        )

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Each sample of the batch with its own adapter."""
        if len(adapter_names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        y = self.base_layer(x, *args, **kwargs)
        batch = adapter_names if isinstance(adapter_names, MixedBatch) else MixedBatch(adapter_names)
        if not self.frozen.kernel_dims:
            return self.add_mixed(x, y, batch)
        places, found = self._as_positions(x, y)
        result = as_images(self.add_mixed(places, found, batch), y)
        return result if result.stride() == y.stride() else torch.empty_like(y).copy_(result)

    # ---- PEFT's housekeeping -----------------------------------------------------------------------------------

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the basis, never the shared matrix: PEFT's version would drag it from layer to layer, dtype included."""
        own_device, dtype = self.frozen.device_and_dtype()
        if adapter_name in self.pica_group and own_device.type != "meta":
            self.move_basis(adapter_name, device or own_device, dtype)


def lasting(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy where inference mode made it one that autograd must not keep: what is solved in there stays."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()
