"""The commands end to end on a tiny model, through the same functions that the console script calls."""

import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests import processes
from transformers import AutoModelForCausalLM


@pytest.fixture
def run_folder(pica: Callable, quick: list[str], tmp_path: Path) -> Path:
    outcome = pica("train", *quick, "--name", "tiny", "-o", tmp_path / "run")
    assert outcome.status == 0, outcome.err
    return tmp_path / "run"


def test_train_compares_and_says_what_is_where(pica: Callable, quick: list[str], tmp_path: Path):
    folder = tmp_path / "run"
    given = ["--evaluate_base", "true", "--baseline.method", "lora", "--trainer.max_steps", "4"]
    outcome = pica("train", *quick, *given, "-o", folder)
    assert outcome.status == 0, outcome.err
    for row in ("base model", "pica r=4", "lora r=1"):
        assert row in outcome.out
    for name in ("adapter", "metrics.json", "loss_curve.csv", "recipe.resolved.yaml"):
        assert str(folder / name) in outcome.out
        assert (folder / name).exists()
    assert "Trainable parameters (pica r=4)" in outcome.err
    assert re.search(r"pica r=4, rate 0.01: 4/4, .* s, loss \d", outcome.err), "progress without a terminal"
    assert max(map(len, outcome.out.splitlines()[:8])) <= 80


def test_a_changed_field_reaches_the_run(run_folder: Path):
    resolved = (run_folder / "recipe.resolved.yaml").read_text()
    assert "name: tiny" in resolved
    assert "max_steps: 6" in resolved
    assert json.loads((run_folder / "adapter" / "adapter_config.json").read_text())["r"] == 4


def test_evaluate_takes_run_adapter_base_and_merged_model(
    pica: Callable, run_folder: Path, model_folder: Path, tmp_path: Path
):
    merged = tmp_path / "merged"
    (tmp_path / "elsewhere").mkdir()
    merged.symlink_to("elsewhere")
    outcome = pica("merge", run_folder, "-o", merged)
    assert outcome.status == 0, outcome.err
    assert str(merged) in outcome.out
    AutoModelForCausalLM.from_pretrained(merged)
    found = {}
    named = ["--task", "arithmetic", "--limit", "4", "--max-new-tokens", "4"]
    for name, given in {
        "run": [run_folder],
        "adapter": [run_folder / "adapter"],
        "merged": [merged, *named],
        "base": [model_folder, *named],
    }.items():
        predictions = tmp_path / f"{name}.jsonl"
        outcome = pica("evaluate", *given, "--json", "-o", predictions)
        assert outcome.status == 0, outcome.err
        found[name] = json.loads(outcome.out)
        assert len(predictions.read_text().splitlines()) == 4
    trained = json.loads((run_folder / "metrics.json").read_text())["adapter"]
    assert found["run"]["loss"] == found["adapter"]["loss"] == trained["loss"]
    assert found["run"]["accuracy"] == trained["accuracy"]
    assert found["merged"]["loss"] == pytest.approx(trained["loss"], rel=1e-5)
    assert found["base"]["loss"] > trained["loss"]


def test_evaluate_prints_accuracy_with_its_error(pica: Callable, run_folder: Path):
    outcome = pica("evaluate", run_folder, "--limit", "2")
    assert re.search(r"accuracy +0\.00% \(0\.0–\d+\.\d%, 95% interval\)", outcome.out)
    assert re.search(r"held-out loss +\d\.\d{4} nats a token over \d+ tokens", outcome.out)


def test_interrupt_and_resume_through_the_console_script(pica: Callable, quick: list[str], tmp_path: Path):
    """A real SIGINT to a real process; the resumed adapter equals that of the run which was left alone."""
    whole, folder = tmp_path / "whole", tmp_path / "cut"
    enough = [*quick, "--trainer.max_steps", "40"]  # so many that the signal can't come after the last
    assert pica("train", *enough, "-o", whole).status == 0
    said = tmp_path / "said"
    process = processes.start(processes.console_script, "train", *enough, "-o", str(folder), said=said)
    while process.is_alive() and not (said.is_file() and ": 4/40, " in said.read_text()):
        time.sleep(0.01)
    assert process.is_alive(), said.read_text()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(120)
    lines = said.read_text().splitlines(keepends=True)
    assert process.exitcode == 130, "".join(lines)
    last = lines[-1]
    assert f"Continue with: pica train --resume {folder}" in last
    checkpoint = re.search(r"the checkpoint '(.*)' is a loadable adapter", last)
    assert checkpoint is not None
    assert (Path(checkpoint[1]) / "adapter_model.safetensors").is_file()
    assert not (folder / "adapter").exists()
    assert "Traceback" not in "".join(lines)
    outcome = pica("train", "--resume", folder)
    assert outcome.status == 0, outcome.err
    paths = [place / "adapter" / "adapter_model.safetensors" for place in (whole, folder)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_env_is_ready_to_paste_and_to_parse(pica: Callable):
    text = pica("env").out
    for part in ("python:", "torch:", "peft:", "cores:", "threads:", "accelerators:", "hub:"):
        assert part in text
    found = json.loads(pica("env", "--json").out)
    assert set(found) == {"versions", "ranges", "machine", "torch", "caches"}
