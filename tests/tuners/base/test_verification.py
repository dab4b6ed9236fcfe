"""A loaded adapter computes what was trained, or loading refuses: solvers with other signs, rotations, orders and errors."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import pica.basis._progress
import pica.tuners.pica.layer
from pica import PicaConfig, SvftConfig
from pica.basis import Basis, solve_basis, spectral
from pica.errors import AdapterFileError, BasisMismatchError
from pica.tuners.base import verification as meaning
from pica.tuners.base.bank import find_banks
from pica.tuners.base.frozen_weight import FrozenWeight
from pica.tuners.pica.layer import PicaLinear
from tests.shared import IDS, layers_of, logits


@pytest.fixture
def saved(tiny_llama, tmp_path) -> tuple[LlamaForCausalLM, str, Tensor]:
    """(base, adapter folder, logits of the trained adapter)."""
    return save(tiny_llama(), str(tmp_path / "adapter"))


def save(base: LlamaForCausalLM, folder: str, **settings) -> tuple[LlamaForCausalLM, str, Tensor]:
    model = get_peft_model(copy.deepcopy(base), PicaConfig(**{"r": 8, "init_weights": False, **settings})).eval()
    model.save_pretrained(folder)
    return base, folder, logits(model)


def inject(monkeypatch, change: Callable[[Basis, Tensor], Basis]) -> None:
    """Make every basis from now on come out of another, equally correct solver."""

    def solve(weight, *args, **kwargs):
        return change(solve_basis(weight, *args, **kwargs), weight)

    for module in (pica.basis._progress, pica.tuners.pica.layer):
        monkeypatch.setattr(module, "solve_basis", solve)


def random_signs(basis: Basis, weight: Tensor, seed: int = 0) -> Basis:
    g = torch.Generator().manual_seed(seed)
    signs = torch.where(torch.rand(basis.rank, generator=g) < 0.5, -1.0, 1.0).to(basis.projector)
    return replace(basis, projector=basis.projector * signs[:, None])


def test_another_solvers_signs_are_put_right(saved, monkeypatch):
    base, folder, trained = saved
    inject(monkeypatch, random_signs)
    fresh = get_peft_model(copy.deepcopy(base), PicaConfig(r=8))
    plain = get_peft_model(copy.deepcopy(base), PicaConfig(r=8))
    for model in (fresh, plain):  # without the fingerprint the adapter would be another one: the control
        for (_, p), value in zip(
            sorted((n, p) for n, p in model.named_parameters() if p.requires_grad), sorted_matrices(folder)
        ):
            p.data.copy_(value)
    assert (logits(plain) - trained).abs().max() > 1e-2
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    torch.testing.assert_close(logits(loaded), trained, atol=2e-5, rtol=0)


def sorted_matrices(folder: str) -> list[Tensor]:
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    return [tensors[k] for k in sorted(tensors) if not k.endswith("fingerprint")]


def test_training_goes_on_in_the_trained_orientation_and_saves_it(saved, monkeypatch, tmp_path):
    base, folder, trained = saved
    with monkeypatch.context() as patch:
        inject(patch, random_signs)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=True)
        loaded.save_pretrained(str(tmp_path / "again"))
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "again"))
    torch.testing.assert_close(logits(again), trained, atol=1e-6, rtol=0)


@pytest.mark.parametrize("how", ["load_adapter", "into an existing adapter", "transformers", "AutoPeftModel"])
def test_every_way_of_loading_puts_signs_right(saved, monkeypatch, tmp_path, how):
    base, folder, trained = saved
    base.save_pretrained(tmp_path / "base")
    inject(monkeypatch, random_signs)
    if how == "load_adapter":
        model = get_peft_model(copy.deepcopy(base), PicaConfig(r=4), adapter_name="first")
        model.load_adapter(folder, "second")
        model.set_adapter("second")
    elif how == "into an existing adapter":  # what the Trainer does to resume
        model = get_peft_model(copy.deepcopy(base), PicaConfig(r=8))
        model.load_adapter(folder, "default", is_trainable=True)
    elif how == "transformers":
        model = copy.deepcopy(base)
        model.load_adapter(folder)
    else:
        config = PicaConfig.from_pretrained(folder)
        config.base_model_name_or_path = str(tmp_path / "base")
        config.save_pretrained(folder)
        model = AutoPeftModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(model), trained, atol=2e-5, rtol=0)


def test_two_adapters_of_opposite_orientation_live_in_one_model(saved, monkeypatch, tmp_path):
    base, folder, trained = saved
    with monkeypatch.context() as patch:
        inject(patch, random_signs)
        _, other, trained_there = save(base, str(tmp_path / "other"))
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name="one")
    model.load_adapter(other, "two")
    for name, expected in (("one", trained), ("two", trained_there), ("one", trained)):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)


def tie_spectrum(model: LlamaForCausalLM, sizes: int) -> LlamaForCausalLM:
    """Give each adapted weight clusters of `sizes` exactly equal singular values."""
    for name, parameter in model.named_parameters():
        if "_proj" in name:
            u, s, vt = torch.linalg.svd(parameter.data.double(), full_matrices=False)
            tied = s[torch.arange(len(s)) // sizes * sizes]
            parameter.data = ((u * tied) @ vt).float()
    return model


def rotate_inside_clusters(size: int) -> Callable[[Basis, Tensor], Basis]:
    def change(basis: Basis, weight: Tensor) -> Basis:
        g = torch.Generator().manual_seed(1)
        projector = basis.projector.clone()
        for start in range(0, basis.rank - size + 1, size):
            q, _ = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))
            projector[start : start + size] = q.to(projector) @ projector[start : start + size]
        return replace(basis, projector=projector)

    return change


@pytest.mark.parametrize("size", [2, 4, 8])
def test_rotations_inside_clusters_are_put_right_where_the_probes_determine_them(
    tiny_llama, tmp_path, monkeypatch, size
):
    base, folder, trained = save(tie_spectrum(tiny_llama(), size), str(tmp_path))
    inject(monkeypatch, rotate_inside_clusters(size))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    torch.testing.assert_close(logits(loaded), trained, atol=5e-3, rtol=0)


def test_tied_values_in_another_order_are_put_right(tiny_llama, tmp_path, monkeypatch):
    base, folder, trained = save(tie_spectrum(tiny_llama(), 2), str(tmp_path))
    inject(monkeypatch, lambda b, w: replace(b, projector=b.projector.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    torch.testing.assert_close(logits(loaded), trained, atol=5e-3, rtol=0)


@pytest.mark.parametrize("make", ["orthogonal", "identity", "block-repeated"])
def test_clusters_too_large_for_the_probes_load_exactly_or_not_at_all(tiny_llama, tmp_path, monkeypatch, make):
    base = tiny_llama(num_key_value_heads=4, intermediate_size=64)
    for i, (name, parameter) in enumerate(base.named_parameters()):
        if "_proj" in name:
            g = torch.Generator().manual_seed(i)
            q = torch.linalg.qr(torch.randn(64, 64, generator=g))[0]
            blocks = torch.linalg.qr(torch.randn(16, 16, generator=g))[0].repeat(4, 4) / 4
            parameter.data = {"orthogonal": q, "identity": torch.eye(64), "block-repeated": blocks}[make]
    base, folder, trained = save(base, str(tmp_path), r=16)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(copy.deepcopy(base), folder)), trained, atol=1e-5, rtol=0
    )
    inject(monkeypatch, rotate_inside_clusters(16))
    with pytest.raises(BasisMismatchError):
        PeftModel.from_pretrained(copy.deepcopy(base), folder)


@pytest.mark.parametrize("error", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
def test_a_perturbed_base_gives_a_bounded_difference_a_warning_or_a_refusal(saved, error):
    base, folder, trained = saved
    changed = copy.deepcopy(base)
    g = torch.Generator().manual_seed(3)
    for name, parameter in changed.named_parameters():
        if "_proj" in name:
            parameter.data += error * parameter.data.norm() / 64 * torch.randn(parameter.shape, generator=g)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            loaded = PeftModel.from_pretrained(copy.deepcopy(changed), folder)
        except BasisMismatchError:
            assert error >= 1e-3
            return
    assert error <= 1e-2
    spoke = any("not exactly those of the training" in str(w.message) for w in caught)
    difference = (logits(loaded) - trained).norm() / trained.norm()
    assert difference < 300 * error + 1e-5
    assert spoke or difference < 0.05


def test_rounded_weights_load_with_a_warning_that_gives_the_deviation(tiny_llama, tmp_path):
    base, folder, trained = save(tiny_llama(hidden_size=128, intermediate_size=256), str(tmp_path))
    rounded = copy.deepcopy(base)
    for parameter in rounded.parameters():
        parameter.data = parameter.data.half().float()
    loaded = PeftModel.from_pretrained(
        rounded, folder
    )  # half precision, eight times finer than bfloat16: may be silent
    assert (logits(loaded) - trained).norm() / trained.norm() < 0.05
    with pytest.warns(UserWarning, match=r"trained on float32 weights, these are bfloat16.*deviates by up to \d"):
        PeftModel.from_pretrained(tiny_llama(hidden_size=128, intermediate_size=256, dtype=torch.bfloat16), folder)


def test_another_base_is_refused_and_left_clean(saved, tiny_llama):
    _, folder, _ = saved
    other = tiny_llama(seed=1)
    before = logits(other)
    with pytest.raises(BasisMismatchError, match=r"15 of 15 layers differ.*another base model or another revision"):
        PeftModel.from_pretrained(other, folder)
    assert not [m for m in other.modules() if isinstance(m, PicaLinear)]
    assert torch.equal(logits(other), before)


@pytest.mark.parametrize(
    ("blocks", "told"),
    [
        (1, r"5 of 15 layers differ.*cause: a base model of which some layers were changed"),
        (3, r"15 of 15 layers differ.*cause: a merged, fine-tuned or quantised copy of the base model"),
    ],
)
def test_a_changed_copy_of_the_base_is_told_from_another_model(saved, blocks: int, told: str):
    base, folder, _ = saved
    for block in base.model.layers[:blocks]:
        for parameter in block.parameters():
            parameter.data += 0.05 * parameter.data.std() * torch.randn(parameter.shape)
    with pytest.raises(BasisMismatchError, match=told):
        PeftModel.from_pretrained(base, folder)


def test_a_refused_second_adapter_leaves_the_first_as_it_was(saved, tiny_llama):
    _, folder, _ = saved
    model = get_peft_model(tiny_llama(seed=1), PicaConfig(r=8, init_weights=False), adapter_name="mine")
    before = logits(model)
    with pytest.raises(BasisMismatchError):
        model.load_adapter(folder, "theirs")
    assert list(model.peft_config) == ["mine"]
    assert torch.equal(logits(model), before)


def test_a_merged_base_is_refused_by_the_layers_that_changed(saved):
    base, folder, _ = saved
    model = get_peft_model(
        copy.deepcopy(base), PicaConfig(r=8, target_modules=["q_proj"], init_weights=False)
    ).merge_and_unload()
    with pytest.raises(BasisMismatchError, match=r"3 of 15 layers differ.*q_proj.*merged"):
        PeftModel.from_pretrained(model, folder)


def test_transformers_own_loader_refuses_before_the_first_output(saved, tiny_llama):
    _, folder, _ = saved
    other = tiny_llama(seed=1)
    other.load_adapter(folder)
    with pytest.raises(BasisMismatchError, match="another base model"):
        other(IDS)


@pytest.mark.parametrize("side", ["q_proj", "down_proj"], ids=["input side", "output side"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_basis_needs_no_solver(tiny_llama, tmp_path, monkeypatch, dtype, side):
    base, folder, trained = save(tiny_llama(dtype=dtype), str(tmp_path), save_basis=True, target_modules=[side])
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    stored = {k: v for k, v in tensors.items() if ".basis:" in k}
    assert len(stored) == 3
    assert all(v.dtype == dtype and min(v.shape) == 8 for v in stored.values())

    def refuse(*args, **kwargs):
        raise AssertionError("solved a basis that the file holds")

    for module in (pica.basis._progress, pica.tuners.pica.layer):
        monkeypatch.setattr(module, "solve_basis", refuse)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert torch.equal(logits(loaded), trained)


def test_a_stored_basis_does_not_excuse_another_base(tiny_llama, tmp_path):
    _, folder, _ = save(tiny_llama(), str(tmp_path), save_basis=True)
    with pytest.raises(BasisMismatchError):
        PeftModel.from_pretrained(tiny_llama(seed=1), folder)


@pytest.mark.parametrize(
    "damage", ["no fingerprint", "garbled fingerprint", "NaN", "missing", "extra", "shape", "dtype"]
)
def test_a_file_that_does_not_fit_is_one_clear_error_and_leaves_no_trace(saved, damage):
    base, folder, _ = saved
    path = f"{folder}/adapter_model.safetensors"
    tensors = load_file(path)
    matrix = next(k for k in tensors if "q_proj" in k)
    fingerprint = next(k for k in tensors if k.endswith("fingerprint"))
    if damage == "no fingerprint":
        del tensors[fingerprint]
    elif damage == "garbled fingerprint":
        tensors[fingerprint] = tensors[fingerprint][:-5].clone()
    elif damage == "NaN":
        tensors[matrix][3, 2] = float("nan")
    elif damage == "missing":
        del tensors[matrix]
    elif damage == "extra":
        tensors["base_model.model.pica_M.model-layers-N-extra-64"] = torch.zeros(64, 8)
    elif damage == "shape":
        tensors[matrix] = tensors[matrix][:, :5].clone()
    else:
        tensors[matrix] = tensors[matrix].to(torch.int32)
    save_file(tensors, path)
    before = logits(base)
    with pytest.raises(AdapterFileError):
        PeftModel.from_pretrained(base, folder)
    assert not [m for m in base.modules() if isinstance(m, PicaLinear)]
    assert torch.equal(logits(base), before)


def test_a_config_used_twice_is_no_saved_adapter(tiny_llama):
    config = PicaConfig(r=8)
    for seed in (0, 1):
        get_peft_model(tiny_llama(seed=seed), config)(IDS)


def test_a_larger_rank_later_keeps_what_smaller_adapters_were_trained_with(saved, monkeypatch):
    base, folder, trained = saved
    inject(monkeypatch, random_signs)
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name="small")
    model.add_adapter("large", PicaConfig(r=24))
    model.set_adapter("small")
    torch.testing.assert_close(logits(model), trained, atol=2e-5, rtol=0)
    layer = next(m for m in model.modules() if isinstance(m, PicaLinear))
    rows = layer.method.directions("principal", layer.frozen.read())
    torch.testing.assert_close(rows @ rows.T, torch.eye(24), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", [PicaConfig, SvftConfig], ids=lambda method: method.method)
def test_one_check_serves_every_adapter_with_the_same_fingerprint(monkeypatch, tiny_llama, tmp_path, method):
    """Hundreds of adapters of one base are loaded; another base's is refused however many fit before it."""
    for seed, name in ((0, "a"), (0, "b"), (7, "foreign")):
        get_peft_model(tiny_llama(seed), method(init_weights=False)).save_pretrained(str(tmp_path / name))
    checks = []
    original = meaning.check_fingerprint
    monkeypatch.setattr(meaning, "check_fingerprint", lambda *args: checks.append(args[1]) or original(*args))
    model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "a", adapter_name="first")
    model.load_adapter(tmp_path / "b", adapter_name="second")
    assert checks == ["first"]
    ids = torch.arange(5)[None]
    for name, folder in (("first", "a"), ("second", "b")):
        model.set_adapter(name)
        alone = PeftModel.from_pretrained(tiny_llama(), tmp_path / folder)
        assert torch.equal(model(ids).logits, alone(ids).logits)
    with pytest.raises(BasisMismatchError):
        model.load_adapter(tmp_path / "foreign", adapter_name="third")


