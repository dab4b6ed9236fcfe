"""Stacks of experts' weights: against the plain formula, and in every file."""

from __future__ import annotations

import re
import sys
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import pica
from pica import PicaConfig, coverage
from pica.errors import BasisMismatchError, ConfigError, ExportError, TargetError
from pica.tuners.pica.experts import AdaptedExperts, PicaExpert
from tests.families import inputs_of, make

STACKS = ["experts.gate_up_proj", "experts.down_proj"]
INPUT_FIRST = {"GptOssForCausalLM", "Llama4ForCausalLM"}  # (experts, in, out)
MODELS = ["Qwen3MoeForCausalLM", "MixtralForCausalLM", "DeepseekV3ForCausalLM", *sorted(INPUT_FIRST)]


def adapter(**settings: Any) -> PicaConfig:
    return PicaConfig(**{"r": 3, "target_modules": [], "target_parameters": STACKS, "init_weights": False, **settings})


def make_double(name: str) -> Any:
    model = make(name).double()
    model.set_experts_implementation("eager")  # the grouped kernel knows no float64
    return model


def logits(model: nn.Module, name: str, **more: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs_of(name, model), **more).logits


def experts_of(model: nn.Module) -> dict[str, AdaptedExperts]:
    return {path: m for path, m in model.named_modules() if isinstance(m, AdaptedExperts)}


@pytest.mark.parametrize("name", MODELS)
def test_each_expert_is_w_plus_m_p_with_its_own_p_and_the_roles_m(name: str):
    model = get_peft_model(make_double(name), adapter())
    groups = {m.group_of["default"] for m in model.modules() if isinstance(m, PicaExpert)}
    assert len(groups) == 2  # all experts of all blocks: one M for gate_up_proj, one for down_proj
    by_hand = make_double(name)
    for path, wrapper in experts_of(model).items():
        for parameter, layers in wrapper.stacks().items():
            stack = by_hand.get_submodule(path.removeprefix("base_model.model.")).get_parameter(parameter)
            for layer, weight in zip(layers, stack.data, strict=True):
                w = weight.T if name in INPUT_FIRST else weight  # (out, in)
                rows = torch.linalg.svd(w)[2][:3]
                own = layer.method.directions("principal", layer.frozen.read())
                rows = rows * torch.sign((rows * own).sum(1, keepdim=True))
                torch.testing.assert_close(own, rows, atol=1e-6, rtol=1e-6)
                matrix = layer.matrix("default").detach()
                assert matrix.shape == (w.shape[0], 3)
                w += matrix @ rows
    torch.testing.assert_close(logits(model, name), logits(by_hand, name), atol=1e-9, rtol=1e-7)
    with model.disable_adapter():
        assert torch.equal(logits(model, name), logits(make_double(name), name))


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "GptOssForCausalLM"])
def test_gradients_are_those_of_the_formula(name: str):
    model = get_peft_model(make_double(name), adapter()).eval()
    batch = inputs_of(name, model)
    model(**batch).logits.square().sum().backward()
    by_hand = make_double(name)
    leaves = {}
    for path, wrapper in experts_of(model).items():
        for parameter, layers in wrapper.stacks().items():
            matrix = layers[0].matrix("default").detach()
            leaf = leaves.setdefault(parameter, matrix.clone().requires_grad_())
            updates = torch.stack(
                [leaf @ layer.method.directions("principal", layer.frozen.read()) for layer in layers]
            )
            module = by_hand.get_submodule(path.removeprefix("base_model.model."))
            stack = module._parameters.pop(parameter)
            setattr(module, parameter, stack.detach() + (updates.mT if name in INPUT_FIRST else updates))  # pyright: ignore
    by_hand(**batch).logits.square().sum().backward()
    first = next(iter(experts_of(model).values()))
    for parameter, layers in first.stacks().items():
        gradient = layers[0].matrix("default").grad
        assert gradient is not None
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, leaves[parameter].grad, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("save_basis", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_trained_saved_loaded_merged_and_exported(name: str, save_basis: bool, tmp_path: Path):
    base = logits(make(name), name)
    attention = "kv_b_proj" if name == "DeepseekV3ForCausalLM" else "q_proj"
    model = get_peft_model(make(name), adapter(target_modules=[attention], init_weights=True, save_basis=save_basis))
    torch.testing.assert_close(logits(model, name), base, atol=1e-6, rtol=1e-6)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 3
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    model.train()
    for _ in range(2):
        model(**inputs_of(name, model)).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = logits(model, name)
    assert (after - base).abs().max() > 1e-3 * after.abs().max()

    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(make(name), tmp_path / "adapter")
    assert torch.equal(logits(loaded, name), after)
    loaded.merge_adapter()
    torch.testing.assert_close(logits(loaded, name), after, atol=1e-5, rtol=1e-4)
    loaded.unmerge_adapter()
    plain = dict(make(name).named_parameters())
    for path, stack in loaded.get_base_model().named_parameters():
        if path.endswith("_proj") and stack.ndim == 3:
            assert torch.equal(stack, plain[path.replace(".base_layer", "")])

    pica.export_lora(loaded, tmp_path / "lora")
    lora = PeftModel.from_pretrained(make(name), tmp_path / "lora")
    assert isinstance(lora.base_model, peft.LoraModel)
    torch.testing.assert_close(logits(lora, name), after, atol=1e-5, rtol=1e-4)
    pica.export_lora(loaded, tmp_path / "small", rank=1)  # its error is checked against the known one
    with pytest.raises(ExportError, match=r"vllm cannot load a LoRA on experts' parameters"):
        pica.export_lora(loaded, tmp_path / "served", engine="vllm")

    merged = loaded.merge_and_unload()  # pyright: ignore[reportCallIssue]
    assert not experts_of(merged)
    assert [n for n, _ in merged.named_parameters()] == list(plain)
    torch.testing.assert_close(logits(merged, name), after, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("share", "matrices"), [("none", 8), (2, 4), ({r"gate_up_proj\.[01]": "early"}, 3)])
def test_experts_can_share_otherwise(share: Any, matrices: int):
    name = "Qwen3MoeForCausalLM"  # one block of four experts
    model = get_peft_model(make_double(name), adapter(share=share))
    assert len([p for p in model.parameters() if p.requires_grad]) == matrices
    apart = logits(model, name)
    torch.testing.assert_close(logits(model.merge_and_unload(), name), apart, atol=1e-9, rtol=1e-7)


def test_second_adapters_are_added_switched_and_deleted_and_cannot_be_mixed():
    name = "GptOssForCausalLM"
    model: Any = get_peft_model(make(name), adapter())
    first = logits(model, name)
    model.add_adapter("b", adapter(r=2, target_parameters=["down_proj"]))
    model.set_adapter("b")
    second = logits(model, name)
    assert not torch.allclose(first, second, atol=1e-3)
    model.set_adapter("default")
    torch.testing.assert_close(logits(model, name), first)
    with pytest.raises(ValueError, match="cannot be mixed in a batch"):
        logits(model, name, adapter_names=["default", "b"])
    model.base_model.set_adapter(["default", "b"])
    both = logits(model, name)
    model.merge_adapter(["default", "b"])
    torch.testing.assert_close(logits(model, name), both, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    model.delete_adapter("default")
    model.set_adapter("b")
    torch.testing.assert_close(logits(model, name), second)


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "MixtralForCausalLM"])
def test_basis_from_leaves_the_experts_their_own_weights(name: str, tmp_path: Path):
    """A checkpoint holds them apart, or under other names; and they are never quantised."""
    make(name).save_pretrained(tmp_path / "base")
    settings = {"target_modules": ["q_proj"], "basis_from": str(tmp_path / "base")}
    torch.manual_seed(0)
    model = get_peft_model(make(name), adapter(**settings))
    torch.manual_seed(0)
    without = get_peft_model(make(name), adapter(target_modules=["q_proj"]))
    assert torch.equal(logits(model, name), logits(without, name))
    model.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(make(name), str(tmp_path / "adapter"))
    assert torch.equal(logits(again, name), logits(model, name))


