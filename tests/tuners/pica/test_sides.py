"""Adapters whose trained matrix is on the side of the layer's input: y += U N x, N shared by all layers of a role."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModel, BertConfig, GPT2Config, LlamaConfig, T5Config, ViTConfig

import pica
from pica.adapters.export.lora import export_lora
from pica.errors import BasisMismatchError, ConfigError
from pica.tuners.pica.layer import PicaLinear
from pica.tuners.pica.sides import readers, short_names
from tests.shared import IDS, layers_of, logits

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
SIDE = ["k_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture(scope="module")
def basis(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., nn.Module]) -> str:
    folder = tmp_path_factory.mktemp("made") / "basis"
    read = [{"input_ids": torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(7))} for _ in range(3)]
    pica.make_basis(
        tiny_llama(), folder, pica.PicaConfig(r=8, projection="gradient", target_modules=TARGETS), data=read
    )
    return str(folder)


def config(basis: str | None, **more: Any) -> pica.PicaConfig:
    given = {"r": 8, "projection": "gradient", "target_modules": TARGETS, "basis_from": basis, "init_weights": False}
    return pica.PicaConfig(**{"task_type": "CAUSAL_LM", **given, **more})


def by_path(model: nn.Module) -> dict[str, PicaLinear]:
    return {layer.path: layer for layer in layers_of(model)}


def test_the_update_is_that_of_the_formula(tiny_llama, basis):
    model = get_peft_model(tiny_llama(), config(basis))
    plain, made = tiny_llama().double(), pica.basis.file.open_basis(Path(basis))
    for path, layer in by_path(model).items():
        matrix = layer.matrix("default").detach().double()
        read = path.rpartition(".")[2] in SIDE
        assert matrix.shape == (layer.in_features if read else layer.out_features, 8)
        rows = made.rows(path, 8, layer.out_features if read else layer.in_features).double()
        delta = rows.T @ matrix.T if read else matrix @ rows  # U N, or M P
        plain.get_submodule(path).weight.data += delta
        torch.testing.assert_close(layer.get_delta_weight("default").double(), delta, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model).double(), logits(plain), atol=1e-4, rtol=1e-4)


def test_the_matrices_are_shared_and_have_the_gradient_of_the_formula(tiny_llama, basis):
    model = get_peft_model(tiny_llama(), config(basis))
    model(IDS, labels=IDS).loss.backward()
    plain = tiny_llama()
    for path, layer in by_path(model).items():
        plain.get_submodule(path).weight.data += layer.get_delta_weight("default")
    plain(IDS, labels=IDS).loss.backward()
    ups = {path: layer for path, layer in by_path(model).items() if path.endswith("up_proj")}
    made = pica.basis.file.open_basis(Path(basis))
    wanted = sum(
        plain.get_submodule(path).weight.grad.T @ made.rows(path, 8, layer.out_features).T
        for path, layer in ups.items()
    )
    matrices = {id(layer.matrix("default")): layer.matrix("default") for layer in ups.values()}
    assert len(matrices) == 1
    torch.testing.assert_close(next(iter(matrices.values())).grad, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("recorded", [False, True], ids=["inference", "recorded"])
@pytest.mark.parametrize("others", [("two", "other"), ("two", "other", "three", "four")], ids=["few", "many"])
def test_samples_of_a_batch_have_their_own(tiny_llama, basis, length, recorded, others):
    model: Any = get_peft_model(tiny_llama(), config(basis), "one")
    for i, name in enumerate(others):
        torch.manual_seed(i)
        own = {"projection": "principal", "basis_from": None} if name == "other" else {"r": 4 + i}
        model.add_adapter(name, config(basis, **{"basis_from": basis, **own}))
    model.eval()
    names = ["one", *others, "__base__", "two", "one"]
    ids = torch.randint(96, (len(names), length), generator=torch.Generator().manual_seed(1))
    with torch.set_grad_enabled(recorded):
        mixed = model(ids, adapter_names=names).logits
        for row, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    wanted = model(ids[row : row + 1]).logits
            else:
                model.set_adapter(name)
                wanted = model(ids[row : row + 1]).logits
            torch.testing.assert_close(mixed[row : row + 1], wanted, atol=1e-4, rtol=1e-4)


def test_the_file_says_which_layers_and_needs_no_basis_where_it_brings_it(tiny_llama, basis, tmp_path):
    model = get_peft_model(tiny_llama(), config(basis, save_basis=True))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["input_side"] == SIDE
    written["basis_from"] = written["basis_digest"] = None
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), logits(model))


def test_the_other_side_is_refused_even_where_shapes_allow_it(tiny_llama, basis, tmp_path):
    model = get_peft_model(tiny_llama(), config(basis, save_basis=True, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    written |= {"basis_from": None, "basis_digest": None, "input_side": []}
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))
    with pytest.raises(BasisMismatchError):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_side": ["q_proj"]}, r"input_side=\['q_proj'\] and the basis differ on model.layers.0.mlp.up_proj"),
        ({"input_side": ["nothing"]}, "input_side: 'nothing' matches no adapted layer"),
        ({"input_side": ["("]}, r"input_side='\(' is not a regular expression"),
        ({"input_side": "q_proj"}, "input_side='q_proj' must be a list of names"),
        ({"input_side": ["q_proj"], "projection": "principal"}, "input_side goes with projection='gradient'"),
        ({"basis_from": None}, "make a basis with `pica basis MODEL -o DIR --projection gradient`"),
    ],
)
def test_what_does_not_go_is_one_sentence(tiny_llama, basis, settings, message):
    with pytest.raises(ConfigError, match=message):
        get_peft_model(tiny_llama(), config(basis, **settings))


@pytest.mark.parametrize(
    "settings", [{}, {"rank": 3}, {"energy": 0.5}, {"engine": "vllm"}], ids=["exact", "rank", "energy", "vllm"]
)
def test_its_export_is_the_adapter(tiny_llama, basis, tmp_path, settings):
    model = get_peft_model(tiny_llama(), config(basis))
    export = export_lora(model, tmp_path / "lora", check_inputs={"input_ids": IDS}, **settings)
    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora").get_base_model()
    for path, layer in by_path(model).items():
        delta: Any = layer.get_delta_weight("default")
        module: Any = lora.get_submodule(path)
        if module.r["default"] >= 8:
            exact: Any = (
                {"atol": 1e-5, "rtol": 1e-4} if export.plan.dtype == torch.float32 else {"atol": 3e-3, "rtol": 2e-2}
            )
            torch.testing.assert_close(module.get_delta_weight("default"), delta, **exact)
            continue
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        best = (left[:, : export.plan.rank] * values[: export.plan.rank]) @ right[: export.plan.rank]
        torch.testing.assert_close(module.get_delta_weight("default"), best, atol=1e-4, rtol=1e-3)


def test_adapters_of_the_same_basis_add_up(tiny_llama, basis):
    model: Any = get_peft_model(tiny_llama(), config(basis), "one")
    model.add_adapter("two", config(basis, r=4))
    model.add_weighted_adapter(["one", "two"], [1.0, -0.5], "sum")
    for layer in layers_of(model):
        wanted = layer.get_delta_weight("one") - 0.5 * layer.get_delta_weight("two")
        torch.testing.assert_close(layer.get_delta_weight("sum"), wanted, atol=1e-5, rtol=1e-4)


SMALL: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, tuple[Any, set[str]]] = {
    "llama": (
        LlamaConfig(vocab_size=96, num_key_value_heads=2, **SMALL),
        {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
    ),
    "llama, wide heads": (
        LlamaConfig(vocab_size=96, head_dim=16, **SMALL),
        {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"},
    ),
    "bert": (BertConfig(vocab_size=96, **SMALL), {"query", "key", "value", "intermediate.dense"}),
    "vit": (
        ViTConfig(image_size=16, patch_size=8, **SMALL),  # earlier versions of transformers have the later names
        {"q_proj", "k_proj", "v_proj", "fc1", "query", "key", "value", "intermediate.dense"},
    ),
    "gpt2": (GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4), {"c_attn", "c_fc"}),
    "t5": (T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4), {"q", "k", "v", "wi"}),
}


@pytest.mark.parametrize("name", MODELS)
def test_which_layers_read_the_residual_stream(name):
    settings, expected = MODELS[name]
    with torch.device("meta"):
        model = AutoModel.from_config(settings)
    shapes: dict[str, tuple[int, int]] = {}
    for path, module in model.named_modules():
        if ".0." in f"{path}." and (weight := getattr(module, "weight", None)) is not None and weight.ndim == 2:
            turned = type(module).__name__ == "Conv1D"
            if isinstance(module, nn.Linear) or turned:
                shapes[path] = tuple(weight.shape[::-1] if turned else weight.shape)
    wanted = {path for path in shapes if any(path.endswith(f".{end}") for end in expected)}
    assert 0 < len(wanted) < len(shapes)
    assert readers(shapes) == wanted


def test_names_are_as_short_as_tells_layers_apart():
    paths = ["a.0.attention.output.dense", "a.0.intermediate.dense", "a.0.query", "a.1.query", "a.1.intermediate.dense"]
    assert short_names({paths[1], paths[2], paths[3], paths[4]}, paths) == ["intermediate.dense", "query"]
    assert short_names(set(), paths) == []