def test_a_check_reads_each_weight_once(monkeypatch, saved):
    """To dequantise one, or to read it from a checkpoint, takes longer than the rest of the check."""
    base, folder, _ = saved
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    ((_, bank),) = find_banks(model)
    slot, original = bank.matrices("default"), FrozenWeight.read
    assert slot.fingerprint is not None
    reads: list[FrozenWeight] = []
    monkeypatch.setattr(FrozenWeight, "read", lambda weight: reads.append(weight) or original(weight))
    assert all(check.acceptable for check in meaning.check_fingerprint(slot, "default", slot.fingerprint))
    assert len(reads) == len(slot.layers)


def test_new_adapters_on_the_same_bases_share_the_work_of_a_fingerprint(monkeypatch, tiny_llama):
    taken = []
    original = meaning.take_fingerprint
    monkeypatch.setattr(meaning, "take_fingerprint", lambda *args: taken.append(args[1]) or original(*args))
    model = get_peft_model(tiny_llama(), PicaConfig(r=4), adapter_name="first")
    model.add_adapter("second", PicaConfig(r=4))
    model.add_adapter("narrow", PicaConfig(r=2))
    model.add_adapter("random", PicaConfig(r=4, projection="random"))
    assert taken == ["first", "narrow", "random"]
    (_, bank), *_ = find_banks(model)
    fresh, shared = original(bank.matrices("second"), "second"), bank.matrices("second").fingerprint
    assert fresh is not None
    assert shared is not None
    assert torch.equal(fresh, shared)


