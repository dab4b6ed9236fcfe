"""Runs whose adapter begins with a look at the training data."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pica.basis.file import open_basis
from pica.errors import DataError
from pica.experiments.interrupts import Interrupted
from pica.experiments.recipes.recipe import Recipe
from pica.experiments.reporting import Silent
from pica.experiments.train import calibrating
from pica.experiments.train.run import resume, start
from tests.experiments.train.test_run import Recorder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PICA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shared"


def logits(folder: Path, base: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    with torch.no_grad():
        return model(input_ids=torch.arange(10)[None]).logits


def test_a_basis_is_made_of_the_training_data_once_and_goes_with_the_run(
    recipe: Callable[..., Recipe], cache: Path, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    made = recipe(adapter__projection="activation", adapter__calibration_tokens=600)
    start(made, reporter=Silent())
    out = tmp_path / "out"
    basis = open_basis(out / "basis")
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["basis_digest"] == basis.digest
    assert config["basis_from"] == str(out / "basis")
    assert 500 <= basis.about.calibration["tokens"] <= 600
    assert basis.about.calibration["source"] == "training data of run"
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]
    wanted = logits(out / "adapter", model_folder)

    # another run with the same model, data and settings finds it, and so does a run that was moved
    def again(*args: object, **kwargs: object) -> None:
        raise AssertionError("the basis was made again")

    monkeypatch.setattr(calibrating, "make_basis", again)
    start(
        recipe(
            **{"output": str(tmp_path / "two"), "adapter.projection": "activation", "adapter.calibration_tokens": 600}
        ),
        reporter=Silent(),
    )
    shutil.rmtree(cache)
    out.rename(tmp_path / "moved")
    assert torch.equal(logits(tmp_path / "moved" / "adapter", model_folder), wanted)


def test_an_interrupted_run_goes_on_with_its_own_basis(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Without a cache the run's folder is where it is."""
    made = recipe(adapter__projection="weighted", trainer__learning_rates=[0.01, 0.02], adapter__calibration_tokens=300)
    with pytest.raises(Interrupted):
        start(made, reporter=Recorder(interrupt_in="rate 0.02"))
    digest = open_basis(tmp_path / "out" / "basis").digest
    monkeypatch.setattr(calibrating, "make_basis", None)
    resume(tmp_path / "out", reporter=Silent())
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["basis_digest"] == digest


def test_eva_starts_where_activation_directions_are(recipe: Callable[..., Recipe], tmp_path: Path):
    """At a rate that moves nothing, A of the baseline spans the leading directions of what its layers are given."""
    for method in ("eva", "lora"):
        made = recipe(
            output=str(tmp_path / method),
            adapter__projection="activation",
            adapter__r=8,
            trainer__learning_rate=1e-9,
            baseline__method=method,
            baseline__r=2,
            baseline__learning_rates=[1e-9],
        )
        result = start(made, reporter=Silent())
        assert result.metrics.trained["baseline"].title == f"{method} r=2"
        assert (tmp_path / method / "baseline" / "adapter_config.json").is_file()
    basis = open_basis(tmp_path / "eva" / "basis")
    held = {}
    for method in ("eva", "lora"):
        tensors = load_file(tmp_path / method / "baseline" / "adapter_model.safetensors")
        shares = []
        for path in basis.layers:
            a = tensors[f"base_model.model.{path}.lora_A.weight"]
            rows = basis.rows(path, 8, a.shape[1])
            shares.append(float((a @ rows.T).square().sum() / a.square().sum()))
        held[method] = min(shares)
    assert held["eva"] > 0.9
    assert held["lora"] < 0.7


@pytest.mark.usefixtures("cache")
def test_other_text_and_a_basis_of_ones_own(recipe: Callable[..., Recipe], tmp_path: Path):
    text = tmp_path / "letters.txt"
    text.write_text("Dear all,\n\nnothing is new here.\n")
    options = {"adapter__projection": "activation", "trainer__max_steps": 1}
    start(recipe(adapter__calibration=str(text), **options), reporter=Silent())
    basis = open_basis(tmp_path / "out" / "basis")
    assert basis.about.calibration["source"] == "letters.txt"
    named = recipe(adapter__basis_from=str(tmp_path / "out" / "basis"), output=str(tmp_path / "two"), **options)
    start(named, reporter=Silent())
    assert not (tmp_path / "two" / "basis").exists()
    config = json.loads((tmp_path / "two" / "adapter" / "adapter_config.json").read_text())
    assert config["basis_digest"] == basis.digest
    text.write_text("\n")
    with pytest.raises(DataError, match="letters.txt holds no text to read"):
        start(recipe(adapter__calibration=str(text), output=str(tmp_path / "three"), **options), reporter=Silent())
    assert not (tmp_path / "three").exists()
