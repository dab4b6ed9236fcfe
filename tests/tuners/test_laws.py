"""What holds for every PEFT method of the package, however it shares its matrices and whatever it projects onto.

Configurations, layers, files, several adapters, merging, precisions, compilation: what users of PEFT do with any method.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    convert_to_lora,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn
from transformers import AutoModelForCausalLM

import pica
from pica import PicaConfig, SvftConfig
from pica.errors import AdapterFileError, BasisError, ConfigError, TargetError
from pica.tuners.base.bank import find_banks
from tests.shared import IDS, Blocks, Logits, layers_of, logits

Config = PicaConfig | SvftConfig

VARIANTS: dict[str, tuple[type[Config], dict[str, Any]]] = {
    "PiCa": (PicaConfig, {"r": 8}),
    "PiCa, minor, shared by two": (PicaConfig, {"r": 4, "projection": "minor", "share": 2}),
    "PiCa, random, not shared": (PicaConfig, {"r": 4, "projection": "random", "share": "none"}),
    "PiCa, activation": (PicaConfig, {"r": 8, "projection": "activation"}),
    "PiCa, weighted, not shared": (PicaConfig, {"r": 4, "projection": "weighted", "share": "none"}),
    "PiCa, gradient": (PicaConfig, {"r": 8, "projection": "gradient"}),
    "PiCa, principal from a file": (PicaConfig, {"r": 8, "projection": "principal"}),
    "SVFT": (SvftConfig, {}),
    "SVFT, narrow band": (SvftConfig, {"pattern": "banded", "off_diagonals": 1}),
    "SVFT, random, shared": (SvftConfig, {"pattern": "random", "off_diagonals": 2, "share": "role"}),
    "SVFT, top_k": (SvftConfig, {"pattern": "top_k", "off_diagonals": 2}),
    "SVFT, top_k, shared": (SvftConfig, {"pattern": "top_k", "off_diagonals": 2, "share": "role"}),
}
BOTH = ["PiCa", "SVFT"]
FROM_FILES = ["PiCa, activation", "PiCa, weighted, not shared", "PiCa, gradient", "PiCa, principal from a file"]
BASES: dict[str, str] = {}
"""Folders of the basis files of these, by projection."""


@pytest.fixture(scope="module", autouse=True)
def _bases(tiny_llama, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Basis files of the model that the tests adapt, of more directions than they use."""
    read = [{"input_ids": torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(7))} for _ in range(3)]
    for projection in ("activation", "weighted", "gradient", "principal"):
        folder = tmp_path_factory.mktemp("bases") / projection
        given = read if projection != "principal" else None
        pica.make_basis(tiny_llama(), folder, PicaConfig(r=16, projection=projection), data=given)
        BASES[projection] = str(folder)


def config(variant: str, **settings: Any) -> Config:
    method, own = VARIANTS[variant]
    if variant in FROM_FILES:
        own = own | {"basis_from": BASES[own["projection"]]}
    return method(**{"init_weights": False, "task_type": "CAUSAL_LM", **own, **settings})


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if ".pica_M." in f".{n}" or ".svft_T." in f".{n}"}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the method's matrices, after a step on which the model starts anew."""
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return {n: cast(torch.Tensor, p.grad).clone() for n, p in matrices(model).items()}


# ---- the configuration -----------------------------------------------------------------------------------------------

METHODS = {"PICA": PicaConfig, "SVFT": SvftConfig}
BY_METHOD = pytest.mark.parametrize(("name", "method"), METHODS.items(), ids=METHODS)


@BY_METHOD
def test_registration_extends_the_enum_once(name, method):
    pica.register()
    pica.register()
    assert [m for m in PeftType if m.value == name] == [PeftType(name)]
    assert PeftType[name].name == name
    assert hash(PeftType(name)) == hash(name)
    assert method().peft_type is PeftType(name)


INHERITED = {f.name for f in dataclasses.fields(PeftConfig)}