def test_overlapping_patterns_mean_the_same_after_loading(tiny_llama, tmp_path):
    patterns = {"layers.0.self_attn.q_proj": 2, ".*q_proj": 5}
    groups = {"layers.0.self_attn.q_proj": "first", ".*_proj": "rest"}
    base, folder, trained = save(tiny_llama(), str(tmp_path), rank_pattern=patterns, share=groups)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(base), folder)), trained)


def test_other_ranks_than_those_of_the_training_are_refused(tiny_llama, tmp_path):
    """With the same matrices: what files of earlier versions gave, in which the order of the patterns was lost."""
    patterns = {"layers.0.self_attn.q_proj": 2, ".*q_proj": 5}
    base, folder, _ = save(tiny_llama(), str(tmp_path), rank_pattern=patterns, target_modules=["q_proj"])
    path = Path(folder) / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "rank_pattern": dict(sorted(patterns.items()))}))
    with pytest.raises(AdapterFileError, match="trained with rank 2 at model.layers.0.self_attn.q_proj"):
        PeftModel.from_pretrained(base, folder)


def test_a_refused_stored_basis_leaves_the_one_in_use(tiny_llama, tmp_path):
    base, folder, trained = save(tiny_llama(), str(tmp_path / "own"), save_basis=True)
    _, foreign, _ = save(tiny_llama(seed=1), str(tmp_path / "foreign"), save_basis=True)
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert torch.equal(logits(model), trained)
    with pytest.raises(BasisMismatchError):
        model.load_adapter(foreign, "default")
    assert torch.equal(logits(model), trained)


