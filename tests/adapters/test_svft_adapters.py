"""What is done with saved adapters, done with SVFT's: verify, export as a LoRA, hot-swap, the commands."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import pica
from pica import SvftConfig
from pica.cli import main
from pica.errors import BasisMismatchError, ConfigError
from pica.tuners.svft.layer import SvftLinear
from tests.shared import logits

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(base: Any, *, seed: int = 0, **settings: Any) -> PeftModel:
    """`base` with an adapter whose entries look trained: they fall, so that truncation means something."""
    model = get_peft_model(base, SvftConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        fall = torch.linspace(1.0, 0.0, len(parameter)).pow(3)
        parameter.data = 0.5 * torch.randn(len(parameter), generator=generator) * fall
    assert isinstance(model, PeftModel)
    return model


# ---- verify ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"pattern": "top_k", "off_diagonals": 1, "share": "role"}], ids=str)
def test_a_good_adapter_passes_and_another_base_is_told(tiny_llama, tmp_path, settings):
    adapted(tiny_llama(), **settings).save_pretrained(str(tmp_path))
    base = tiny_llama()
    report = pica.verify(tmp_path, base)
    assert [c.passed for c in report.checks] == [True] * 6
    assert "changes the output by" in str(report)
    assert settings.get("pattern", "plain") in str(report)
    assert not [m for m in base.modules() if isinstance(m, SvftLinear)]
    other = pica.verify(tmp_path, tiny_llama(seed=1))
    assert [c.name for c in other.checks if c.passed is False] == ["belongs to this base"]
    smaller = pica.verify(tmp_path, tiny_llama(intermediate_size=48))
    assert [c.name for c in smaller.checks if c.passed is False] == ["right shapes"]


def test_an_adapter_that_does_nothing_or_is_not_finite_is_told(tiny_llama, tmp_path):
    get_peft_model(tiny_llama(), SvftConfig(pattern="top_k", off_diagonals=1)).save_pretrained(str(tmp_path))
    report = pica.verify(tmp_path, tiny_llama())
    assert [c.name for c in report.checks if c.passed is False] == ["has an effect"]
    stored = load_file(tmp_path / "adapter_model.safetensors")
    key = next(k for k, v in stored.items() if v.is_floating_point())
    stored[key][0] = float("nan")
    save_file(stored, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    assert [c.name for c in pica.verify(tmp_path).checks if c.passed is False] == ["finite"]


# ---- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"pattern": "random", "off_diagonals": 1, "share": "role"}], ids=str)
def test_the_export_at_full_rank_is_exact_and_leaves_the_model_alone(tiny_llama, tmp_path, tokens, settings):
    model = adapted(tiny_llama(), **settings)
    expected = logits(model, tokens)
    done = pica.export_lora(model, tmp_path / "lora")
    assert (done.plan.exact, done.plan.rank) == (True, 64)
    assert torch.equal(logits(model, tokens), expected)
    lora = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "lora"))
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    torch.testing.assert_close(logits(lora, tokens), expected, atol=1e-3, rtol=1e-4)
    assert "An SVFT adapter written as a LoRA" in (tmp_path / "lora" / "README.md").read_text()


def test_a_truncated_export_loses_what_was_said_beforehand(tiny_llama, tmp_path):
    model = adapted(tiny_llama(), pattern="banded", off_diagonals=2)
    pica.save_adapter(model, tmp_path / "adapter")
    done = pica.export_lora(tmp_path / "adapter", tmp_path / "lora", tiny_llama(), rank=8)
    assert not done.plan.exact
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    rows = {row.group: row for row in done.plan.rows}
    for layer in (m for m in model.modules() if isinstance(m, SvftLinear)):
        a, b = (stored[f"base_model.model.{layer.path}.lora_{x}.weight"] for x in "AB")
        lost = torch.linalg.norm(layer.get_delta_weight("default") - b @ a)
        row = rows[layer.group_of["default"]]
        assert float(lost) == pytest.approx(row.error, rel=1e-4)
        assert 0 < row.error < row.norm


def test_energy_chooses_the_rank_and_engines_refuse_the_full_one(tiny_llama, tmp_path):
    model = adapted(tiny_llama())
    some = pica.export_lora(model, tmp_path / "lora", energy=0.9)
    assert 1 < some.plan.rank < 32
    assert all(row.relative**2 <= 0.1 + 1e-9 for row in some.plan.rows)


# ---- hot-swap and the commands ---------------------------------------------------------------------------------------


def test_another_adapter_takes_the_place_of_one(tiny_llama, tmp_path, tokens):
    settings = {"pattern": "top_k", "off_diagonals": 1}
    second = adapted(tiny_llama(), seed=1, **settings)
    second.save_pretrained(str(tmp_path / "second"))
    adapted(tiny_llama(), pattern="random", off_diagonals=1).save_pretrained(str(tmp_path / "other"))
    model = adapted(tiny_llama(), **settings)
    before = {n: p for n, p in model.named_parameters() if p.requires_grad}
    pica.hotswap_adapter(model, tmp_path / "second")
    assert torch.equal(logits(model, tokens), logits(second, tokens))
    assert all(p is before[n] for n, p in model.named_parameters() if n in before)
    with pytest.raises(ConfigError, match="pattern: 'top_k' here, 'random' there"):
        pica.hotswap_adapter(model, tmp_path / "other")
    foreign = adapted(tiny_llama(seed=1), **settings)
    with pytest.raises(BasisMismatchError):
        pica.hotswap_adapter(foreign, tmp_path / "second")


def test_the_commands_take_the_adapter(tiny_llama, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    base, folder = str(tmp_path / "base"), str(tmp_path / "adapter")
    adapted(type(tiny_llama()).from_pretrained(base), pattern="banded", off_diagonals=1).save_pretrained(folder)
    assert main(["verify", folder]) == 0
    assert "banded, off_diagonals=1" in capsys.readouterr().out
    assert main(["export", folder, "-o", str(tmp_path / "lora"), "--rank", "8"]) == 0
    assert "LoRA of rank 8" in capsys.readouterr().out
    assert main(["export", folder, "-o", str(tmp_path / "served"), "--for", "llama.cpp", "--energy", "0.5"]) == 0