@pytest.mark.parametrize(
    "field",
    [
        pytest.param(field, id=f"{name}, {field.name}")
        for name, method in METHODS.items()
        for field in dataclasses.fields(method)
        if field.name not in INHERITED
    ],
)
def test_every_field_is_described_in_whole_sentences(field):
    assert field.metadata["help"].endswith(".")


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        (PicaConfig, {"target_modules": "("}, r"target_modules='\(' is not a regular expression"),
        (SvftConfig, {"target_modules": "("}, r"target_modules='\(' is not a regular expression"),
        (PicaConfig, {"target_modules": ".*q_proj", "layers_to_transform": [1]}, "layers_to_transform"),
        (SvftConfig, {"target_modules": ".*q_proj", "layers_to_transform": [1]}, "layers_to_transform"),
        (PicaConfig, {"layers_pattern": "layers"}, "layers_pattern"),
        (SvftConfig, {"layers_pattern": "layers"}, "layers_pattern"),
    ],
)
def test_targets_that_say_nothing_are_told_before_anything_is_matched(method, settings, expected):
    with pytest.raises(ConfigError, match=f"^{method.__name__}: .*{expected}"):
        method(**settings)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("PICA", {"r": 7, "projection": "random", "projection_seed": 5, "rank_pattern": {"v_proj": 3}}),
        ("SVFT", {"pattern": "random", "off_diagonals": 3, "pattern_seed": 5}),
    ],
)
def test_a_config_survives_its_file(tmp_path: Path, name: str, settings: dict[str, Any]):
    method = METHODS[name]
    given = method(target_modules=["v_proj", "q_proj"], share={"q_proj": "queries"}, **settings)
    given.save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == name
    assert stored["target_modules"] == ["q_proj", "v_proj"]  # sorted: the same config gives the same file
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, method)
    assert loaded == dataclasses.replace(given, basis_format=1)  # stored, so a file may be expected to follow
    (tmp_path / "adapter_config.json").write_text(json.dumps({**stored, "depth": 3}))
    with pytest.raises(AdapterFileError, match="does not know: 'depth'"):
        method.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("method", "field"), [(PicaConfig, "share"), (SvftConfig, "share"), (PicaConfig, "rank_pattern")]
)
def test_a_mapping_keeps_its_order_in_the_file(tmp_path: Path, method, field):
    """The first expression that matches counts, and PEFT writes mappings sorted."""
    entries: Any = {"layers.0.q_proj": 2, ".*q_proj": 3, ".*": 4}
    if field == "share":
        entries = {key: f"group{number}" for key, number in entries.items()}
    settings: Any = {field: entries}
    method(**settings).save_pretrained(str(tmp_path))
    again = getattr(method.from_pretrained(str(tmp_path)), field)
    assert list(again.items()) == list(entries.items())
    settings[field] = dict(sorted(entries.items()))
    assert method(**settings).to_dict()[field] == settings[field]


# ---- the layer by itself ---------------------------------------------------------------------------------------------


def adapted(base: nn.Module, variant: str, **settings: Any) -> Any:
    return get_peft_model(cast(Any, base), config(variant, target_modules=["fc"], task_type=None, **settings))


@pytest.mark.parametrize(
    ("variant", "others", "shapes"),
    [
        (
            "PiCa",
            [{"r": 9}, {"r": 2}, {"r": 3, "projection": "random"}],
            {"pica_basis_principal": (9, 32), "pica_basis_random_0": (3, 48)},
        ),
        (
            "SVFT",
            [{"pattern": "top_k", "off_diagonals": 2}],
            {"svft_basis_left_w": (32, 32), "svft_basis_right_w": (32, 48)},
        ),
    ],
)
def test_one_basis_serves_every_adapter_of_its_kind(variant, others, shapes):
    model = adapted(Blocks(48, 32), variant)
    for number, settings in enumerate(others):
        model.add_adapter(str(number), config(variant, target_modules=["fc"], task_type=None, **settings))
    for layer in layers_of(model):
        assert {n: tuple(b.shape) for n, b in layer.named_buffers() if "_basis_" in n} == shapes
    assert not [key for key in model.state_dict() if "_basis_" in key]


