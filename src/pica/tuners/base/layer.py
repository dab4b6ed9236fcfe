"""`SharedLayer`: a frozen base layer with adapters whose parameters it shares with other layers. Forward and PEFT's hooks.

What it is composed of stands in files of their own: the frozen weight, the store of bases, the bank of trained matrices,
and the method, which says what an update is.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

from pica.tuners.base.bank import MatrixBank, verify_loaded
from pica.tuners.base.basis_store import BasisStore
from pica.tuners.base.frozen_weight import FrozenWeight
from pica.tuners.base.layouts import Observed
from pica.tuners.base.method import Method
from pica.tuners.base.mixed_batch import MixedBatch
from pica.tuners.base.pointwise import as_images, as_positions, is_pointwise, read_positions
from pica.tuners.base.replaced_weight import loaded_weight_differs, rebase


class SharedLayer(nn.Module, BaseTunerLayer):
    """A frozen linear layer (Conv1D, 1x1 convolution, embedding) y = W x + b, to which adapters add updates of W.

    Attributes:
        base_layer: The frozen layer.
        path: Its path in the base model, without wrappers.
        group_of: {adapter: key of its matrix in the bank}.
        frozen: W itself.
        bases: The frozen directions that adapters use.
        method: What an update is.
    """

    method_class: ClassVar[type[Any]]
    weight_class: ClassVar[type[FrozenWeight]] = FrozenWeight
    basis_buffers: ClassVar[tuple[str, ...]]  # what names of buffers with projectors begin with
    mixes: ClassVar[bool] = True  # whether the samples of a batch can have an adapter each
    other_param_names = ("group_of",)  # PEFT looks for adapters' names in it

    def __init__(self, base_layer: nn.Module, bank: MatrixBank, path: str, root: nn.Module | None = None) -> None:
        """Wrap a base layer of the base model `root`, which is asked about quantisation only and not kept."""
        super().__init__()
        self.base_layer = base_layer
        self._bank = (bank,)  # in a tuple, so that it is not registered a second time
        self.path = path
        self.group_of: dict[str, str] = Observed.by(self.place_changed)
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: list[str] | str = []
        self.frozen = self.weight_class(self, path, root)
        self.in_features, self.out_features = self.frozen.in_features, self.frozen.out_features
        self.bases = BasisStore(self, *self.basis_buffers)
        self.method: Method = self.method_class(self)

    # ---- forward -----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the updates of the active adapters.

        Args:
            x: (..., in).
            *args: The base layer's.
            **kwargs: Likewise.
        Returns:
            (..., out).
        """
        bank = self._bank[0]
        if bank.unverified:
            verify_loaded(bank)
        if self.disable_adapters:
            return self._forward_disabled(x, *args, **kwargs)
        if bank.batch is not None:
            return self._forward_mixed(x, bank.batch.of(len(x)), *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.group_of]
        if self.merged or not names:
            return y
        in_place = self._may_overwrite(y)
        x, result = self._as_positions(x, y) if self.frozen.kernel_dims else (x, y)  # a convolution
        h_of = self.method.coordinates(x, result, names)  # all of them before any update is added
        for name in names:
            result = self.method.add(result, h_of[name], name, in_place=in_place)
        return as_images(result, y) if self.frozen.kernel_dims else result

    def _forward_disabled(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged:
            self.unmerge()
        return self.base_layer(x, *args, **kwargs)

    def _forward_mixed(self, x: Tensor, batch: MixedBatch, *args: Any, **kwargs: Any) -> Tensor:
        """Each sample of the batch with its own adapter."""
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        y = self.base_layer(x, *args, **kwargs)
        if not self.frozen.kernel_dims:
            return self.method.add_mixed(x, y, batch, in_place=self._may_overwrite(y))
        places, found = self._as_positions(x, y)
        result = as_images(self.method.add_mixed(places, found, batch, in_place=self._may_overwrite(found)), y)
        return result if result.stride() == y.stride() else torch.empty_like(y).copy_(result)

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

    # ---- adapters ----------------------------------------------------------------------------------------------

    @property
    def bank(self) -> MatrixBank:
        return self._bank[0]

    def matrix(self, adapter_name: str) -> Tensor:
        """The trained parameter of the adapter's group. Looked up each time: loaders may replace it."""
        return self.bank.matrices(adapter_name)[self.group_of[adapter_name]]

    def attach(self, adapter_name: str, group: str) -> None:
        """Let adapter `adapter_name` use the matrix of `group` here; the method is told apart what else it needs."""
        self.group_of[adapter_name] = group
        slot = self.bank.matrices(adapter_name)
        slot.layers[self.path] = self
        slot.mixes = slot.mixes and self.mixes

    def place_changed(self, adapter_name: str) -> None:
        """Something has changed that mixed batches know of an adapter in this layer."""
        self.bank.layouts.forget(adapter_name)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones; their matrices are trained unless `inference_mode`, all others are not."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.bank.activate(names, inference_mode, self.path)
        self._active_adapter = names

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.method.delete(adapter_name)

    def _get_available_adapters(self) -> set[str]:
        return set(self.group_of)

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self.group_of)

    # ---- merging -----------------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the base layer's weight, in that weight's layout, float32 or float64."""
        if self._bank[0].unverified:
            verify_loaded(self._bank[0])
        return self.frozen.as_stored(self.method.update(adapter))

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
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.group_of]
        if not names:
            return
        self.frozen.check_mergeable()
        broken = (
            f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken "
            f"(layer {self.path})."
        )
        updates = (self.get_delta_weight(name) for name in [*self.merged_adapters, *names])
        self.frozen.merge(updates, method=self.method.name, refusal=broken if safe_merge else None)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the base weight back exactly as it was before the first merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.frozen.restore()
        self.merged_adapters.clear()

    # ---- housekeeping ------------------------------------------------------------------------------------------

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride] - torch gives all by position
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        """Torch's, called before the base layer's own: a new weight has another basis."""
        if f"{prefix}base_layer.weight" in state_dict and loaded_weight_differs(self, state_dict, prefix):
            rebase(self)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the basis, never the shared matrix: PEFT's version would drag it from layer to layer, dtype included."""
        own_device, dtype = self.frozen.device_and_dtype()
        if adapter_name in self.group_of and own_device.type != "meta":
            self.bases.move(adapter_name, device or own_device, dtype)

    def _replicate_for_data_parallel(self) -> Any:
        """Torch's: a shallow copy for another device, whose parts have to be of that copy."""
        replica: Any = super()._replicate_for_data_parallel()
        replica.frozen, replica.bases = self.frozen.of(replica), self.bases.of(replica)
        replica.method = self.method.of(replica)
        return replica

    def extra_repr(self) -> str:
        return self.method.describe()
