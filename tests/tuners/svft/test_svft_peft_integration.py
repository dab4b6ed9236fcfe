"""What users of PEFT and transformers do with any method, done with SVFT."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import cast

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    convert_to_lora,
    get_base_model_state_dict,
    get_peft_model,
    set_peft_model_state_dict,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pica
from pica import PicaConfig, SvftConfig
from pica.errors import AdapterFileError, BasisMismatchError
from pica.tuners.svft.layer import SvftLinear

IDS = torch.randint(3, 96, (3, 7), generator=torch.Generator().manual_seed(1))
PATTERNS = {
    "plain": {},
    "narrow band": {"pattern": "banded", "off_diagonals": 1},
    "random, shared": {"pattern": "random", "off_diagonals": 2, "share": "role"},
    "top_k": {"pattern": "top_k", "off_diagonals": 2},
    "top_k, shared": {"pattern": "top_k", "off_diagonals": 2, "share": "role"},
}
WEIGHTS = "adapter_model.safetensors"


def config(**settings) -> SvftConfig:
    return SvftConfig(**{"init_weights": False, "task_type": "CAUSAL_LM", **settings})


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def entries(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if ".svft_T." in f".{n}"}


def layers_of(model: nn.Module) -> list[SvftLinear]:
    return [m for m in model.modules() if isinstance(m, SvftLinear)]


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_loader_gives_the_same_model(tiny_llama, tmp_path: Path, pattern, low_cpu_mem_usage):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(type(tiny_llama()).from_pretrained(tmp_path / "base"), config(**PATTERNS[pattern]))
    expected = logits(model)
    pica.save_adapter(model, tmp_path / "adapter")
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(auto), expected)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), expected)
    loaded.load_adapter(str(tmp_path / "adapter"), "second", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), expected)
    assert not any(p.is_meta for p in loaded.parameters())
    plain = tiny_llama()
    plain.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(plain), expected)


def test_the_file_holds_the_entries_and_little_beside_them(tiny_llama, tmp_path):
    get_peft_model(tiny_llama(), config(pattern="random", off_diagonals=1)).save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        names = list(file.keys())
    assert sum(name.endswith("fingerprint") for name in names) == 1
    assert len(names) == 15 + 1  # random positions follow from the configuration
    get_peft_model(tiny_llama(), config(pattern="top_k", off_diagonals=1)).save_pretrained(tmp_path / "top")
    stored = load_file(tmp_path / "top" / WEIGHTS)
    assert len([k for k in stored if "positions:" in k]) == 15


@pytest.mark.parametrize(
    ("settings", "overrides"),
    [
        ({"modules_to_save": ["lm_head"]}, {}),
        ({"trainable_token_indices": [1, 5, 9]}, {"tie_word_embeddings": True}),
        ({"bias": "all"}, {"attention_bias": True}),
        ({"bias": "svft_only", "pattern": "banded", "off_diagonals": 2}, {"attention_bias": True}),
        ({"layers_to_transform": [0, 2], "pattern": "random", "off_diagonals": 1}, {}),
    ],
)
def test_a_trained_adapter_survives_its_file_and_merging(tiny_llama, tmp_path, settings, overrides):
    model = get_peft_model(tiny_llama(**overrides), config(**settings))
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


def test_damaged_positions_are_refused_and_the_model_left_as_it_was(tiny_llama, tmp_path):
    get_peft_model(tiny_llama(), config(pattern="top_k", off_diagonals=1)).save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    key = next(k for k in stored if "positions:" in k)
    for value, message in [
        (stored[key].flip(0), "must hold rising positions in a"),
        (stored[key][:-1].clone(), "is expected"),
        (stored[key].float(), "torch.float32"),
        (None, "is missing"),
    ]:
        broken = {**stored, key: value}
        save_file({k: v for k, v in broken.items() if v is not None}, tmp_path / WEIGHTS, {"format": "pt"})
        base = tiny_llama()
        with pytest.raises(AdapterFileError, match=message):
            PeftModel.from_pretrained(base, tmp_path)
        assert not layers_of(base)
        if value is not None and value.shape == stored[key].shape and value.dtype == stored[key].dtype:
            other = tiny_llama()
            other.load_adapter(str(tmp_path))  # writes into the model directly; the first forward pass looks
            with pytest.raises(AdapterFileError, match=message):
                logits(other)


# ---- meaning ---------------------------------------------------------------------------------------------------------


def other_signs(monkeypatch, seed: int = 5) -> None:
    """Make every decomposition come out with other signs, as another solver's may."""
    real = pica.basis.factorise

    def flipped(weight, *, name="weight"):
        f = real(weight, name=name)
        signs = torch.randint(0, 2, (len(f.values),), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
        return type(f)(f.left * signs, f.values, f.right * signs[:, None], f.usable)

    monkeypatch.setattr("pica.tuners.svft.plan.factorise", flipped)
    monkeypatch.setattr("pica.tuners.svft.layer.factorise", flipped)


@pytest.mark.parametrize("how", ["from_pretrained", "load_adapter beside another", "transformers"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_other_signs_are_put_right(tiny_llama, tmp_path, monkeypatch, pattern, how):
    model = get_peft_model(tiny_llama(), config(**PATTERNS[pattern]))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    other_signs(monkeypatch)
    if pattern != "plain":  # u_i v_i^T knows no signs, u_i v_j^T does
        unaware = get_peft_model(tiny_llama(), config(**PATTERNS[pattern]))
        with torch.no_grad():
            for mine, theirs in zip(entries(unaware).values(), entries(model).values()):
                mine.copy_(theirs)
        assert (logits(unaware) - expected).abs().max() > 0.1
    if how == "from_pretrained":
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    elif how == "transformers":
        loaded = tiny_llama()
        loaded.load_adapter(str(tmp_path))
    else:
        loaded = get_peft_model(tiny_llama(), config(), "first")
        of_first = logits(loaded)
        loaded.load_adapter(str(tmp_path), "second")
        torch.testing.assert_close(logits(loaded), of_first, atol=0, rtol=0)
        loaded.set_adapter("second")
    torch.testing.assert_close(logits(loaded), expected, atol=1e-4, rtol=1e-4)


def test_equal_singular_values_are_rotated_back(monkeypatch, tmp_path):
    """Within a cluster of equal singular values both sides turn together; only wide fingerprints can tell how."""

    def base() -> nn.Module:
        g = torch.Generator().manual_seed(0)
        left, _ = torch.linalg.qr(torch.randn(12, 12, generator=g))
        right, _ = torch.linalg.qr(torch.randn(12, 12, generator=g))
        linear = nn.Linear(12, 12, bias=False)
        linear.weight.data = left @ torch.diag(torch.tensor([5.0, 4, 4, 4, *torch.linspace(3, 1, 8)])) @ right.T
        return nn.Sequential(linear)

    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(3))
    model = get_peft_model(
        base(), SvftConfig(target_modules=["0"], init_weights=False, pattern="banded", off_diagonals=1)
    )
    expected = model(x)
    model.save_pretrained(tmp_path)
    real = pica.basis.factorise
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(7)))[0]

    def turned(weight, *, name="weight"):
        f = real(weight, name=name)
        left, right = f.left.clone(), f.right.clone()
        left[:, 1:4], right[1:4] = left[:, 1:4] @ turn.T, turn @ right[1:4]
        return type(f)(left, f.values, right, f.usable)

    monkeypatch.setattr("pica.tuners.svft.plan.factorise", turned)
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path)(x), expected, atol=1e-3, rtol=1e-3)


