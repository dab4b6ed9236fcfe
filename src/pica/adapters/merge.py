"""A quantised model with its adapter as a plain model in full precision: nothing is rounded a second time."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from pica.errors import QuantisationError
from pica.tuners.base.bank import drop_bank
from pica.tuners.base.frozen_weight import features_of
from pica.tuners.base.layer import SharedLayer
from pica.tuners.base.quantised import backend_of, dequantised


def merge_in_full(model: PeftModel, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Dequantise every quantised layer and merge the active PiCa or SVFT adapters: W_q + dW.

    It computes what the adapter computed on the quantised model, which the unquantised base model with the same update
    would not. It takes the memory and disk space of the unquantised model. `model` is used up.

    Args:
        model: A quantised model with adapters of this package, not merged.
        dtype: Of the weights that are made; sums are formed in at least float32.
    Returns:
        The base model, with plain layers.
    Raises:
        QuantisationError: Something else than this package's adapters is on the model, or one is merged already.
    """
    root: Any = model.get_base_model()
    adapted = [m for m in root.modules() if isinstance(m, SharedLayer)]
    if not adapted or any(m.merged for m in adapted):
        raise QuantisationError(
            "Only a PiCa or SVFT adapter that is not merged yet can be merged in full precision; unmerge it first."
        )
    with torch.no_grad():
        for path, module in list(root.named_modules()):
            layer = module.get_base_layer() if isinstance(module, SharedLayer) else module
            if isinstance(module, SharedLayer) and module.frozen.quantised:
                weight = module.frozen.read().to(torch.float32)
                for name in module.active_adapters:
                    if name in module.group_of:
                        weight = weight + module.get_delta_weight(name)
            elif not path.endswith(".base_layer") and (backend := backend_of(layer, root)) is not None:
                weight = dequantised(layer, backend, features_of(layer)[0], root.dtype)
            else:
                continue
            parent, _, name = path.rpartition(".")
            setattr(root.get_submodule(parent), name, _linear(weight.to(dtype), getattr(layer, "bias", None)))
    plain: Any = model.merge_and_unload()  # what is not quantised, and what was trained in full
    for method in ("pica_M", "svft_T"):
        drop_bank(plain, method)
    quantizer = getattr(plain, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(plain)
    for mark in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(plain, mark, False):
            setattr(plain, mark, False)
    conversions = getattr(plain, "_weight_conversions", None)
    if conversions:  # what unpacked a quantised checkpoint cannot be done backwards, and saving would try
        plain._weight_conversions = [c for c in conversions if not _unpacks(c)]
    return plain.to(dtype)  # only now: transformers does not cast what it takes for quantised


def _unpacks(conversion: Any) -> bool:
    """Whether a step of transformers' loading was asked for by a quantiser."""
    return any(hasattr(operation, "hf_quantizer") for operation in getattr(conversion, "operations", ()))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().to(weight.dtype), requires_grad=False)
    return made
