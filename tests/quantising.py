"""Ways in which the tests quantise a model, with the libraries that do it. What is not installed is skipped, and says so."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
from transformers import BitsAndBytesConfig, TorchAoConfig

_BNB = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
_TORCHAO = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")

WEIGHT_ONLY: list[Any] = [
    pytest.param("bnb nf4", marks=_BNB),
    pytest.param("bnb nf4 double", marks=_BNB),
    pytest.param("bnb fp4", marks=_BNB),
    pytest.param("torchao int8", marks=_TORCHAO),
    pytest.param("torchao int4", marks=_TORCHAO),
]
WEIGHT_ONLY_NAMES = {parameter.values[0] for parameter in WEIGHT_ONLY}
KINDS: list[Any] = [
    *WEIGHT_ONLY,
    pytest.param("bnb int8", marks=_BNB),
    pytest.param("torchao int8 dynamic", marks=_TORCHAO),
]


def quantisation(kind: str) -> dict[str, Any]:
    """Arguments of `from_pretrained`."""
    if kind.startswith("bnb int8"):
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    if kind.startswith("bnb"):
        _, code, *rest = kind.split()
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=code, bnb_4bit_use_double_quant=rest == ["double"]
        )
        return {"quantization_config": config}
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    made = {
        "torchao int8": Int8WeightOnlyConfig,
        "torchao int8 dynamic": Int8DynamicActivationInt8WeightConfig,
        "torchao int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),  # pyright: ignore[reportAttributeAccessIssue]
    }
    return {"quantization_config": TorchAoConfig(made[kind]())}