@pytest.mark.parametrize("variant", BOTH)
def test_a_weight_that_is_not_finite_is_named_and_the_model_left_as_it_was(variant):
    base = Blocks(48, 32)
    base.layers[1]["fc"].weight.data[0, 0] = float("nan")  # pyright: ignore
    with pytest.raises(BasisError, match=r"layers\.1\.fc: the frozen weight holds NaN"):
        adapted(base, variant)
    assert not layers_of(base)
    assert set(dict(base.named_children())) == {"layers"}


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 0, 24), (2, 3, 4, 24)], ids=str)
@pytest.mark.parametrize("out", [16, 30])
@pytest.mark.parametrize("variant", ["PiCa", "SVFT", "SVFT, narrow band", "SVFT, random, shared"])
def test_any_number_of_leading_dimensions_zero_tokens_included(variant, out, shape):
    model = adapted(Blocks(24, out, count=1, bias=True), variant)
    x = torch.randn(shape)
    y = model(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], out)
    torch.testing.assert_close(y, model.merge_and_unload()(x), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("variant", BOTH)
def test_a_forward_hook_on_the_base_layer_sees_the_base_output(variant):
    """The update is added in place only where nobody else holds the output."""
    model = adapted(Blocks(48, 32, count=1), variant)
    (layer,) = layers_of(model)
    seen: list[torch.Tensor] = []
    layer.get_base_layer().register_forward_hook(lambda m, a, out: seen.append(out))
    x = torch.randn(5, 48)
    y = model(x)
    torch.testing.assert_close(seen[0], x @ layer.base_layer.weight.T)
    assert (y - seen[0]).abs().max() > 1e-2


@pytest.mark.parametrize("variant", BOTH)
def test_a_layer_with_another_methods_adapter_is_refused_by_what_it_is(tiny_llama, variant):
    base = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).get_base_model()
    with pytest.raises(
        TargetError, match=r"q_proj is not supported: it has an adapter of another method \(peft.tuners.lora"
    ):
        get_peft_model(cast(Any, base), config(variant, target_modules=["q_proj"]))


@pytest.mark.parametrize("variant", ["PiCa", "PiCa, random, not shared", "SVFT, random, shared", "SVFT, top_k, shared"])
def test_weights_on_the_meta_device_wait_until_they_are_there(tiny_llama, variant):
    real = tiny_llama()
    with torch.device("meta"):
        late = get_peft_model(AutoModelForCausalLM.from_config(real.config), config(variant))
    with pytest.raises(BasisError, match="meta device"):
        layers_of(late)[0].frozen.read()
    inner, early = cast(nn.Module, late.get_base_model()), get_peft_model(tiny_llama(), config(variant))
    names = {key.replace(".base_layer", ""): key for key in inner.state_dict()}
    inner.load_state_dict({names[key]: value for key, value in real.state_dict().items()}, assign=True, strict=False)
    for (_, bank), (_, of_early) in zip(find_banks(late), find_banks(early)):
        slot = bank.matrices("default")
        for group, values in of_early.matrices("default").items():
            slot[group] = nn.Parameter(values.detach().clone())
    for name, buffer in list(late.named_buffers()):
        if buffer.is_meta and "positions" not in name:  # rotary tables, which no state dict holds
            owner = late.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], real.get_buffer(name.removeprefix("base_model.model.")))
    assert torch.equal(logits(late), logits(early))
    assert (logits(late) - logits(real)).abs().max() > 0.1
    bases = [{n: b for n, b in model.named_buffers() if "_basis_" in n} for model in (late, early)]
    assert bases[1]
    assert bases[0].keys() == bases[1].keys()
    assert all(torch.equal(basis, bases[1][name]) for name, basis in bases[0].items())


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_folder(tiny_llama, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("laws") / "base"
    tiny_llama().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_loader_gives_the_same_model(tiny_llama, base_folder: Path, tmp_path: Path, variant, low_cpu_mem_usage):
    model = get_peft_model(type(tiny_llama()).from_pretrained(base_folder), config(variant))
    expected = logits(model)
    if low_cpu_mem_usage:
        pica.save_adapter(model, tmp_path)
    else:
        model.save_pretrained(str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]

    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(auto), expected)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), expected)
    loaded.load_adapter(str(tmp_path), "second", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), expected)
    assert not any(p.is_meta for p in loaded.parameters())
    plain = tiny_llama()
    plain.load_adapter(str(tmp_path))  # transformers'
    assert torch.equal(logits(plain), expected)


