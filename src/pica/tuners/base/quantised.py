"""Quantised base layers: which kinds can be adapted, their weight in full, and merging into them and out again.

PEFT's quantisation backends dequantise and requantise. Here is what they leave open: the weight of kinds that they cannot
dequantise, bitsandbytes' repacking on the CPU, and putting the quantised weight back as it was.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft.utils.quantization_utils import (
    QuantizationBackend,
    TorchaoBackend,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pica.errors import QuantisationError
from pica.text import first_line

# Backends of PEFT that only run forward, of which a forward pass over the unit vectors is the weight.
_LINEAR_FORWARD_ONLY = ("gptq", "awq", "aqlm", "eetq")
# Packages whose linear layers hold a weight that their forward pass rounds, scales or rotates first: it may look plain.
_QUANTISERS = (
    "auto_gptq", "auto_round", "awq", "bitsandbytes", "compressed_tensors", "fouroversix", "fp_quant", "gptqmodel",
    "modelopt", "neural_compressor", "optimum", "quark", "sinq", "torchao", "torch.ao", "transformer_engine",
    "transformers.integrations", "vptq",
)  # fmt: skip
_UNIT_ROWS = 256  # unit vectors that go through such a layer at a time
SUPPORTED = "bitsandbytes 8-bit and 4-bit, torchao, HQQ, GPTQ, AWQ, AQLM and EETQ"


def backend_of(layer: nn.Module, root: nn.Module | None = None) -> QuantizationBackend | None:
    """Find PEFT's backend for a base layer.

    Args:
        layer: The base layer.
        root: The base model, whose quantiser knows how torchao weights are quantised again.
    Returns:
        None where the layer is not quantised, or in a way that PEFT does not know.
    """
    wanted: dict[str, Any] = {} if root is None else get_quantization_kwargs(root)
    wanted.setdefault("get_apply_tensor_subclass", _no_torchao_recipe)
    backend = resolve_quantization_backend(layer, **wanted)
    if isinstance(backend, TorchaoBackend) and wanted["get_apply_tensor_subclass"] is _no_torchao_recipe:
        backend.supports_merge = False  # quantised by hand: nobody knows how
    return backend


def _no_torchao_recipe() -> Any:
    raise QuantisationError("This torchao layer was quantised outside transformers, so how is not known.")


def kind_of(layer: nn.Module, backend: QuantizationBackend | None) -> str:
    """How a base layer is quantised, in a word or two; "" where it is not. Fingerprints record it."""
    if backend is None:
        return ""
    if backend.backend_name == "bnb 8bit":
        return "bnb int8"
    if backend.backend_name == "bnb 4bit":
        return f"bnb {getattr(layer.weight, 'quant_type', '4bit')}"
    if backend.backend_name == "gptq":
        return _gptqmodel_method(layer)
    return backend.backend_name


def _gptqmodel_method(layer: nn.Module) -> str:
    """What PEFT calls gptq is any layer of GPTQModel, which implements AWQ and other methods as well."""
    methods = [str(getattr(method, "value", method)) for method in getattr(layer, "SUPPORTS_METHODS", None) or ["gptq"]]
    return "gptq" if "gptq" in methods else methods[0]


def problem_of(layer: nn.Module, root: nn.Module | None = None) -> str | None:
    """Why a layer's quantisation keeps it from being adapted, as part of a sentence; None where nothing does."""
    weight = getattr(layer, "weight", None)
    backend = backend_of(layer, root)
    if backend is not None:
        if backend.layer_type == "linear" and (
            backend.supports_merge
            or isinstance(backend, TorchaoBackend)
            or backend.backend_name in _LINEAR_FORWARD_ONLY
        ):
            return None
        return f"it is quantised by {backend.backend_name}, which is not supported; supported are {SUPPORTED}"
    if not isinstance(layer, (nn.Linear, Conv1D, nn.Embedding)):
        return None
    plain = isinstance(weight, Tensor) and weight.is_floating_point() and weight.dtype.itemsize >= 2
    if plain and not (_is_of_quantiser(type(layer)) or _is_of_quantiser(type(weight)) or _has_scheme(layer)):
        return None
    held = f"its weight is {type(weight).__name__}" + (f", {weight.dtype}" if isinstance(weight, Tensor) else "")
    way_out = "; load the model with CompressedTensorsConfig(dequantize=True)" if _has_scheme(layer) else ""
    return f"it is quantised in a way that is not supported ({held}){way_out}; supported are {SUPPORTED}"


def _is_of_quantiser(kind: type) -> bool:
    return any(f"{kind.__module__}.".startswith(f"{package}.") for package in _QUANTISERS)