def test_another_base_is_refused_with_the_ways_out(tiny_llama, tmp_path):
    model = get_peft_model(tiny_llama(), config())
    model.save_pretrained(tmp_path)
    base = tiny_llama(seed=1)
    with pytest.raises(BasisMismatchError, match=r"15 of 15 layers differ.*another base model.*pica merge"):
        PeftModel.from_pretrained(base, tmp_path)
    assert not layers_of(base)
    assert "svft_T" not in dict(base.named_children())
    merged = copy.deepcopy(model).merge_and_unload()
    with pytest.raises(BasisMismatchError, match="15 of 15 layers differ"):
        PeftModel.from_pretrained(cast(nn.Module, merged), tmp_path)


# ---- several adapters, merging ---------------------------------------------------------------------------------------


def test_adapters_of_other_patterns_leave_each_other_alone(tiny_llama):
    base = logits(tiny_llama())
    model = get_peft_model(tiny_llama(), config(), "a")
    of_a = logits(model)
    model.add_adapter("b", config(pattern="banded", off_diagonals=2))
    assert torch.equal(logits(model), of_a)
    model.set_adapter("b")
    of_b = logits(model)
    assert not torch.allclose(of_b, of_a, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    cast(pica.SvftModel, model.base_model).set_adapter(["a", "b"])
    both, weights = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    model.merge_adapter(["a"], safe_merge=True)
    model.merge_adapter(["b"])
    torch.testing.assert_close(logits(model), both, atol=1e-3, rtol=1e-3)
    model.unmerge_adapter()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    model.set_adapter("b")
    model.delete_adapter("b")
    assert model.active_adapters == ["a"]
    assert torch.equal(logits(model), of_a)
    assert model.get_model_status().peft_types == {"a": "SVFT"}
    plain = model.unload()
    assert torch.equal(logits(plain), base)
    assert set(plain.state_dict()) == set(tiny_llama().state_dict())


def test_mixed_batches_give_each_sample_its_adapter(tiny_llama):
    model = get_peft_model(tiny_llama(), config(), "a").eval()
    model.add_adapter("b", config(pattern="random", off_diagonals=2))
    wanted = []
    for row, name in enumerate(["a", "__base__", "b"]):
        if name == "__base__":
            with model.disable_adapter():
                wanted.append(logits(model)[row])
        else:
            model.set_adapter(name)
            wanted.append(logits(model)[row])
    with torch.no_grad():
        mixed = model(IDS, adapter_names=["a", "__base__", "b"]).logits
    torch.testing.assert_close(mixed, torch.stack(wanted), atol=1e-4, rtol=1e-4)


def test_pica_and_svft_adapters_of_one_model_keep_apart(tiny_llama, tmp_path):
    """transformers puts both into one base model, on different layers."""
    model = tiny_llama()
    model.add_adapter(PicaConfig(r=4, target_modules=["q_proj"], init_weights=False), "p")
    of_p = logits(model)
    model.add_adapter(config(target_modules=["v_proj"]), "s")
    model.set_adapter("p")
    model.save_pretrained(tmp_path / "p")
    model.set_adapter("s")
    of_s = logits(model)
    model.save_pretrained(tmp_path / "s")
    apart = PeftModel.from_pretrained(tiny_llama(), tmp_path / "s")
    assert torch.equal(logits(apart), of_s)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "p")), of_p)


