"""What users of PEFT do with any method, done with PiCa: several adapters, files, merging, generation, compilation."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    convert_to_lora,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

import pica
from pica import PicaConfig
from pica.errors import AdapterFileError, ConfigError

IDS = torch.randint(3, 96, (3, 7), generator=torch.Generator().manual_seed(1))


def config(**settings) -> PicaConfig:
    return PicaConfig(**{"r": 8, "init_weights": False, "task_type": "CAUSAL_LM", **settings})


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def train_a_step(model: nn.Module, learning_rate: float = 0.1) -> None:
    model.train()
    model(IDS, labels=IDS).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=learning_rate).step()
    model.zero_grad()
    model.eval()


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if ".pica_M." in f".{n}"}


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_every_loader_gives_the_same_model(tiny_llama, tmp_path: Path, low_cpu_mem_usage: bool):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(type(tiny_llama()).from_pretrained(tmp_path / "base"), config())
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]

    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(auto), expected)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), expected)
    loaded.load_adapter(str(tmp_path / "adapter"), "second", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), expected)
    assert not any(p.is_meta for p in loaded.parameters())


def test_low_cpu_mem_usage_leaves_new_matrices_on_the_meta_device(tiny_llama):
    model = get_peft_model(tiny_llama(), config(), low_cpu_mem_usage=True)
    assert all(p.is_meta for p in matrices(model).values())
    assert not any(b.is_meta for b in model.buffers())


@pytest.mark.parametrize(
    ("settings", "overrides"),
    [
        ({"modules_to_save": ["lm_head"]}, {}),
        ({"trainable_token_indices": [1, 5, 9]}, {}),
        ({"trainable_token_indices": [1, 5, 9]}, {"tie_word_embeddings": True}),
        ({"bias": "all"}, {"attention_bias": True}),
        ({"bias": "pica_only"}, {"attention_bias": True}),
        ({"rank_pattern": {"q_proj": 4}, "share": 2}, {}),
    ],
)
def test_a_trained_adapter_survives_its_file_and_merging(tiny_llama, tmp_path, settings, overrides):
    model = get_peft_model(tiny_llama(**overrides), config(**settings))
    before = logits(model)
    train_a_step(model)
    expected = logits(model)
    assert not torch.allclose(before, expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(**overrides), tmp_path)
    assert torch.equal(logits(loaded), expected)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, atol=1e-3, rtol=1e-4)


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


def test_the_base_models_state_has_no_adapter_in_it(tiny_llama):
    base = tiny_llama()
    keys = set(base.state_dict())
    model = get_peft_model(base, config(), "a")
    model.add_adapter("b", config(r=4, target_modules=["o_proj"]))
    assert set(get_base_model_state_dict(model)) == keys


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


def test_adapters_of_other_ranks_and_projections_leave_each_other_alone(tiny_llama):
    base = logits(tiny_llama())
    model = get_peft_model(tiny_llama(), config(), "a")
    of_a = logits(model)
    model.add_adapter("larger", config(r=16))
    assert torch.equal(logits(model), of_a)
    model.add_adapter("minor", config(projection="minor"))
    assert torch.equal(logits(model), of_a)
    model.set_adapter("minor")
    of_minor = logits(model)
    assert not torch.allclose(of_minor, of_a, atol=1e-2)
    model.delete_adapter("minor")
    assert model.active_adapters == ["a"]
    assert torch.equal(logits(model), of_a)
    assert not any(".minor." in name for name in matrices(model))
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.delete_adapter("a")
    assert model.active_adapters == ["larger"]

    plain = model.unload()
    assert torch.equal(logits(plain), base)
    assert set(plain.state_dict()) == set(tiny_llama().state_dict())
    wrapped_again = get_peft_model(plain, config(), "a")
    assert [p.shape[1] for p in matrices(wrapped_again).values()] == [8] * 5


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


def test_merging_one_after_the_other_and_disabling(tiny_llama):
    base = logits(tiny_llama())
    model = get_peft_model(tiny_llama(), config(), "a")
    model.add_adapter("b", config(r=16, projection="random"))
    cast(pica.PicaModel, model.base_model).set_adapter(["a", "b"])
    both = logits(model)
    model.merge_adapter(["a"])
    model.merge_adapter(["b"])
    torch.testing.assert_close(logits(model), both, atol=1e-3, rtol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


# ---- precision, checkpointing, compilation ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_half_precision_bases(tiny_llama, dtype, autocast_adapter_dtype):
    model = get_peft_model(tiny_llama(dtype=dtype), config(), autocast_adapter_dtype=autocast_adapter_dtype)
    expected = torch.float32 if autocast_adapter_dtype else dtype
    assert {p.dtype for p in matrices(model).values()} == {expected}
    assert logits(model).dtype == dtype
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == expected for p in matrices(model).values())


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_llama, use_reentrant):
    model = get_peft_model(tiny_llama(), config()).train()
    model(IDS, labels=IDS).loss.backward()
    plain = {n: p.grad for n, p in matrices(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model(IDS, labels=IDS).loss.backward()
    for name, matrix in matrices(model).items():
        torch.testing.assert_close(matrix.grad, plain[name], atol=1e-6, rtol=1e-5)


def test_compiles_without_graph_breaks_and_once(tiny_llama):
    import torch._dynamo

    if not hasattr(torch._dynamo.config, "enable_trace_contextlib"):  # torch 2.6
        pytest.skip("PEFT's own forward breaks the graph, with a LoRA as well")
    torch._dynamo.reset()
    targets = ["q_proj", "down_proj", "k_proj"]  # projectors on both sides
    model = get_peft_model(tiny_llama(num_hidden_layers=2), config(target_modules=targets)).train()
    model(IDS, labels=IDS).loss.backward()
    eager = {n: p.grad for n, p in matrices(model).items()}
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


@pytest.mark.parametrize("method", [config(), pica.SvftConfig(init_weights=False)], ids=["PiCa", "SVFT"])
@pytest.mark.parametrize("settings", [{}, {"target_modules": ["q_proj"]}, {"share": 2}])
def test_a_second_get_peft_model_begins_anew_or_is_refused(tiny_llama, tmp_path: Path, method, settings):
    base = tiny_llama()
    model = get_peft_model(base, copy.deepcopy(method))
    expected = logits(model)
    again = copy.deepcopy(method)
    for name, value in settings.items():
        setattr(again, name, value)
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


@pytest.mark.parametrize("method", [config(), pica.SvftConfig(init_weights=False)], ids=["PiCa", "SVFT"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_averaged_state_dicts_load(tiny_llama, method, dtype):
    """Federated averaging takes the mean of every tensor; on one basis the update is the mean of the updates."""
    clients = [get_peft_model(tiny_llama(), copy.deepcopy(method)) for _ in range(3)]
    states = [{k: v.to(dtype) for k, v in get_peft_model_state_dict(client).items()} for client in clients]
    shares = (0.5, 0.3, 0.2)
    mean = {key: sum(w * state[key] for w, state in zip(shares, states)) for key in states[0]}
    server = get_peft_model(tiny_llama(), copy.deepcopy(method))
    set_peft_model_state_dict(server, cast(Any, mean))
    expected = logits(server)
    exact = get_peft_model_state_dict(server)
    assert torch.equal(
        exact[next(k for k in exact if k.endswith("fingerprint"))].to(dtype),
        next(v for k, v in states[0].items() if k.endswith("fingerprint")),
    )
    assert expected.isfinite().all()
    other = get_peft_model_state_dict(get_peft_model(tiny_llama(seed=1), copy.deepcopy(method)))
    mixed = {key: (states[0][key] + other[key]) / 2 for key in other}
    with pytest.raises(AdapterFileError, match="mean of different ones"):
        set_peft_model_state_dict(server, mixed)


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.mark.usefixtures("traceable")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_is_traced_for_any_length_and_saved(tiny_llama, tmp_path: Path, grad: bool):
    targets = ["embed_tokens", "q_proj", "down_proj", "k_proj"]  # projectors on both sides
    model = Logits(get_peft_model(tiny_llama(num_hidden_layers=1), config(target_modules=targets)).eval())
    with torch.set_grad_enabled(grad):
        torch.jit.save(torch.jit.trace(model, (IDS,), check_trace=False), tmp_path / "traced.pt")
        traced = torch.jit.load(tmp_path / "traced.pt")
        longer = torch.cat([IDS, IDS.flip(1)], dim=1)
        torch.testing.assert_close(traced(longer), model(longer))


# ---- copies and other containers -------------------------------------------------------------------------------------


def test_copies_share_nothing_and_keep_sharing_inside(tiny_llama):
    model = get_peft_model(tiny_llama(), config())
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


def test_lora_conversion_is_exact_to_rounding(tiny_llama):
    model = get_peft_model(tiny_llama(), config())
    lora_config, state = convert_to_lora(model, rank=8)
    lora = get_peft_model(tiny_llama(), lora_config)
    assert not torch.allclose(logits(lora), logits(model), atol=1e-1)
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(logits(lora), logits(model), atol=1e-3, rtol=1e-4)


# ---- what torch itself does with a model ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [PicaConfig, pica.SvftConfig])
def test_unmerging_after_a_change_of_precision(tiny_llama, method):
    base = tiny_llama()
    model = get_peft_model(copy.deepcopy(base), method(init_weights=False))
    model.merge_adapter()
    model.bfloat16()
    model.base_model.merge_adapter()  # there is nothing more to merge
    model.unmerge_adapter()
    state = {k.replace(".base_layer", ""): v for k, v in get_base_model_state_dict(model).items()}
    assert all(torch.equal(state[k], v.bfloat16()) for k, v in base.state_dict().items())
    logits(model)


@pytest.mark.parametrize("method", [PicaConfig, pica.SvftConfig])
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