@pytest.mark.parametrize(
    ("variant", "settings", "overrides"),
    [
        ("PiCa", {"modules_to_save": ["lm_head"]}, {}),
        ("PiCa", {"trainable_token_indices": [1, 5, 9]}, {}),
        ("PiCa", {"trainable_token_indices": [1, 5, 9]}, {"tie_word_embeddings": True}),
        ("PiCa", {"bias": "all"}, {"attention_bias": True}),
        ("PiCa", {"bias": "pica_only"}, {"attention_bias": True}),
        ("PiCa", {"rank_pattern": {"q_proj": 4}, "share": 2}, {}),
        ("PiCa, activation", {"layers_to_transform": [0, 2]}, {}),
        ("PiCa, activation", {"rank_pattern": {"q_proj": 4}, "share": 2}, {}),
        ("PiCa, weighted, not shared", {}, {}),
        ("PiCa, gradient", {}, {}),
        ("PiCa, gradient", {"share": 2}, {}),
        ("PiCa, principal from a file", {}, {}),
        ("SVFT", {"modules_to_save": ["lm_head"]}, {}),
        ("SVFT", {"trainable_token_indices": [1, 5, 9]}, {"tie_word_embeddings": True}),
        ("SVFT", {"bias": "all"}, {"attention_bias": True}),
        ("SVFT", {"bias": "svft_only", "pattern": "banded", "off_diagonals": 2}, {"attention_bias": True}),
        ("SVFT", {"layers_to_transform": [0, 2], "pattern": "random", "off_diagonals": 1}, {}),
    ],
)
def test_a_trained_adapter_survives_its_file_and_merging(tiny_llama, tmp_path, variant, settings, overrides):
    model = get_peft_model(tiny_llama(**overrides), config(variant, **settings))
    before = logits(model)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.eval()
    expected = logits(model)
    assert not torch.allclose(before, expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(**overrides), tmp_path)
    assert torch.equal(logits(loaded), expected)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("variant", ["PiCa", "SVFT, top_k"])
def test_the_base_models_state_has_no_adapter_in_it(tiny_llama, variant):
    base = tiny_llama()
    keys = set(base.state_dict())
    model = get_peft_model(base, config(variant), "a")
    model.add_adapter("b", config(variant, target_modules=["o_proj"]))
    assert set(get_base_model_state_dict(model)) == keys


