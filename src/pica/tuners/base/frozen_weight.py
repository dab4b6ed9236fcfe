"""The frozen weight W of one base layer, however it is stored: read as (out, in), merged into, put back bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pica.errors import BasisError, QuantisationError
from pica.text import first_line
from pica.tuners.base.part import Part
from pica.tuners.base.pointwise import is_pointwise
from pica.tuners.base.quantised import (
    KeptLayer,
    backend_of,
    carry_over,
    dequantised,
    kind_of,
    requantise,
    rounds_its_input,
)
from pica.tuners.base.sharding import in_parts, whole

WEIGHT_SAMPLES = 64
# Largest deviation of a weight's sample, relative to its norm, at which it counts as the same: bfloat16 rounds by 0.2%.
SAME_WEIGHT = 1e-2


class FrozenWeight(Part):
    """W (out, in) of the base layer of `layer`, which may hold it quantised, tied, in parts, transposed or as a convolution.

    Attributes:
        in_features, out_features: Shape of W.
        transposed: Whether it is stored as (in, out). An embedding is the linear layer of one-hot inputs.
        kernel_dims: Trailing dimensions of a convolution's weight, each of size 1: (out, in, 1, 1) of a Conv2d.
        quantised_as: How it is quantised, in a word or two; "" where it is not.
        tied: Whether another module has the very same parameter; the model finds out.
    """

    def __init__(self, layer: BaseTunerLayer, path: str, root: nn.Module | None) -> None:
        """Of the base layer that `layer` has; the base model `root` is asked about quantisation only and not kept."""
        base = layer.get_base_layer()
        super().__init__(layer)
        self._path = path
        self.in_features, self.out_features = features_of(base)
        self.transposed = isinstance(base, (Conv1D, nn.Embedding))
        self.kernel_dims = len(base.kernel_size) if is_pointwise(base) else 0
        layer.quantization_backend = backend_of(base, root)  # PEFT's accessors look there
        self.quantised_as = kind_of(base, layer.quantization_backend)
        self._float_dtype = None if layer.quantization_backend is None else _float_dtype(root)
        self.tied = False
        self._before_merge: Tensor | None = None  # W before the first merge
        self._kept: KeptLayer | None = None  # the same of a quantised layer
        self._tied_weight: nn.Parameter | None = None  # what the base layer had before a merge untied it
        self._seen: Tensor | None = None  # a sample of the weight that the layer's bases are of

    @property
    def quantised(self) -> bool:
        return self.layer.quantization_backend is not None

    # ---- reading -----------------------------------------------------------------------------------------------

    def read(self) -> Tensor:
        """W as it was trained: dequantised and gathered where needed, without what was merged into it.

        Returns:
            (out, in), on the base layer's device.
        Raises:
            BasisError: The weight is on the meta device, or only a part of it is in this process.
        """
        device, _ = self.device_and_dtype()
        if self.is_deferred():
            raise BasisError(
                f"{self._path}: its weights are still on the meta device. Load or materialise the base model first "
                "(under FSDP: set fsdp_cpu_ram_efficient_loading to false; with a device_map: leave no adapted layer "
                "offloaded to the CPU or to disk)."
            )
        if self.quantised:
            weight = self._dequantised()
        elif self._before_merge is not None:
            weight = self._original()
        else:  # PEFT's accessor gives a tensor that does not know any more of which parameter it was a part
            raw = self.raw()
            weight = raw if in_parts(raw) else self.layer.get_base_weight()
        weight = whole(weight, self.in_features * self.out_features, self._path).to(device)
        if self.kernel_dims:
            return weight.flatten(1)
        return weight.T if self.transposed else weight

    def as_stored(self, update: Tensor) -> Tensor:
        """A change of W (out, in), in the layout of the base layer's own weight."""
        if self.kernel_dims:
            return update.reshape(*update.shape, *[1] * self.kernel_dims)
        return update.T if self.transposed else update

    def raw(self) -> Tensor:
        """What the base layer holds as its weight: maybe quantised, or this process's part; empty if it has no such name."""
        base = self.layer.get_base_layer()
        weight = getattr(base, "W_q" if self.quantised_as == "hqq" else "weight", None)
        return weight if isinstance(weight, Tensor) else torch.empty(0)

    def is_deferred(self) -> bool:
        """Whether the base weights are on the meta device, so that a basis has to wait for them."""
        if self._before_merge is not None or self._kept is not None:
            return False
        return self.raw().is_meta

    def output_is_exact(self) -> bool:
        """Whether the base layer's output can be read as W x (+ bias), up to the rounding of its dtype."""
        return not rounds_its_input(self.layer.get_base_layer(), self.layer.quantization_backend)

    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Where the base layer computes, and in which dtype."""
        device, dtype = self.layer._get_base_layer_device_and_dtype(self.layer.get_base_layer())
        if self._float_dtype is not None:
            dtype = self._float_dtype
        if dtype is None or not dtype.is_floating_point or dtype.itemsize < 2:
            dtype = torch.get_default_dtype()
        return device or torch.device("cpu"), dtype

    def _dequantised(self) -> Tensor:
        base = self.layer.get_base_layer() if self._kept is None else self._kept.view()
        backend = self.layer.quantization_backend
        assert backend is not None
        try:
            return dequantised(base, backend, self.in_features, self.device_and_dtype()[1])
        except (NotImplementedError, RuntimeError, TypeError, AttributeError) as error:
            raise QuantisationError(
                f"{self._path}: its weight ({self.quantised_as}, {type(base).__name__}) cannot be dequantised "
                f"({first_line(error)}), so it has no basis. Leave the layer out with exclude_modules, or load the base "
                "model quantised in another way."
            ) from error

    def _original(self) -> Tensor:
        """The weight before the first merge, where and in the dtype that the model has been moved to since."""
        merged = self.layer.get_base_weight()
        return cast(Tensor, self._before_merge).to(device=merged.device, dtype=merged.dtype)

    # ---- being replaced ----------------------------------------------------------------------------------------

    def note(self) -> None:
        """Remember what the weight looks like of which a basis has just been made."""
        self._seen = self._sample()

    def deviation(self) -> float:
        """How far the weight is from the one that the bases are of, in a sample.

        Returns:
            Relative to its norm; 0 where that cannot be seen: without bases, or where the weight is packed, in parts or
            on the meta device.
        """
        return _deviation(self._seen, self._sample())

    def _sample(self) -> Tensor | None:
        weight = self.raw() if self._before_merge is None else self._before_merge
        return None if self.quantised else _sampled(weight, self.in_features * self.out_features)

    # ---- merging -----------------------------------------------------------------------------------------------

    def check_mergeable(self) -> None:
        """Refuse to merge into what cannot be written.

        Raises:
            QuantisationError: The base layer's quantisation cannot be written to.
            ValueError: The weight is split between processes.
        """
        backend = self.layer.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise QuantisationError(
                f"{self._path}: a {self.quantised_as} layer cannot be merged into. Merge in full precision instead "
                "(pica.adapters.merge.merge_in_full), or onto the unquantised base model (pica merge)."
            )
        if in_parts(self.raw()):
            raise ValueError(
                f"{self._path}: its weight is split between processes, so nothing can be merged into it. Save the "
                "adapter and merge in one process (pica merge)."
            )

    def merge(self, updates: Iterable[Tensor], *, method: str, refusal: str | None = None) -> None:
        """Make the base layer's weight W plus these updates: summed in float32 (or better), rounded once.

        Args:
            updates: All that is to be merged, what is merged already included, as `as_stored` gives it.
            method: For warnings.
            refusal: What to say of a sum that is not finite, and is to be refused; None where it is not.

        Raises:
            ValueError: `refusal`; nothing is changed then.
            QuantisationError: The sum could not be quantised; nothing is changed then.
        """
        if self.quantised:
            original = self.read()
        elif self._before_merge is not None:
            original = self._original()
        else:
            original = self.layer.get_base_weight().detach()
        total = original.to(torch.promote_types(original.dtype, torch.float32))
        if total.data_ptr() == original.data_ptr() and not self.quantised:
            total = total.clone()
        for update in updates:
            total += update.to(total.device)
        merged = total.to(original.dtype)
        if refusal is not None and not torch.isfinite(merged).all():
            raise ValueError(refusal)
        if self.quantised:
            self._requantise(merged, method)
            return
        if self._before_merge is None:
            # On the CPU no copy is made: set_base_weight swaps the storage in, so this keeps the old one.
            self._before_merge = self.layer.get_base_weight().detach().cpu()
        if self.tied and self._tied_weight is None:
            self._untie(method)
        self._write(merged)

    def _write(self, weight: Tensor) -> None:
        self.layer.set_base_weight(weight)

    def _requantise(self, merged: Tensor, method: str) -> None:
        warnings.warn(
            f"{method}: merging into {self.quantised_as} layers quantises the merged weight again, so outputs "
            "change by about as much as quantisation changed them; pica merge writes the merged model in full "
            "precision. Unmerging is exact.",
            stacklevel=4,
        )
        kept = self._kept or KeptLayer(self.layer.get_base_layer())
        requantise(self._write, merged, kept, self._path, self.quantised_as)
        carry_over(kept.layer, self.layer.get_base_layer())
        self._kept = kept

    def _untie(self, method: str) -> None:
        """Give the base layer a parameter of its own, so that a merge does not reach the module that shares it."""
        base: Any = self.layer.get_base_layer()
        self._tied_weight = base.weight
        base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=base.weight.requires_grad)
        warnings.warn(
            f"{method}: the weight of {self._path} is tied to another module's, which has no adapter. The merge "
            "gives this layer a weight of its own, and the merged model is no longer tied; unmerge ties it again.",
            stacklevel=4,
        )

    def restore(self) -> None:
        """Put the base weight back exactly as it was before the first merge."""
        if self._kept is not None:
            restored = self._kept.restore()
            if self.layer.get_base_layer() is not restored:  # HQQ's layers are replaced, not changed
                self.layer.base_layer = restored  # pyright: ignore[reportAttributeAccessIssue]
            self._kept = None
        elif self._tied_weight is not None:
            self.layer.get_base_layer().weight = self._tied_weight
            self._tied_weight = self._before_merge = None
        else:
            self._write(self._original())
            self._before_merge = None

    def forget_merge(self) -> None:
        """Take what the base layer holds now for its weight, though it may be another than before the first merge."""
        self._before_merge = None


def _sampled(weight: Tensor, size: int) -> Tensor | None:
    """Some of a weight's `size` numbers, float64, on the CPU; None where it is packed, in parts or on the meta device."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    if not plain or weight.is_meta or in_parts(weight) or weight.numel() != size:
        return None
    flat = weight.detach()
    flat = (flat if flat.is_contiguous() else flat.T).reshape(-1)
    return flat[:: max(1, len(flat) // WEIGHT_SAMPLES)].to("cpu", torch.float64)


def _deviation(seen: Tensor | None, now: Tensor | None) -> float:
    """How far one sample is from another, relative to its norm; 0 where that cannot be told."""
    if seen is None or now is None or seen.shape != now.shape:
        return 0.0
    size = float(torch.linalg.vector_norm(seen))
    return float(torch.linalg.vector_norm(now - seen)) / max(size, 1e-30)


def _float_dtype(root: nn.Module | None) -> torch.dtype | None:
    """The dtype in which a quantised model computes: that of its first parameter which is not quantised."""
    parameters = () if root is None else root.parameters()
    plain = (p.dtype for p in parameters if type(p) is nn.Parameter and p.is_floating_point())
    return next((dtype for dtype in plain if dtype.itemsize >= 2), None)


def features_of(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer of any kind, quantised ones included."""
    in_features, out_features = _get_in_out_features(layer)
    if in_features is None or out_features is None:
        raise BasisError(f"cannot tell the width of a layer of type {type(layer).__name__}")
    return in_features, out_features