def _has_scheme(layer: nn.Module) -> bool:
    """Whether compressed-tensors has put its own forward pass into a plain layer."""
    return getattr(layer, "quantization_scheme", None) is not None


def rounds_its_input(layer: nn.Module, backend: QuantizationBackend | None) -> bool:
    """Whether the layer quantises its input too, so that its output is W x only to a few per cent."""
    # A projector that divides by singular values would amplify that, so it reads the input there. bitsandbytes' int8 does
    # so, though not when training on a CPU.
    if backend is None:
        return False
    if backend.backend_name == "bnb 8bit":
        return True
    if backend.backend_name == "gptq":
        return kind_of(layer, backend) not in ("gptq", "awq")  # others may
    weight = getattr(layer, "weight", None)
    marks = ("act_quant_kwargs", "activation_quantization", "input_quant_func")
    return any(getattr(weight, mark, None) is not None for mark in marks)


def dequantised(layer: nn.Module, backend: QuantizationBackend, in_features: int, dtype: torch.dtype) -> Tensor:
    """W (out, in) of a quantised base layer, a new tensor; `dtype` is that of inputs, for kinds that only run forward."""
    if backend.backend_name in _LINEAR_FORWARD_ONLY:
        return _by_forward(layer, in_features, dtype)
    if backend.backend_name == "bnb 4bit":
        undo_cpu_packing(layer)
    with torch.no_grad():
        return backend.get_base_weight(layer).detach()


def _by_forward(layer: nn.Module, in_features: int, dtype: torch.dtype) -> Tensor:
    """W^T as the layer's answers to the unit vectors, less its bias: in slices, without its hooks."""
    # As if for training: GPTQModel's layers else turn to a kernel without a backward pass, see `keep_differentiable`.
    device = next((t.device for t in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))
    bias = getattr(layer, "bias", None)
    columns = []
    for start in range(0, in_features, _UNIT_ROWS):
        count = min(_UNIT_ROWS, in_features - start)
        units = torch.zeros(count, in_features, dtype=dtype, device=device)
        units[torch.arange(count), torch.arange(start, start + count)] = 1
        with torch.enable_grad():
            y = layer.forward(units.requires_grad_()).detach()
        columns.append(y if bias is None else y - bias.detach().to(y.dtype))
    return torch.cat(columns).T.contiguous()


# ---- kernels without a backward pass ---------------------------------------------------------------------------------


def keep_differentiable(model: nn.Module) -> None:
    """Have bitsandbytes and GPTQModel keep to what has a backward pass.

    A layer of theirs that runs once in evaluation mode on a CPU is repacked, for good, for a kernel that has none
    (bitsandbytes' 4-bit layers where there is AVX512-BF16, and their scales are rounded to bfloat16; most of GPTQModel's):
    a model that is evaluated before or between training steps would lose its gradients without a word. On other devices
    this changes nothing for bitsandbytes. What GPTQModel has repacked already cannot be undone.
    """
    for module in model.modules():
        if module.__dict__.get("support_avx512bf16_for_cpu"):
            module.__dict__["support_avx512bf16_for_cpu"] = False
            undo_cpu_packing(module)
        elif (
            "linear_mode" in module.__dict__
            and module.__dict__["linear_mode"] is None
            and _is_of_quantiser(type(module))
        ):
            scales: Any = module.scales
            x = torch.zeros(1, int(module.in_features), dtype=scales.dtype, device=scales.device)  # pyright: ignore[reportArgumentType]
            with torch.enable_grad():
                module.forward(x.requires_grad_())  # the first input decides for all that follow


def tensors_of_states(model: nn.Module) -> list[Tensor]:
    """Tensors that bitsandbytes keeps beside the parameters of its 8-bit layers, after moving them there."""
    # Otherwise the first forward pass moves them, out of the parameter: of two layers that share it, as in a copy of a model
    # that shares its tensors, the second would then find none.
    found = []
    for module in model.modules():
        state = module.__dict__.get("state")
        weight: Any = module._parameters.get("weight")
        if state is None or type(weight).__name__ != "Int8Params":
            continue
        if weight.CB is not None:
            module.init_8bit_state()  # pyright: ignore[reportCallIssue]
        found += [tensor for tensor in (state.CB, state.SCB) if isinstance(tensor, Tensor)]
    return found