@pytest.mark.parametrize("variant", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_averaged_state_dicts_load(tiny_llama, variant, dtype):
    """Federated averaging takes the mean of every tensor; on one basis the update is the mean of the updates."""
    clients = [get_peft_model(tiny_llama(), config(variant)) for _ in range(3)]
    states = [{k: v.to(dtype) for k, v in get_peft_model_state_dict(client).items()} for client in clients]
    shares = (0.5, 0.3, 0.2)
    mean = {key: sum(w * state[key] for w, state in zip(shares, states)) for key in states[0]}
    server = get_peft_model(tiny_llama(), config(variant))
    set_peft_model_state_dict(server, cast(Any, mean))
    expected = logits(server)
    exact = get_peft_model_state_dict(server)
    assert torch.equal(
        exact[next(k for k in exact if k.endswith("fingerprint"))].to(dtype),
        next(v for k, v in states[0].items() if k.endswith("fingerprint")),
    )
    assert expected.isfinite().all()
    other = get_peft_model_state_dict(get_peft_model(tiny_llama(seed=1), config(variant)))
    mixed = {key: (states[0][key] + other[key]) / 2 for key in other}
    with pytest.raises(AdapterFileError, match="mean of different ones"):
        set_peft_model_state_dict(server, mixed)


@pytest.mark.parametrize(
    ("variant", "settings", "rank"),
    [
        ("PiCa", {}, 8),
        ("PiCa, activation", {}, 8),
        ("PiCa, weighted, not shared", {}, 4),
        ("PiCa, gradient", {}, 8),
        ("SVFT, narrow band", {"target_modules": ["q_proj", "down_proj", "up_proj"]}, 64),
    ],
)
def test_lora_conversion_is_exact_to_rounding(tiny_llama, variant, settings, rank):
    model = get_peft_model(tiny_llama(), config(variant, **settings))
    lora_config, state = convert_to_lora(model, rank=rank)
    lora = get_peft_model(tiny_llama(), lora_config)
    assert not torch.allclose(logits(lora), logits(model), atol=1e-1)
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(logits(lora), logits(model), atol=1e-3, rtol=1e-4 if rank < 64 else 1e-3)


# ---- several adapters, merging ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "others"),
    [
        ("PiCa", [{"r": 16}, {"projection": "minor"}]),
        ("PiCa", [{"projection": "random", "r": 16}]),
        ("PiCa, random, not shared", [{"share": "role"}]),
        ("PiCa, activation", [{"r": 16}, {"projection": "principal", "basis_from": None}]),
        ("PiCa, weighted, not shared", [{"share": "role"}]),
        ("SVFT", [{"pattern": "banded", "off_diagonals": 2}]),
        ("SVFT, top_k, shared", [{"share": "none"}]),
    ],
)
def test_adapters_of_one_model_leave_each_other_alone(tiny_llama, variant, others):
    base = logits(tiny_llama())
    model = get_peft_model(tiny_llama(), config(variant), "a")
    of_a, names, shapes = logits(model), ["a"], {n: p.shape for n, p in matrices(model).items()}
    for number, settings in enumerate(others):
        model.add_adapter(f"b{number}", config(variant, **settings))
        names.append(f"b{number}")
        assert torch.equal(logits(model), of_a)
    last = names[-1]
    model.set_adapter(last)
    of_last = logits(model)
    assert not torch.allclose(of_last, of_a, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)

    cast(Any, model.base_model).set_adapter(["a", last])
    both, weights = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter(["a"], safe_merge=True)
    model.merge_adapter([last])
    torch.testing.assert_close(logits(model), both, atol=1e-3, rtol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.unmerge_adapter()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())

    model.set_adapter(last)
    model.delete_adapter(last)
    assert model.active_adapters == ["a"]
    assert torch.equal(logits(model), of_a)
    assert not any(f".{last}." in name for name in matrices(model))
    assert model.get_model_status().peft_types == dict.fromkeys(names[:-1], variant.partition(",")[0].upper())
    if len(names) > 2:
        model.delete_adapter("a")
        assert model.active_adapters == [names[1]]
    plain = model.unload()
    assert torch.equal(logits(plain), base)
    assert set(plain.state_dict()) == set(tiny_llama().state_dict())
    again = get_peft_model(cast(Any, plain), config(variant), "a")
    assert {n: p.shape for n, p in matrices(again).items()} == shapes


