"""An adapter that cannot be added as a whole leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import TaskType, get_peft_model
from peft.mapping import inject_adapter_in_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from pica import PicaConfig
from pica.errors import ConfigError, ModuleError
from pica.tuners.base.bank import find_banks
from pica.tuners.pica.layer import PicaLinear

IDS = torch.arange(6)[None]
# What PEFT itself refuses, after the method's layers are in the model:
MISFITS: list[dict[str, Any]] = [
    {"trainable_token_indices": [10**6]},
    {"trainable_token_indices": {"no_such_embedding.": [1], "embed_tokens": [10**6]}},
    {"modules_to_save": ["embed_tokens"], "trainable_token_indices": {"embed_tokens": [1]}},
]


@pytest.fixture
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval()


def anatomy(model: nn.Module) -> tuple[list[tuple[str, type]], list[tuple[str, bool]]]:
    modules = [(name, type(module)) for name, module in model.named_modules()]
    return modules, [(name, p.requires_grad) for name, p in model.named_parameters()]


@pytest.mark.parametrize("misfit", MISFITS, ids=str)
def test_a_refused_first_adapter_leaves_no_trace(base: PreTrainedModel, misfit: dict[str, Any]):
    before, logits = anatomy(base), base(IDS).logits
    with pytest.raises((ValueError, IndexError)):
        get_peft_model(base, PicaConfig(r=2, **misfit))
    assert anatomy(base) == before
    assert torch.equal(base(IDS).logits, logits)
    assert sum(isinstance(m, PicaLinear) for m in get_peft_model(base, PicaConfig(r=2)).modules()) == 10


@pytest.mark.parametrize("misfit", MISFITS, ids=str)
def test_a_refused_second_adapter_leaves_the_first_as_it_was(base: PreTrainedModel, misfit: dict[str, Any]):
    model = get_peft_model(base, PicaConfig(r=2, target_modules=["q_proj"], init_weights=False))
    before, logits = anatomy(model), model(IDS).logits
    with pytest.raises((ValueError, IndexError)):
        model.add_adapter("second", PicaConfig(r=3, target_modules=["q_proj", "up_proj"], **misfit))
    assert anatomy(model) == before
    assert torch.equal(model(IDS).logits, logits)
    assert list(model.peft_config) == ["default"]
    assert [list(bank) for _, bank in find_banks(model)] == [["default"]]
    model.add_adapter("second", PicaConfig(r=3, target_modules=["q_proj", "up_proj"]))  # its name is free
    assert torch.equal(model(IDS).logits, logits)


def test_a_refused_adapter_leaves_the_active_one_active_without_a_peft_model(base: PreTrainedModel):
    inject_adapter_in_model(PicaConfig(r=2, target_modules=["q_proj"], init_weights=False), base, "first")
    before, logits = anatomy(base), base(IDS).logits
    with pytest.raises((ValueError, IndexError)):
        inject_adapter_in_model(PicaConfig(r=2, trainable_token_indices=[10**6]), base, "second")
    assert anatomy(base) == before
    assert torch.equal(base(IDS).logits, logits)


def test_a_refused_adapter_leaves_the_active_one_of_several_active(base: PreTrainedModel):
    for name in ("first", "second"):
        inject_adapter_in_model(PicaConfig(r=2, target_modules=["q_proj"], init_weights=False), base, name)
    layers = [m for m in base.modules() if isinstance(m, PicaLinear)]
    for layer in layers:
        layer.set_adapter("second")
    before, logits = anatomy(base), base(IDS).logits
    with pytest.raises((ValueError, IndexError)):
        inject_adapter_in_model(
            PicaConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[10**6]), base, "third"
        )
    assert {tuple(layer.active_adapters) for layer in layers} == {("second",)}
    assert anatomy(base) == before
    assert torch.equal(base(IDS).logits, logits)


@pytest.mark.parametrize(
    ("misfit", "message"),
    [
        (
            {"trainable_token_indices": {"default": []}},
            "'default' in modules_to_save .* matches the adapter's own matrices",
        ),
        ({"modules_to_save": ["lm_head", ""]}, "'' in modules_to_save .* matches the adapter's own matrices"),
        ({"trainable_token_indices": {"self_attn": [0]}}, "PEFT cannot train that way .*: 'self_attn'"),
    ],
)
def test_modules_that_cannot_be_trained_beside_the_adapter_are_named(base: PreTrainedModel, misfit: Any, message: str):
    before = anatomy(base)
    with pytest.raises(ConfigError, match=message):
        get_peft_model(base, PicaConfig(r=2, **misfit))
    assert anatomy(base) == before


def test_a_container_is_refused_with_the_type_that_peft_raises(base: PreTrainedModel):
    with pytest.raises(ModuleError, match="cannot be applied to modules of type"):
        get_peft_model(base, PicaConfig(r=2, target_modules=["lm_head"], modules_to_save=["layers"]))
    assert issubclass(ModuleError, TypeError)


@pytest.mark.parametrize("task_type", [TaskType.CAUSAL_LM, "SEQ_2_SEQ_LM"])
def test_a_task_type_that_generates_needs_a_model_that_does(task_type: str):
    base = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"needs a model that generates text, and Sequential does not"):
        get_peft_model(base, PicaConfig(r=2, target_modules=["0"], task_type=task_type))  # pyright: ignore[reportArgumentType]
    assert type(base[0]) is nn.Linear