def check_differentiable(model: nn.Module) -> None:
    """Refuse to train over layers that have no backward pass: all adapters below one would silently get no gradient.

    Raises:
        QuantisationError: torchao quantises the activations of a layer, or GPTQModel runs it with a kernel for inference.
    """
    for name, module in model.named_modules():
        if type(module).__module__.startswith("gptqmodel."):
            if getattr(module, "SUPPORTS_TRAINING", True) is False:
                raise QuantisationError(
                    f"{name} is a {type(module).__name__} of GPTQModel, and such layers pass no gradient on, so nothing "
                    "below them could be trained. Load the base model with another backend of GPTQModel "
                    "('auto_trainable' or 'torch'); a trained adapter can be loaded onto either."
                )
            if str(getattr(module, "linear_mode", None)).lower().endswith("inference"):
                raise QuantisationError(
                    f"{name} has run in evaluation, and GPTQModel has repacked it there for a kernel that passes no "
                    "gradient on. Load the base model again and put the adapter on it before it runs."
                )
        weight = module._parameters.get("weight")
        if type(weight).__module__.startswith("torchao.") and rounds_its_input(module, backend_of(module)):
            raise QuantisationError(
                f"{name} is quantised by torchao with its activations, and such layers pass no gradient on, so nothing "
                "below them could be trained. Quantise the base model's weights only (Int8WeightOnlyConfig, "
                "IntxWeightOnlyConfig, ...); a trained adapter can be loaded onto either."
            )


def undo_cpu_packing(layer: nn.Module) -> None:
    """Undo the repacking that `keep_differentiable` speaks of, where it has happened; scales stay rounded to bfloat16."""
    weight: Any = layer.weight
    state = weight.quant_state
    if not getattr(state, "packing_format_for_cpu", False):
        return
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

    scales = state.absmax.T.reshape(-1).float().contiguous()  # the inverse forgets these where they are not nested
    state.original_nested = False
    weight.data, state = unpack(weight.data, state)
    state.absmax = scales
    weight.quant_state = state


# ---- merging ---------------------------------------------------------------------------------------------------------


class KeptLayer:
    """A quantised base layer as it was before the first merge: its own packed weight, so that unmerging is exact."""

    def __init__(self, layer: nn.Module) -> None:
        """Note what `layer` holds; nothing is copied but references, since backends put new tensors in place."""
        self.layer = layer
        self._attributes = dict(layer.__dict__)
        self._parameters = dict(layer._parameters)
        self._buffers = dict(layer._buffers)
        self._state = copy.copy(layer.__dict__.get("state"))  # bitsandbytes 8-bit: emptied in place
        self._of_weight: dict[str, Any] = dict(getattr(layer._parameters.get("weight"), "__dict__", {}))

    def view(self) -> nn.Module:
        """A stand-in for the layer with its old tensors, to dequantise from; it is never called."""
        self._restore_weight_attributes()
        twin = copy.copy(self.layer)
        twin.__dict__ = {**self._attributes, "_parameters": self._parameters, "_buffers": self._buffers}
        if self._state is not None:
            twin.__dict__["state"] = copy.copy(self._state)
        return twin

    def restore(self) -> nn.Module:
        """The layer, as it was."""
        self._restore_weight_attributes()
        self.layer.__dict__.pop("weight", None)
        for key in ("quant_state",):
            if key in self._attributes:
                self.layer.__dict__[key] = self._attributes[key]
        if self._state is not None:
            self.layer.__dict__["state"] = self._state
        self.layer._parameters.clear()
        self.layer._parameters.update(self._parameters)
        self.layer._buffers.clear()
        self.layer._buffers.update(self._buffers)
        return self.layer

    def _restore_weight_attributes(self) -> None:
        # requantising 4-bit weights marks the old parameter as not yet quantised
        weight: Any = self._parameters.get("weight")
        if weight is not None:
            for key, value in self._of_weight.items():
                if not key.startswith("_") and weight.__dict__.get(key) is not value:
                    weight.__dict__[key] = value
            for key in ("requires_grad", "data"):
                if key not in self._of_weight:
                    weight.__dict__.pop(key, None)


def carry_over(old: nn.Module, new: nn.Module) -> None:
    """Give the layer that PEFT has put in the place of `old` (HQQ's) what else that had: PEFT leaves out the bias."""
    if new is old:
        return
    new.bias = old.bias  # pyright: ignore[reportArgumentType]
    new.train(old.training)
    for key, value in old.__dict__.items():
        new.__dict__.setdefault(key, value)


def requantise(set_weight: Callable[[Tensor], None], weight: Tensor, kept: KeptLayer, name: str, kind: str) -> None:
    """Quantise `weight` into the base layer in the way it was quantised before.

    Raises:
        QuantisationError: the library could not; the layer is as it was.
    """
    try:
        with torch.no_grad():
            set_weight(weight)
    except Exception as error:  # whatever a quantisation library raises
        kept.restore()
        raise QuantisationError(
            f"{name}: the merged weight could not be quantised again as {kind} ({first_line(error)}). Merge into the "
            "unquantised base model instead (pica merge), or leave the adapter unmerged."
        ) from error