@pytest.mark.parametrize("variant", BOTH)
@pytest.mark.parametrize("settings", [{}, {"target_modules": ["q_proj"]}, {"share": 2}])
def test_a_second_get_peft_model_begins_anew_or_is_refused(tiny_llama, tmp_path: Path, variant, settings):
    base = tiny_llama()
    model = get_peft_model(base, config(variant))
    expected = logits(model)
    again = config(variant, **settings)
    for name in ("default", "other"):  # a PeftModel within a PeftModel
        with pytest.raises(ConfigError, match=r"already.*model\.add_adapter\(name, config\).*model\.unload\(\)"):
            get_peft_model(cast(Any, model), copy.deepcopy(again), adapter_name=name)
        torch.testing.assert_close(logits(model), expected)
    with pytest.warns(UserWarning, match="has an adapter 'default' already.*a new one takes its place"):
        second = get_peft_model(base, again)
    fresh = get_peft_model(tiny_llama(), copy.deepcopy(again))
    ours, theirs = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (second, fresh))
    assert {n: p.shape for n, p in ours.items()} == {n: p.shape for n, p in theirs.items()}
    with torch.no_grad():
        for one, other in zip(ours.values(), theirs.values()):
            one.copy_(torch.randn(one.shape, generator=torch.Generator().manual_seed(3)))
            other.copy_(one)
    torch.testing.assert_close(logits(second), logits(fresh))
    second.save_pretrained(str(tmp_path))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_llama(), str(tmp_path))), logits(second))
    second.merge_adapter()
    with pytest.raises(ConfigError, match="which is merged into it. Unmerge that"):
        get_peft_model(base, copy.deepcopy(again))


@pytest.mark.parametrize("variant", BOTH)
def test_mixed_batches_are_refused_while_an_adapter_is_merged(tiny_llama, variant):
    """Each sample would have the merged one's update beside its own."""
    model, names = get_peft_model(tiny_llama(), config(variant)).eval(), ["default", "__base__", "default"]
    expected = logits(model, adapter_names=names)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged adapters.*`unmerge_adapter` first"):
        logits(model, adapter_names=names)
    model.unmerge_adapter()
    assert torch.equal(logits(model, adapter_names=names), expected)


@pytest.mark.parametrize("variant", BOTH)
def test_unmerging_after_a_change_of_precision(tiny_llama, variant):
    base = tiny_llama()
    model = get_peft_model(copy.deepcopy(base), config(variant))
    model.merge_adapter()
    model.bfloat16()
    cast(Any, model.base_model).merge_adapter()  # there is nothing more to merge
    model.unmerge_adapter()
    state = {k.replace(".base_layer", ""): v for k, v in get_base_model_state_dict(model).items()}
    assert all(torch.equal(state[k], v.bfloat16()) for k, v in base.state_dict().items())
    logits(model)


# ---- precision, checkpointing, compilation, copies -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize(
    "variant", ["PiCa", "PiCa, activation", "PiCa, gradient", "SVFT", "SVFT, narrow band", "SVFT, top_k"]
)
def test_precisions_of_matrices_and_bases(tiny_llama, dtype, autocast_adapter_dtype, variant):
    model = get_peft_model(tiny_llama(dtype=dtype), config(variant), autocast_adapter_dtype=autocast_adapter_dtype)
    expected = torch.promote_types(dtype, torch.float32) if autocast_adapter_dtype else dtype
    assert {p.dtype for p in matrices(model).values()} == {expected}
    assert {b.dtype for n, b in model.named_buffers() if "_basis_" in n} == {dtype}
    assert logits(model).dtype == dtype
    assert {gradient.dtype for gradient in gradients(model.train()).values()} == {expected}


