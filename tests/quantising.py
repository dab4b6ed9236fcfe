"""Ways in which the tests quantise a model, with the libraries that do it. What is not installed is skipped, and says so."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from pica.tuners.base.quantised import keep_differentiable

_BNB = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
_TORCHAO = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
_HQQ = pytest.mark.skipif(find_spec("hqq") is None, reason="hqq is not installed")

WEIGHT_ONLY: list[Any] = [
    pytest.param("bnb nf4", marks=_BNB),
    pytest.param("bnb nf4 double", marks=_BNB),
    pytest.param("bnb fp4", marks=_BNB),
    pytest.param("torchao int8", marks=_TORCHAO),
    pytest.param("torchao int4", marks=_TORCHAO),
    pytest.param("torchao float8", marks=_TORCHAO),
    pytest.param("hqq int4", marks=_HQQ),
]
WEIGHT_ONLY_NAMES = {parameter.values[0] for parameter in WEIGHT_ONLY}
KINDS: list[Any] = [
    *WEIGHT_ONLY,
    pytest.param("bnb int8", marks=_BNB),
    pytest.param("torchao int8 dynamic", marks=_TORCHAO),
]


def load_quantised(folder: Any, kind: str | None, **more: Any) -> Any:
    """The causal language model in `folder`, quantised on the way, in float32 where not said otherwise."""
    options = {"dtype": torch.float32, **more}
    if kind is not None and not kind.startswith("hqq"):
        options["quantization_config"] = _config_of(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries' own deprecations
        model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        if kind is not None and kind.startswith("hqq"):
            _replace_by_hqq(model)
    keep_differentiable(model)  # on CPUs with AVX512-BF16 a forward pass would round the scales to bfloat16
    return model


def _replace_by_hqq(model: Any) -> None:
    """As hqq's own AutoHQQHFModel does; transformers' HqqConfig is not available in its version 5."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for path, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and path != "lm_head":
            made = HQQLinear(
                layer, BaseQuantizeConfig(nbits=4, group_size=64), compute_dtype=layer.weight.dtype, device="cpu"
            )
            model.set_submodule(path, made)


def _config_of(kind: str) -> BitsAndBytesConfig | TorchAoConfig:
    if kind == "bnb int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if kind.startswith("bnb"):
        _, code, *rest = kind.split()
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=code, bnb_4bit_use_double_quant=rest == ["double"]
        )
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
    )
    from torchao.quantization.granularity import PerGroup

    made = {
        "torchao int8": Int8WeightOnlyConfig,
        "torchao int8 dynamic": Int8DynamicActivationInt8WeightConfig,
        "torchao int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),  # pyright: ignore[reportAttributeAccessIssue]
        "torchao float8": Float8WeightOnlyConfig,
    }
    return TorchAoConfig(made[kind]())