def test_a_trained_adapter_is_not_saved_over_other_experts(tmp_path: Path):
    model = get_peft_model(make("MixtralForCausalLM"), adapter())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 1
        for path, wrapper in experts_of(model).items():
            for name in wrapper.stacks():
                stack = model.get_submodule(f"{path}.base_layer").get_parameter(name)
                stack.copy_(torch.randn(stack.shape))
    with pytest.raises(BasisMismatchError, match=r"weights were replaced.*experts.*the basis of the old ones"):
        model.save_pretrained(str(tmp_path))


def test_coverage_counts_experts_and_ranks_differ_by_stack():
    model = get_peft_model(make("Qwen3MoeForCausalLM"), adapter(rank_pattern={"experts.down_proj": 5}))
    rows = {row.pattern: row for row in coverage(model).rows}
    assert {k: (r.layers, r.rank, r.trainable) for k, r in rows.items()} == {
        "gate_up_proj": (4, 3, 3 * 32),
        "down_proj": (4, 5, 5 * 32),
    }


@pytest.mark.parametrize(
    ("settings", "error", "why"),
    [
        (
            {"target_parameters": ["experts.up"]},
            TargetError,
            r"'experts.up'\} not found.*it has: gate_up_proj, down_proj",
        ),
        ({"target_parameters": ["q_proj.weight"]}, TargetError, r"q_proj.weight of a Linear has shape \(32, 32\)"),
        ({"layers_to_transform": [0]}, ConfigError, "layers_to_transform does not go with target_parameters"),
        ({"target_parameters": "experts"}, ConfigError, "target_parameters"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_the_model_left_as_it_was(settings: dict, error: Any, why: str):
    base = make("Qwen3MoeForCausalLM")
    with pytest.raises(error, match=why):
        get_peft_model(base, adapter(**settings))
    assert not [n for n, _ in base.named_modules() if re.search("pica|expert_adapters", n)]


@pytest.mark.parametrize(
    ("name", "hooked"), [("MixtralForCausalLM", False), ("GptOssForCausalLM", False), ("MixtralForCausalLM", True)]
)
def test_threads_may_run_one_model(name: str, hooked: bool):
    """Nothing is written into the experts' module, so what one thread computes never reaches another."""
    model = get_peft_model(make(name), adapter(target_modules=["q_proj"])).eval()
    if hooked:  # Accelerate's put a forward of their own into the module
        expected = logits(model, name)
        for module in model.modules():
            if isinstance(module, AdaptedExperts):
                add_hook_to_module(module.base_layer, ModelHook())
        torch.testing.assert_close(logits(model, name), expected)
    inputs = [{k: v.roll(i, -1) for k, v in inputs_of(name, model).items()} for i in range(4)]
    with torch.no_grad():
        expected = [model(**each).logits for each in inputs]
    wrong: list[object] = []

    def work(index: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(10):
                    torch.testing.assert_close(model(**inputs[index % 4]).logits, expected[index % 4])
        except Exception as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