@pytest.mark.parametrize("variant", ["PiCa", "SVFT", "SVFT, narrow band", "SVFT, top_k"])
def test_autocast(tiny_llama, variant):
    model = get_peft_model(tiny_llama(), config(variant)).train()
    exact = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    for name, parameter in matrices(model).items():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert float(torch.cosine_similarity(parameter.grad.flatten(), exact[name].flatten(), dim=0)) > 0.9


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("variant", ["PiCa", "PiCa, activation", "PiCa, gradient", "SVFT, random, shared"])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_llama, use_reentrant, variant):
    model = get_peft_model(tiny_llama(), config(variant)).train()
    plain = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, plain[name], atol=1e-6, rtol=1e-5)


SIDES = ["q_proj", "down_proj", "k_proj"]  # PiCa's projectors on both sides


@pytest.mark.parametrize(
    ("variant", "settings", "layers"),
    [
        ("PiCa", {"target_modules": SIDES}, 2),
        ("SVFT", {}, 1),
        ("SVFT, narrow band", {}, 1),
        ("SVFT, top_k, shared", {}, 1),
    ],
)
def test_compiles_without_graph_breaks_and_once(tiny_llama, variant, settings, layers):
    import torch._dynamo

    if not hasattr(torch._dynamo.config, "enable_trace_contextlib"):  # torch 2.6
        pytest.skip("PEFT's own forward breaks the graph, with a LoRA as well")
    torch._dynamo.reset()
    model = get_peft_model(tiny_llama(num_hidden_layers=layers), config(variant, **settings)).train()
    eager = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(matrices(model).values(), lr=1e-3)
    compiled(IDS, labels=IDS).loss.backward()
    for name, matrix in matrices(model).items():
        torch.testing.assert_close(matrix.grad, eager[name], atol=1e-5, rtol=1e-4)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            optimizer.step()
            compiled(IDS, labels=IDS).loss.backward()
    torch._dynamo.reset()


@pytest.mark.usefixtures("traceable")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        ("PiCa", {"target_modules": ["embed_tokens", *SIDES]}),
        ("SVFT", {}),
        ("SVFT, narrow band", {}),
        ("SVFT, top_k, shared", {}),
    ],
)
def test_is_traced_for_any_length_and_saved(tiny_llama, tmp_path: Path, variant, settings, grad: bool):
    model = Logits(get_peft_model(tiny_llama(num_hidden_layers=1), config(variant, **settings)).eval())
    with torch.set_grad_enabled(grad):
        torch.jit.save(torch.jit.trace(model, (IDS,), check_trace=False), tmp_path / "traced.pt")
        traced = torch.jit.load(tmp_path / "traced.pt")
        longer = torch.cat([IDS, IDS.flip(1)], dim=1)
        torch.testing.assert_close(traced(longer), model(longer))


@pytest.mark.parametrize("variant", ["PiCa", "SVFT, top_k, shared"])
def test_copies_share_nothing_and_keep_sharing_inside(tiny_llama, variant):
    model = get_peft_model(tiny_llama(), config(variant))
    expected = logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(model), copy.deepcopy(model.get_base_model()), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        for matrix in matrices(model).values():
            matrix.zero_()
    assert not torch.allclose(logits(model), expected)
    for twin in twins:
        assert torch.equal(logits(twin), expected)
        assert len(matrices(twin)) == 5


@pytest.mark.parametrize("method", [PicaConfig, SvftConfig])
def test_torchs_own_encoder_layers_do_not_pass_over_adapters(method):
    """In evaluation mode they hand the weights of their linear layers to a kernel."""
    block = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    base = nn.TransformerEncoder(block, 2).eval()
    x = torch.randn(2, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    model = get_peft_model(
        copy.deepcopy(base), method(target_modules=["linear1", "linear2"], init_weights=False)
    ).eval()
    merged = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        for extra in ({}, {"src_key_padding_mask": mask}):
            found, expected = model(x, **extra), merged(x, **extra)
            torch.testing.assert_close(found[0], expected[0], atol=2e-5, rtol=0)
            torch.testing.assert_close(found[1, :3], expected[1, :3], atol=2e-5, rtol=0)
            assert not torch.allclose(found[0], base(x, **extra)[0], atol=1e-2)
