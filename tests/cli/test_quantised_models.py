"""A run on a base model that is quantised on loading, by the command line: train, evaluate, verify, export, merge."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pica.experiments.models import load_model, load_tokenizer
from pica.experiments.recipes.recipe import ModelSection


def test_a_quantised_run_from_training_to_the_merged_model(pica: Callable, quick: list[str], tmp_path: Path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    run, merged = tmp_path / "run", tmp_path / "merged"
    # the embedded model's widths are multiples of bitsandbytes' blocks of 64
    given = [*quick, "--model.path", "embedded", "--model.quantization", "nf4", "--name", "nf4"]
    outcome = pica("train", *given, "-o", run)
    assert outcome.status == 0, outcome.err
    trained = json.loads((run / "metrics.json").read_text())["adapter"]
    evaluated = pica("evaluate", run, "--json")
    assert evaluated.status == 0, evaluated.err
    assert json.loads(evaluated.out)["loss"] == pytest.approx(trained["loss"], rel=1e-2)
    refused = pica("verify", run)
    assert refused.status != 0
    assert "trained on float32 dequantised bnb nf4 weights, these are float32 unquantised" in " ".join(
        refused.out.split()
    )
    assert pica("merge", run, "-o", merged).status == 0
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    again = pica("evaluate", merged, "--task", "arithmetic", "--limit", "4", "--max-new-tokens", "4", "--json")
    assert again.status == 0, again.err
    # of one CPU to the next bitsandbytes may round the scales to bfloat16 in evaluation
    assert json.loads(again.out)["loss"] == pytest.approx(trained["loss"], rel=1e-2)


def test_an_adapter_of_a_quantised_checkpoint_is_merged_in_full(pica: Callable, quick: list[str], tmp_path: Path):
    """The recipe says nothing of the quantisation: the checkpoint was quantised before."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    base, run, merged = tmp_path / "nf4", tmp_path / "run", tmp_path / "merged"
    section = ModelSection(path="embedded", quantization="nf4")
    load_model(section).save_pretrained(base)
    load_tokenizer(section).save_pretrained(base)
    outcome = pica("train", *quick, "--model.path", base, "-o", run)
    assert outcome.status == 0, outcome.err
    trained = json.loads((run / "metrics.json").read_text())["adapter"]
    outcome = pica("merge", run, "-o", merged)
    assert outcome.status == 0, outcome.err
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(merged).parameters()} == {torch.float32}
    again = pica("evaluate", merged, "--task", "arithmetic", "--limit", "4", "--max-new-tokens", "4", "--json")
    assert again.status == 0, again.err
    assert json.loads(again.out)["loss"] == pytest.approx(trained["loss"], rel=1e-2)


def test_a_classifier_is_not_quantised(pica: Callable, quick: list[str], tmp_path: Path):
    outcome = pica("train", *quick, "--task.name", "sentiment", "--model.quantization", "int8", "-o", tmp_path / "run")
    assert outcome.status == 2
    assert "model.quantization is for tasks that generate text, and sentiment is none" in outcome.err