def test_a_stored_basis_does_not_become_that_of_other_adapters(tiny_llama, tmp_path):
    """Nor does one that reads the other side stand in the way of an adapter of a larger rank."""
    base, folder, trained = save(tiny_llama(), str(tmp_path), save_basis=True)
    tensors = load_file(f"{folder}/adapter_model.safetensors")
    name = next(k for k in tensors if k.endswith("basis:model.layers.0.mlp.down_proj"))
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name="stored")
    wide = cast(PicaLinear, model.get_base_model().get_submodule("model.layers.0.mlp.down_proj"))
    tensors[name] = wide.method.directions(wide.bases.key_of["stored"], wide.frozen.read()).contiguous()
    save_file(tensors, f"{folder}/adapter_model.safetensors", metadata={"format": "pt"})
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name="stored")
    model.add_adapter("large", PicaConfig(r=24))
    torch.testing.assert_close(logits(model), trained, atol=1e-5, rtol=0)
    fresh = get_peft_model(copy.deepcopy(base), PicaConfig(r=24), adapter_name="large")
    for one, other in zip(layers_of(model), layers_of(fresh)):
        assert torch.equal(one.method.require(one.bases.key_of["large"]), other.method.require("principal"))


def test_adapters_with_the_same_stored_basis_share_it_and_give_it_back(tiny_llama, tmp_path):
    base, folder, trained = save(tiny_llama(), str(tmp_path), save_basis=True)
    model = PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name="kept")
    held = [n for n, _ in model.named_buffers() if ".pica_basis_" in n]
    assert len(held) == len(layers_of(model))
    for _ in range(2):
        model.load_adapter(folder, "again")
        assert [n for n, _ in model.named_buffers() if ".pica_basis_" in n] == held
        model.delete_adapter("again")
    _, other, _ = save(tiny_llama(), str(tmp_path / "random"), save_basis=True, projection="random")
    model.load_adapter(other, "other")
    model.delete_adapter("other")
    assert [n for n, _ in model.named_buffers() if ".pica_basis_" in n] == held
    assert torch.equal(logits(model), trained)


