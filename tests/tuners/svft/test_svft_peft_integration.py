"""What users of PEFT and transformers do with SVFT, beyond what holds for both methods (`tests/tuners/test_laws.py`)."""

from __future__ import annotations

import copy
from typing import cast

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import pica
from pica import PicaConfig, SvftConfig
from pica.errors import AdapterFileError, BasisMismatchError
from tests.shared import IDS, layers_of, logits

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


def entries(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if ".svft_T." in f".{n}"}


# ---- files -----------------------------------------------------------------------------------------------------------


def test_the_file_holds_the_entries_and_little_beside_them(tiny_llama, tmp_path):
    get_peft_model(tiny_llama(), config(pattern="random", off_diagonals=1)).save_pretrained(tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        names = list(file.keys())
    assert sum(name.endswith("fingerprint") for name in names) == 1
    assert len(names) == 15 + 1  # random positions follow from the configuration
    get_peft_model(tiny_llama(), config(pattern="top_k", off_diagonals=1)).save_pretrained(tmp_path / "top")
    stored = load_file(tmp_path / "top" / WEIGHTS)
    assert len([k for k in stored if "positions:" in k]) == 15


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
    if how != "load_adapter beside another":  # what was turned is no longer kept as it was
        for layer in layers_of(loaded):
            assert len([name for name, _ in layer.named_buffers() if "_basis_" in name]) == 2


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
