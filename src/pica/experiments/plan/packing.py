"""bitsandbytes' quantised weights without content: its layers on the meta device, and what they hold once quantised.

Nothing is restated here: transformers chooses and exchanges the layers, and bitsandbytes' own code, run on tensors that
have a shape and no content, says into what a weight is packed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer


def quantise(model: PreTrainedModel, config: BitsAndBytesConfig, dtype: torch.dtype) -> None:
    """Exchange the layers of a model on the meta device that loading it with `config` would quantise.

    Their weights still have the shape of the unquantised ones; see `packed`.

    Args:
        model: On the meta device.
        config: As `from_pretrained` takes it.
        dtype: Of the model before quantisation.
    """
    quantiser: Any = AutoHfQuantizer.from_config(config, pre_quantized=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # that of the layers which are made, biases included
    try:
        quantiser.preprocess_model(model=model, device_map=None)
    finally:
        torch.set_default_dtype(before)
    quantiser.postprocess_model(model)
    model.hf_quantizer = quantiser  # pyright: ignore[reportAttributeAccessIssue]


def is_unpacked(tensor: Tensor) -> bool:
    """Whether this is a weight that bitsandbytes packs when it leaves the meta device."""
    return tensor.is_meta and type(tensor).__name__ in ("Params4bit", "Int8Params")


def packed(parameter: Any) -> nn.Parameter:
    """What stands in a quantised layer in the place of `parameter`; to be called among fake tensors."""
    # It is a plain parameter with the attributes that the layer looks for, since bitsandbytes' own class hides from torch
    # that a tensor has no content.
    from bitsandbytes import functional

    weight = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
    if type(parameter).__name__ == "Params4bit":
        _fill_tables()
        data, state = functional.quantize_4bit(
            weight,
            blocksize=parameter.blocksize,
            compress_statistics=parameter.compress_statistics,
            quant_type=parameter.quant_type,
            quant_storage=parameter.quant_storage,
        )
        made: Any = nn.Parameter(data, requires_grad=False)
        made.quant_state = state
        made.quant_type = parameter.quant_type
    else:
        data, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        made = nn.Parameter(data, requires_grad=False)
        made.CB, made.SCB, made.has_fp16_weights = made.data, scales, False
    return made


def parts(parameter: Any) -> list[Tensor]:
    """All tensors that belong to a weight: of a packed one its scales and tables too."""
    found: list[Tensor] = [parameter]
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        found += [t for t in (state.absmax, state.code, getattr(state, "offset", None)) if isinstance(t, Tensor)]
        state = getattr(state, "state2", None)
    return found + [t for t in (getattr(parameter, "SCB", None),) if isinstance(t, Tensor)]


def resting_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, packed where they will be; what is tied counts once."""
    total = 0
    known: dict[tuple[Any, ...], int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_unpacked(tensor):
            total += tensor.nbytes
            continue
        key = (*tensor.shape, tensor.dtype)
        if key not in known:
            with FakeTensorMode(allow_non_fake_inputs=True):
                known[key] = sum(part.nbytes for part in parts(packed(tensor)))
        total += known[key]
    return total


def _fill_tables() -> None:
    """Have bitsandbytes make the table that it keeps for all layers, with content."""
    from bitsandbytes import functional

    if "dynamic" not in functional.name2qmap:
        from torch._subclasses.fake_tensor import unset_fake_temporarily

        with unset_fake_temporarily():
            functional.name2qmap["dynamic"] = functional.create_dynamic_map()