def test_lora_conversion_is_exact_to_rounding(tiny_llama):
    targets = ["q_proj", "down_proj", "up_proj"]
    model = get_peft_model(tiny_llama(), config(pattern="banded", off_diagonals=1, target_modules=targets))
    lora_config, state = convert_to_lora(model, rank=64)
    lora = get_peft_model(tiny_llama(), lora_config)
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(logits(lora), logits(model), atol=1e-3, rtol=1e-3)


def test_the_base_models_state_has_no_adapter_in_it(tiny_llama):
    base = tiny_llama()
    keys = set(base.state_dict())
    assert set(get_base_model_state_dict(get_peft_model(base, config(pattern="top_k", off_diagonals=1)))) == keys


# ---- precision, checkpointing, compilation, copies -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("pattern", ["plain", "narrow band", "top_k"])
def test_half_precision_bases(tiny_llama, dtype, autocast_adapter_dtype, pattern):
    model = get_peft_model(
        tiny_llama(dtype=dtype), config(**PATTERNS[pattern]), autocast_adapter_dtype=autocast_adapter_dtype
    )
    expected = torch.float32 if autocast_adapter_dtype else dtype
    assert {p.dtype for p in entries(model).values()} == {expected}
    assert logits(model).dtype == dtype
    model.train()
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == expected for p in entries(model).values())


@pytest.mark.parametrize("pattern", ["plain", "narrow band", "top_k"])
def test_autocast(tiny_llama, pattern):
    model = get_peft_model(tiny_llama(), config(**PATTERNS[pattern])).train()
    model(IDS, labels=IDS).loss.backward()
    exact = {n: p.grad for n, p in entries(model).items()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    for name, parameter in entries(model).items():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        wanted = exact[name]
        assert wanted is not None
        assert float(torch.cosine_similarity(parameter.grad, wanted, dim=0)) > 0.9


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_llama, use_reentrant):
    model = get_peft_model(tiny_llama(), config(pattern="random", off_diagonals=1, share="role")).train()
    model(IDS, labels=IDS).loss.backward()
    plain = {n: p.grad for n, p in entries(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in entries(model).items():
        torch.testing.assert_close(parameter.grad, plain[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pattern", ["plain", "narrow band", "top_k, shared"])
def test_compiles_without_graph_breaks(tiny_llama, pattern):
    import torch._dynamo

    if not hasattr(torch._dynamo.config, "enable_trace_contextlib"):  # torch 2.6
        pytest.skip("PEFT's own forward breaks the graph, with a LoRA as well")
    torch._dynamo.reset()
    model = get_peft_model(tiny_llama(num_hidden_layers=1), config(**PATTERNS[pattern])).train()
    model(IDS, labels=IDS).loss.backward()
    eager = {n: p.grad for n, p in entries(model).items()}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(IDS, labels=IDS).loss.backward()
    for name, parameter in entries(model).items():
        torch.testing.assert_close(parameter.grad, eager[name], atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits


@pytest.mark.usefixtures("traceable")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("pattern", ["plain", "narrow band", "top_k, shared"])
def test_is_traced_for_any_length_and_saved(tiny_llama, tmp_path: Path, pattern: str, grad: bool):
    model = Logits(get_peft_model(tiny_llama(num_hidden_layers=1), config(**PATTERNS[pattern])).eval())
    with torch.set_grad_enabled(grad):
        torch.jit.save(torch.jit.trace(model, (IDS,), check_trace=False), tmp_path / "traced.pt")
        traced = torch.jit.load(tmp_path / "traced.pt")
        longer = torch.cat([IDS, IDS.flip(1)], dim=1)
        torch.testing.assert_close(traced(longer), model(longer))


def test_copies_share_nothing_and_keep_sharing_inside(tiny_llama):
    model = get_peft_model(tiny_llama(), config(pattern="top_k", off_diagonals=1, share="role"))
    expected = logits(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    twins = [copy.deepcopy(model), copy.deepcopy(model.get_base_model()), torch.load(buffer, weights_only=False)]
    with torch.no_grad():
        for parameter in entries(model).values():
            parameter.zero_()
    assert not torch.allclose(logits(model), expected)
    for twin in twins:
        assert torch.equal(logits(twin), expected)
        assert len(entries(twin)) == 5
