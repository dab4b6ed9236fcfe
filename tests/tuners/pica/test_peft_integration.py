"""What users of PEFT do with PiCa, beyond what holds for both methods (`tests/tuners/test_laws.py`)."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any, cast

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

import pica
from pica import PicaConfig
from pica.errors import ConfigError
from tests.shared import IDS, logits


def config(**settings) -> PicaConfig:
    return PicaConfig(**{"r": 8, "init_weights": False, "task_type": "CAUSAL_LM", **settings})


def train_a_step(model: nn.Module, learning_rate: float = 0.1) -> None:
    model.train()
    model(IDS, labels=IDS).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate).step()
    model.zero_grad()
    model.eval()


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if ".pica_M." in f".{n}"}


# ---- files -----------------------------------------------------------------------------------------------------------


def test_low_cpu_mem_usage_leaves_new_matrices_on_the_meta_device(tiny_llama):
    model = get_peft_model(tiny_llama(), config(), low_cpu_mem_usage=True)
    assert all(p.is_meta for p in matrices(model).values())
    assert not any(b.is_meta for b in model.buffers())


def test_each_matrix_is_in_the_file_once(tiny_llama):
    state = get_peft_model_state_dict(get_peft_model(tiny_llama(), config()))
    roles = ["self_attn-q_proj-64", "self_attn-k_proj-32", "self_attn-v_proj-32", "mlp-up_proj-112", "mlp-down_proj-64"]
    keys = {f"base_model.model.pica_M.model-layers-N-{role}" for role in roles}
    assert set(state) - keys == {"base_model.model.pica_M.fingerprint"}
    assert keys <= set(state)


@pytest.mark.parametrize("wrap", ["base", "root of the tuner", "whole"])
def test_files_of_compiled_models_are_plain_files(tiny_llama, tmp_path, wrap):
    expected = set(get_peft_model_state_dict(get_peft_model(tiny_llama(), config())))
    model: Any
    if wrap == "base":
        model = get_peft_model(cast(nn.Module, torch.compile(tiny_llama())), config())
    else:
        model = get_peft_model(tiny_llama(), config())
        if wrap == "whole":
            model = torch.compile(model)
        else:
            model.base_model.model = torch.compile(cast(nn.Module, model.base_model.model))
    state = {k: v.clone() for k, v in get_peft_model_state_dict(model).items()}
    assert set(state) == expected
    set_peft_model_state_dict(model, {k: v * 2 if v.is_floating_point() else v for k, v in state.items()})
    again = get_peft_model_state_dict(model)
    assert all(torch.equal(again[k], state[k] * 2) for k in state if "proj" in k)


def test_an_adapter_of_a_compiled_model_is_in_the_model_itself(tiny_llama):
    """Whoever goes on with the model without its wrapper keeps the matrices, in state dicts too."""
    base = tiny_llama()
    get_peft_model(cast(nn.Module, torch.compile(base)), config())
    assert any(key.startswith("pica_M.") for key in base.state_dict())


def test_a_version_of_transformers_without_its_fsdp_test_adapts_models(tiny_llama, monkeypatch):
    """Where that is not to be had, every process is taken to have the weights."""
    monkeypatch.setitem(sys.modules, "transformers.integrations", None)
    wanted = logits(get_peft_model(tiny_llama(), config(init_weights=True)))
    assert torch.equal(wanted, logits(tiny_llama()))


def test_loading_over_an_adapter_keeps_its_parameter_objects(tiny_llama, tmp_path):
    model = get_peft_model(tiny_llama(), config())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    before = matrices(model)
    train_a_step(model)
    assert not torch.equal(logits(model), expected)
    model.load_adapter(str(tmp_path), "default")
    assert torch.equal(logits(model), expected)
    assert all(p is before[n] for n, p in matrices(model).items())


# ---- adapter names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["q_proj", "principal", "pica", "model", "layers", "r", "fingerprint", "a b", "v-2.0"])
def test_any_adapter_name_saves_both_adapters_or_is_refused(tiny_llama, tmp_path, name):
    if "." in name:
        with pytest.raises(ConfigError, match="must not contain a dot"):
            get_peft_model(tiny_llama(), config(), adapter_name=name)
        return
    model = get_peft_model(tiny_llama(), config(), adapter_name=name)
    model.add_adapter("other", config(r=4, projection="random"))
    model.save_pretrained(tmp_path)
    for adapter in (name, "other"):
        model.set_adapter(adapter)
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / adapter, adapter_name=adapter)
        assert torch.equal(logits(loaded), logits(model))


def test_names_of_shared_matrices_are_refused_and_nothing_is_touched(tiny_llama):
    model = get_peft_model(tiny_llama(), config(), "a")
    keys, expected = set(model.state_dict()), logits(model)
    for name in ("pica_M", "model-layers-N-self_attn-q_proj-64"):
        with pytest.raises(ConfigError, match="name of shared matrices"):
            model.add_adapter(name, config())
    named_like_a_coming_group = get_peft_model(tiny_llama(), config(target_modules=["v_proj"]), "group-64")
    with pytest.raises(ConfigError, match="name of shared matrices"):
        named_like_a_coming_group.add_adapter("b", config(target_modules=["q_proj"], share={"q_proj": "group"}))
    assert set(model.state_dict()) == keys
    assert list(model.peft_config) == ["a"]
    assert torch.equal(logits(model), expected)


# ---- several adapters ------------------------------------------------------------------------------------------------


def test_loading_for_inference_does_not_freeze_the_adapter_in_training(tiny_llama, tmp_path):
    model = get_peft_model(tiny_llama(), config(), "a")
    model.save_pretrained(tmp_path)
    model.load_adapter(str(tmp_path / "a"), "b")
    assert {n: p.requires_grad for n, p in matrices(model).items()} == {n: ".a." in n for n in matrices(model)}
    model.set_requires_grad("a", False)
    assert not any(p.requires_grad for p in model.parameters())


def test_status_tells_the_truth(tiny_llama):
    model = get_peft_model(tiny_llama(), config())
    model.add_adapter("b", config(r=4, target_modules=["k_proj"]))
    status = model.get_model_status()
    assert status.peft_types == {"default": "PICA", "b": "PICA"}
    assert status.adapter_model_type == "PicaModel"
    assert status.trainable_params == pica.coverage(model, "default").trainable
    assert status.requires_grad == {"default": True, "b": False}
    assert sorted(status.available_adapters) == ["b", "default"]
    model.merge_adapter()
    assert model.get_model_status().merged_adapters == ["default"]
    by_layer = {s.name.rpartition(".")[2]: s.available_adapters for s in model.get_layer_status()}
    assert by_layer["k_proj"] == ["b", "default"]
    assert by_layer["q_proj"] == ["default"]


# ---- merging ---------------------------------------------------------------------------------------------------------


def test_an_adapter_added_over_a_merged_one_uses_the_unmerged_weights(tiny_llama):
    model = get_peft_model(tiny_llama(), config(), "a")
    of_a, weights = logits(model), copy.deepcopy(model.state_dict())
    model.merge_adapter()
    model.add_adapter("b", config(r=16))
    torch.testing.assert_close(logits(model), of_a, atol=1e-4, rtol=1e-4)
    model.unmerge_adapter()
    assert all(torch.equal(model.state_dict()[k], w) for k, w in weights.items())

    apart = get_peft_model(tiny_llama(), config(), "a")
    apart.add_adapter("b", config(r=16))
    for name, matrix in matrices(apart).items():
        matrix.data.copy_(matrices(model)[name].data)
    for one in (model, apart):
        one.set_adapter("b")
    torch.testing.assert_close(logits(model), logits(apart), atol=1e-5, rtol=1e-5)


# ---- other containers ------------------------------------------------------------------------------------------------


def test_configs_can_be_pickled():
    one = config(target_modules=["q_proj"], share={"q_proj": "group"})
    other = pickle.loads(pickle.dumps(one))
    assert other == one
    assert other.peft_type.value == "PICA"


def test_a_sequential_is_a_base_model_too(tmp_path):
    def make() -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        base, x = make(), torch.randn(5, 8)
    expected = base(x)
    model = get_peft_model(copy.deepcopy(base), PicaConfig(r=2, target_modules=["0", "2"], init_weights=False))
    adapted = model(x)
    assert not torch.allclose(adapted, expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path)(x), adapted)


def test_a_wide_expression_does_not_take_the_bank_for_a_layer(tiny_llama):
    model = get_peft_model(tiny_llama(), config(target_modules="(.*q_proj|pica_M).*"), "a")
    model.add_adapter("b", config(target_modules="(.*q_proj|pica_M).*"))
    assert model.base_model.targeted_module_names == [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]


# ---- what torch itself does with a model ------------------------------------------------------------------------------


def test_gradients_of_each_sample_by_torch_func(tiny_llama):
    model = get_peft_model(tiny_llama(), config())
    trained = {n: p.detach() for n, p in matrices(model).items()}

    def loss(parameters, ids: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (), {"input_ids": ids[None], "labels": ids[None]}).loss

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, IDS)
    for row, ids in enumerate(IDS):
        model.zero_grad()
        model(input_ids=ids[None], labels=ids[None]).loss.backward()
        for name, parameter in matrices(model).items():
            torch.testing.assert_close(found[name][row], parameter.grad, atol=1e-5, rtol=1e-4)


def test_outputs_that_a_global_hook_kept_are_not_overwritten(tiny_llama):
    model = get_peft_model(tiny_llama(), config())
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer")
    kept = []

    def keep(module: nn.Module, _args: Any, output: Any) -> None:
        if module is layer:
            kept.append((output, output.clone()))

    handle = nn.modules.module.register_module_forward_hook(keep)
    try:
        logits(model)
    finally:
        handle.remove()
    assert torch.equal(*kept[0])
