"""One tiny model of each family: adapted with default targets, trained, saved, loaded, merged, exported."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import pica
from pica import PicaConfig, SvftConfig
from pica.errors import ExportError, TargetError
from pica.tuners.base.default_targets import DEFAULT_TARGETS
from pica.tuners.base.layer import SharedLayer
from tests.families import FAMILIES, config_of, inputs_of, make

# what no default may touch: routers, gates of shared experts, heads, and what a language model sees or hears with
LEFT_ALONE = re.compile(r"(router|shared_expert_gate|lm_head|vision_tower|vision_model|visual|multi_modal)")
SEES = {"clip", "siglip", "sam"}  # whose vision part is meant


def output(model: nn.Module, name: str) -> Tensor:
    found: Any = model(**inputs_of(name, model))
    for key in ("logits", "pred_masks", "logits_per_image", "last_hidden_state"):
        if isinstance(found.get(key), Tensor):
            return found[key]
    raise AssertionError(f"{name} returns {list(found)}")


def result(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return output(model.eval(), name)


@pytest.mark.parametrize("name", FAMILIES)
def test_default_targets_train_save_load_merge_and_export(name: str, tmp_path: Path):
    base = result(make(name), name)
    model = get_peft_model(make(name), PicaConfig(r=4))
    torch.testing.assert_close(result(model, name), base, atol=1e-6, rtol=1e-6)
    adapted = [m.path for m in model.modules() if isinstance(m, SharedLayer)]
    family = config_of(name).model_type
    assert family in SEES or not [path for path in adapted if LEFT_ALONE.search(path)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.003)
    losses = []
    for _ in range(3):
        loss = (output(model, name) - base.roll(1, -1)).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    after = result(model, name)
    scale = float(after.abs().max())
    assert (after - base).abs().max() > 1e-3 * scale

    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(make(name), tmp_path / "adapter")
    torch.testing.assert_close(result(loaded, name), after, atol=1e-5 * scale, rtol=1e-4)
    pica.export_lora(model, tmp_path / "lora", check_inputs=inputs_of(name, make(name)))
    lora = PeftModel.from_pretrained(make(name), tmp_path / "lora")
    assert isinstance(lora.base_model, peft.LoraModel)
    torch.testing.assert_close(result(lora, name), after, atol=1e-4 * scale, rtol=1e-3)
    merged = loaded.merge_and_unload()  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(result(merged, name), after, atol=1e-4 * scale, rtol=1e-3)


def test_every_default_target_list_is_tried_by_a_model():
    tried = {config_of(name).model_type for name in FAMILIES}
    known = set(CONFIG_MAPPING_NAMES)
    parts = {"clip_text_model", "clip_vision_model", "siglip_text_model", "siglip_vision_model"}  # of one that is tried
    assert set(DEFAULT_TARGETS) & known - tried - parts == set()
    assert set(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING) <= set(DEFAULT_TARGETS)


@pytest.mark.parametrize("method", [PicaConfig, SvftConfig])
@pytest.mark.parametrize(
    ("name", "target", "why"),
    [
        ("MambaForCausalLM", "out_proj", "never calls this layer"),
        ("FalconMambaForCausalLM", "x_proj", "never calls this layer"),
        ("Mamba2ForCausalLM", "conv1d", "never calls this layer"),
        ("SiglipModel", "head.attention.out_proj", "never calls this layer"),
        ("RwkvForCausalLM", "attention.output", "rescales this layer's weight"),
        ("PhimoeForCausalLM", "mlp.router", "it routes tokens to experts"),
        ("Llama4ForCausalLM", "all-linear", "it routes tokens to experts"),
    ],
)
def test_layers_that_an_adapter_would_not_reach_are_refused(name: str, target: str, why: str, method: Any):
    with pytest.raises(TargetError, match=rf"{why}.*exclude_modules"):
        get_peft_model(make(name), method(target_modules=target if target == "all-linear" else [target]))


@pytest.mark.parametrize("name", ["Qwen2MoeForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM"])
def test_all_linear_layers_of_a_mixture_are_neither_routers_nor_experts(name: str):
    model = get_peft_model(make(name), PicaConfig(r=2, target_modules="all-linear"))
    names = {m.path for m in model.modules() if isinstance(m, SharedLayer)}
    assert any(n.endswith("self_attn.o_proj") for n in names)
    assert not any(re.search(r"(router|mlp\.gate$|experts\.\d)", n) for n in names)


@pytest.mark.parametrize("targets", [["up_proj"], ["gate_proj", "up_proj", "down_proj"]])
def test_a_lora_that_peft_would_put_on_the_experts_is_not_written(targets: list[str], tmp_path: Path):
    """PEFT reads these names in a LoRA as those that the experts had before transformers 5."""
    name = "DeepseekV3ForCausalLM"
    model = get_peft_model(make(name), PicaConfig(r=2, target_modules=targets))
    with pytest.raises(ExportError, match=r"of a deepseek_v3 model as one on its experts.*check=False"):
        pica.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
    pica.export_lora(model, tmp_path / "lora", check=False)
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


def test_the_page_of_models_names_every_family_with_defaults():
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
    first_table = page.split("## Which layers")[0]
    rows = {
        name: row for row in first_table.splitlines() if row.startswith("|") for name in re.findall(r"`([^`]+)`", row)
    }
    assert set(DEFAULT_TARGETS) <= set(rows)
    for family in ("phi3", "glm4", "rwkv", "sam", "albert", "deepseek_v3", "starcoder2", "mamba2", "gpt_oss"):
        assert all(f"`{target}`" in rows[family] for target in DEFAULT_TARGETS[family])
