"""`pica export` and `pica import` from the command line's entry to files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from pica.cli import main

from .conftest import adapted


@pytest.fixture
def saved(tiny_llama, tmp_path: Path) -> Path:
    """A folder with `base`, and `run/adapter` trained on it."""
    tiny_llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    adapted(base, task_type="CAUSAL_LM").save_pretrained(str(tmp_path / "run" / "adapter"))  # pyright: ignore[reportArgumentType]
    return tmp_path


def test_export_prints_known_and_measured_error(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["export", str(saved / "run"), "-o", str(saved / "lora"), "--rank", "5", "--for", "vllm"])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "LoRA of rank 8 in bfloat16, truncated" in printed
    assert "model-layers-N-mlp-up_proj-112 3 8 of 12" in [" ".join(line.split()[:5]) for line in printed.splitlines()]
    assert "max |difference of outputs|" in printed
    assert (
        f"vllm serve {saved / 'base'} --enable-lora --max-lora-rank 8 --lora-modules lora={saved / 'lora'}" in printed
    )
    config = json.loads((saved / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (8, str(saved / "base"))
    assert config["task_type"] == "CAUSAL_LM"


def test_export_mistakes_are_one_line(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ([str(saved / "run"), "-o", str(saved / "base")], "not empty"),
        ([str(saved / "run"), "-o", str(saved / "x"), "--rank", "0"], "rank=0"),
        ([str(saved / "base"), "-o", str(saved / "x")], "holds no adapter_config.json"),
        ([str(saved / "run"), "-o", str(saved / "x"), "--base", str(saved / "run")], "model"),
    ):
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error
    assert main(["export", str(saved / "run"), "-o", "x", "--rank", "2", "--energy", "0.5"]) == 2
    assert not (saved / "x").exists()


def test_a_merge_in_a_process_of_its_own_knows_the_methods(saved: Path) -> None:
    """There nobody has imported the package before the command does."""
    command = [sys.executable, "-m", "pica", "merge", str(saved / "run"), "-o", str(saved / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    name = "model.layers.0.mlp.up_proj.weight"
    merged, base = (
        LlamaForCausalLM.from_pretrained(saved / folder).get_parameter(name) for folder in ("merged", "base")
    )
    assert not torch.equal(merged, base)


def test_import_survives_saving_and_loading(
    tiny_llama, tokens, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signs of the decomposition, which no recomputation would give, are in the saved folder."""
    tiny_llama().save_pretrained(tmp_path / "base")
    matrix = 0.1 * torch.randn(64, 10, generator=torch.Generator().manual_seed(2))
    (tmp_path / "ref").mkdir()
    torch.save({"q_proj": matrix}, tmp_path / "ref" / "pica_adapter.bin")
    (tmp_path / "ref" / "pica_config.json").write_text(json.dumps({"target_modules": ["q_proj"], "rank": 10}))
    arguments = ["import", str(tmp_path / "ref"), "-o", str(tmp_path / "adapter"), "--svd-device", "cpu"]
    assert main(arguments) == 2  # no base model is recorded
    assert "--base" in capsys.readouterr().err
    assert main([*arguments, "--base", str(tmp_path / "base")]) == 0
    printed = capsys.readouterr()
    assert "basis included" in printed.out
    assert "signs" in printed.err
    assert any(torch.equal(t, matrix) for t in load_file(tmp_path / "adapter" / "adapter_model.safetensors").values())
    with torch.no_grad():
        wanted = tiny_llama()
        for layer in wanted.model.layers:
            weight = layer.self_attn.q_proj.weight
            weight += matrix @ torch.linalg.svd(weight, full_matrices=False)[2][:10]
        found = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter")).eval()
        gap = (found(input_ids=tokens).logits - wanted(input_ids=tokens).logits).abs().max()
        effect = (tiny_llama()(input_ids=tokens).logits - wanted(input_ids=tokens).logits).abs().max()
    assert float(gap) < 1e-4 < 0.1 < float(effect)