def test_bases_of_equal_singular_values_are_not_mixed(monkeypatch):
    """The two solutions have nothing in common but the subspace of all directions: each adapter keeps its own, whole."""
    base = torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False))
    torch.nn.init.orthogonal_(cast(Tensor, base[0].weight))

    def turned(weight: Tensor, rank: int, **kwargs) -> Basis:
        rows = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(rank)))[0][:rank]
        return Basis(rows, "in", torch.ones(rank), "principal", "svd")

    for module in (pica.basis._progress, pica.tuners.pica.layer):
        monkeypatch.setattr(module, "solve_basis", turned)
    model = get_peft_model(base, PicaConfig(r=4, target_modules=["0"]), adapter_name="small")  # pyright: ignore[reportArgumentType]
    model.add_adapter("large", PicaConfig(r=8, target_modules=["0"]))
    (layer,) = layers_of(model)
    for name, rank in (("small", 4), ("large", 8)):
        rows = layer.bases.rows(layer.bases.key_of[name])
        assert rows is not None
        torch.testing.assert_close(rows @ rows.T, torch.eye(rank), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", [PicaConfig(r=8, init_weights=False), pica.SvftConfig(init_weights=False)])
def test_directions_that_rounding_gave_a_weight_are_not_used(tiny_llama, tmp_path, method):
    """A weight with two directions has more once it is rounded, and the matrix, shared with others, has columns for them."""

    def base(rounding: torch.dtype) -> LlamaForCausalLM:
        model = tiny_llama()
        with torch.no_grad():
            weight = model.model.layers[0].mlp.up_proj.weight
            u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
            low = (u[:, :2] * s[:2]) @ v[:2]
            if method.method == "SVFT":  # whose zero is that of float64
                model.double()
                weight = model.model.layers[0].mlp.up_proj.weight
            weight.copy_(low.to(rounding))
        return model

    exact = torch.float64 if method.method == "SVFT" else torch.float32
    method = copy.deepcopy(method)
    method.target_modules = {"up_proj"}
    trained = get_peft_model(base(exact), method).eval()
    trained.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(base(torch.float16), str(tmp_path))
    path = "base_model.model.model.layers.0.mlp.up_proj"
    then, now = (cast(PicaLinear, m.get_submodule(path)).get_delta_weight("default") for m in (trained, loaded))
    assert float((now - then).norm() / then.norm()) < 0.02


def test_an_adapter_that_was_trained_with_directions_that_rounding_made_keeps_them(tiny_llama, tmp_path, monkeypatch):
    """As adapters were saved before such directions were told from the weight's own."""

    def base() -> LlamaForCausalLM:
        model = tiny_llama(dtype=torch.bfloat16)
        weight = model.model.layers[0].mlp.down_proj.weight.data
        g = torch.Generator().manual_seed(1)
        weight.copy_(torch.randn(len(weight), 3, generator=g) @ torch.randn(3, weight.shape[1], generator=g) / 10)
        return model

    config = PicaConfig(r=8, target_modules=["down_proj"], init_weights=False)
    with monkeypatch.context() as before:
        before.setattr(spectral, "clear_count", lambda weight, gains: len(gains))
        trained = get_peft_model(base(), config).eval()
        trained.save_pretrained(str(tmp_path))
    path = "base_model.model.model.layers.0.mlp.down_proj"
    layer = cast(PicaLinear, trained.get_submodule(path))
    model = get_peft_model(base(), config, adapter_name="new").eval()
    model.load_adapter(str(tmp_path), "old")
    model.load_adapter(str(tmp_path), "again")
    found = cast(PicaLinear, model.get_submodule(path))
    assert {name: found.method.usable_rank(name) for name in ("new", "old", "again")} == {
        "new": 3,
        "old": 8,
        "again": 8,
    }
    for name in ("old", "again"):
        torch.testing.assert_close(found.get_delta_weight(name), layer.get_delta_weight("default"))
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), logits(trained))
    model.save_pretrained(str(tmp_path / "both"))
    for name, usable in (("new", 3), ("old", 8)):
        again = PeftModel.from_pretrained(base(), str(tmp_path / "both" / name))
        assert cast(PicaLinear, again.get_submodule(path)).method.usable_rank("default") == usable


