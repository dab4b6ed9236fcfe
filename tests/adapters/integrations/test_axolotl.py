"""The plug-in against axolotl's documented interface; tools/check_axolotl.py trains with axolotl itself."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from peft import PeftModel
from torch import nn

import pica
from pica.errors import ConfigError

NAME = "pica.adapters.integrations.axolotl"


@dataclass(frozen=True)
class AdapterCapabilities:
    """The fields of axolotl's."""

    name: str
    lora_like: bool = False
    relora: bool = False


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    base: Any = ModuleType("axolotl.integrations.base")
    base.BasePlugin, base.AdapterCapabilities = type("BasePlugin", (), {}), AdapterCapabilities
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    sys.modules.pop(NAME, None)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME, None)


class Settings(SimpleNamespace):
    """axolotl's settings: what is not set is None."""

    def __getattr__(self, name: str) -> None:
        return None


def test_it_offers_both_methods_and_leaves_others_alone(plugin: Any) -> None:
    made = plugin.PicaPlugin()
    assert [each.name for each in made.get_adapter_capabilities()] == ["pica", "svft"]
    assert made.load_adapter(nn.Linear(2, 2), Settings(adapter="lora")) is None
    module, _, name = made.get_input_args().rpartition(".")
    assert getattr(importlib.import_module(module), name)(pica={"share": "none"}).pica == {"share": "none"}


def test_settings_become_the_configuration(plugin: Any) -> None:
    cfg = Settings(adapter="pica", lora_r=6, lora_target_modules=["q_proj"], lora_alpha=16, lora_dropout=0.0)
    cfg.pica = {"share": "none", "projection": "minor"}
    config = plugin.adapter_config(cfg, "LlamaForCausalLM")
    assert isinstance(config, pica.PicaConfig)
    assert (config.r, config.target_modules, config.share, config.projection) == (6, {"q_proj"}, "none", "minor")
    assert config.task_type == "CAUSAL_LM"
    linear = plugin.adapter_config(Settings(adapter="svft", lora_target_linear=True), "BertForSequenceClassification")
    assert (type(linear), linear.target_modules, linear.task_type) == (pica.SvftConfig, "all-linear", "SEQ_CLS")


def test_settings_without_a_meaning_are_refused(plugin: Any) -> None:
    for wrong in ({"lora_dropout": 0.1}, {"peft_use_dora": True}, {"loraplus_lr_ratio": 4}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            plugin.adapter_config(Settings(adapter="pica", **wrong), "LlamaForCausalLM")
    with pytest.raises(ConfigError, match="banana"):
        plugin.adapter_config(Settings(adapter="pica", pica={"banana": 1}), "LlamaForCausalLM")


def test_a_model_gets_the_adapter_and_a_saved_one_goes_on(
    plugin: Any, tiny_llama: Callable[..., nn.Module], tmp_path: Path
) -> None:
    cfg = Settings(adapter="pica", lora_r=6, lora_target_modules=["q_proj"])
    made = plugin.PicaPlugin()
    assert made.load_adapter(tiny_llama(), cfg, config_only=True)[0] is None
    model, config = made.load_adapter(tiny_llama(), cfg)
    assert isinstance(model, PeftModel)
    assert model.peft_config["default"] is config
    model.save_pretrained(str(tmp_path))
    again, _ = made.load_adapter(tiny_llama(), Settings(**vars(cfg), lora_model_dir=str(tmp_path)))
    assert any(p.requires_grad for p in again.parameters())
    frozen, _ = made.load_adapter(tiny_llama(), Settings(**vars(cfg), lora_model_dir=str(tmp_path)), inference=True)
    assert not any(p.requires_grad for p in frozen.parameters())