def test_a_state_dict_of_another_base_is_refused_before_the_first_output(tiny_llama):
    """What Accelerate's and Lightning's checkpoints are read with: torch writes straight into the model."""
    config = PicaConfig(r=8, init_weights=False)
    state = get_peft_model(tiny_llama(), config).state_dict()
    same = get_peft_model(tiny_llama(), config)
    same.load_state_dict(state)
    logits(same)
    other = get_peft_model(tiny_llama(seed=1), config)
    other.load_state_dict({k: v for k, v in state.items() if "pica_M" in k}, strict=False)
    with pytest.raises(BasisMismatchError):
        other(IDS)


def test_a_state_dict_of_the_other_orientation_is_put_right(saved, monkeypatch):
    base, folder, trained = saved
    state = PeftModel.from_pretrained(copy.deepcopy(base), folder).state_dict()
    inject(monkeypatch, random_signs)
    model = get_peft_model(copy.deepcopy(base), PicaConfig(r=8))
    model.load_state_dict(state)
    torch.testing.assert_close(logits(model), trained, atol=2e-5, rtol=0)


def test_a_basis_that_is_put_right_in_inference_mode_can_be_trained_on(saved, monkeypatch):
    base, folder, _ = saved
    inject(monkeypatch, random_signs)
    model = copy.deepcopy(base)
    model.load_adapter(folder)
    with torch.inference_mode():
        model(IDS)  # holds the bases against the fingerprint, and turns them
    for parameter in model.pica_M.parameters():
        parameter.requires_grad_(True)
    model(IDS, labels=IDS).loss.backward()


def test_a_low_rank_weight_on_a_base_with_near_ties_is_a_mismatch(tmp_path):
    def base(weight: Tensor) -> nn.Sequential:
        model = nn.Sequential(nn.Linear(16, 12, bias=False))
        model[0].weight.data = weight
        return model

    left, right = (torch.linalg.qr(torch.randn(n, 12, generator=torch.Generator().manual_seed(n)))[0] for n in (12, 16))
    low = left[:, :3] @ torch.diag(torch.tensor([3.0, 2.0, 1.0])) @ right[:, :3].T
    model = get_peft_model(base(low), PicaConfig(r=8, target_modules=["0"], init_weights=False))  # pyright: ignore[reportArgumentType]
    model.save_pretrained(str(tmp_path))
    tied = left @ torch.diag(torch.tensor([3.0, 2.0, 1.0] + [0.5] * 9)) @ right.roll(1, dims=0).T
    with pytest.raises(BasisMismatchError, match="another basis"):
        PeftModel.from_pretrained(base(tied), str(tmp_path))
