"""`pica train` in two processes: one set of files, the same choices, and going on after an interruption."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from pica.cli import main
from pica.errors import LaunchError
from pica.experiments import distributed
from pica.experiments.recipes.parsing import load_recipe
from pica.experiments.reporting import Silent
from pica.experiments.train.run import start
from tests.distributed import worker
from tests.distributed.conftest import Results, environment
from tests.distributed.jobs import LAUNCHED, recipe

FILES = [
    "adapter",
    "loss_curve.csv",
    "metrics.json",
    "predictions-adapter.jsonl",
    "predictions-base.jsonl",
    "recipe.resolved.yaml",
]


def metrics(results: Results, name: str) -> dict:
    first = results[name][0]
    assert "error" not in first, first["trace"]
    return first["metrics"]


@pytest.fixture(scope="module")
def alone(folder: Path, results: Results, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Output folder of the same recipe in one process, with global batches of the same size; each is run once."""
    done: dict[str, Path] = {}

    def run(**changes: Any) -> Path:
        key = json.dumps(changes)
        if key not in done:
            fields = recipe(folder, tmp_path_factory.mktemp("alone") / "out", trainer__batch_size=4, **changes)
            done[key] = start(load_recipe(None, list(fields.items())), reporter=Silent()).output
        return done[key]

    return run


@pytest.mark.parametrize("name", ["run", "run, fsdp2", "run, fsdp1"])
def test_two_processes_leave_what_one_leaves(
    name: str, results: Results, folder: Path, alone: Callable[..., Path]
) -> None:
    check_like_one(results[name], folder / name, alone())
    assert results[name][0]["metrics"]["adapter"]["training"]["sharded"] == (name != "run")


def check_like_one(found: list[Any], written: Path, alone: Path, *, close: float = 1e-5) -> None:
    """What two processes found and wrote, against one process's folder."""
    assert "error" not in found[0], found[0]["trace"]
    metrics = found[0]["metrics"]
    assert sorted(path.name for path in written.iterdir()) == FILES
    assert json.loads((written / "metrics.json").read_text()) == metrics
    assert metrics["processes"] == 2
    expected = json.loads((alone / "metrics.json").read_text())
    assert metrics["base"] == expected["base"]
    for part, names in {
        "adapter": ("learning_rate", "validation_loss", "loss"),
        "training": ("first_loss", "last_loss", "steps"),
    }.items():
        one, two = (m["adapter"] if part == "adapter" else m["adapter"]["training"] for m in (expected, metrics))
        assert {n: two[n] for n in names} == pytest.approx({n: one[n] for n in names}, rel=close), part
    assert metrics["adapter"]["parameters"] == expected["adapter"]["parameters"]
    trained, right = (load_file(place / "adapter" / "adapter_model.safetensors") for place in (written, alone))
    assert trained.keys() == right.keys()
    for key, value in right.items():
        torch.testing.assert_close(trained[key], value, rtol=0, atol=1e-6)
    assert max(float(value.abs().max()) for value in right.values() if value.is_floating_point()) > 1e-4


def test_both_processes_choose_the_same_rate(results: Results) -> None:
    chosen = [found["metrics"]["adapter"]["learning_rate"] for found in results["run"]]
    assert chosen == [0.1, 0.1]


@pytest.mark.parametrize("name", ["interrupted", "interrupted, fsdp2"])
def test_a_signal_to_one_process_stops_both_and_the_run_goes_on(
    name: str, results: Results, alone: Callable[..., Path]
) -> None:
    changes = LAUNCHED.get(name, ({}, {}))[0]
    expected = json.loads((alone(**changes) / "metrics.json").read_text())["adapter"]
    found = metrics(results, name)["adapter"]
    stopped = [process["stopped"] for process in results[name]]
    assert stopped[0] == stopped[1]
    assert stopped[0].endswith("checkpoint-1")
    assert found["training"]["steps"] == expected["training"]["steps"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4 if changes else 1e-5)  # Adam magnifies rounding


@pytest.mark.parametrize("name", ["interrupted", "interrupted, fsdp2"])
def test_a_checkpoint_is_not_gone_on_with_in_another_kind_of_job(name: str, results: Results) -> None:
    kinds = {"interrupted": "DDP", "interrupted, fsdp2": "FSDP2"}
    for process in results[name]:
        assert process["otherwise"].startswith(
            f"LaunchError: The interrupted training ran in 2 processes ({kinds[name]}), and its checkpoint"
        )


def test_fsdp_without_accelerators_is_refused_at_once(results: Results, folder: Path) -> None:
    for process in results["fsdp on a cpu"]:
        assert process["error"] == "LaunchError", process
        assert "Accelerate does not shard on a CPU" in process["message"]
    assert not (folder / "fsdp on a cpu").exists()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_deepspeed_that_is_not_there_is_refused_by_the_first_process(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "find_spec", lambda name: None)
    assert main(["train", "-o", str(tmp_path / "out")]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pica: ")]
    sentence = "pica: error: The launcher asks for DeepSpeed, which is not installed: pip install deepspeed."
    assert said == ([sentence] if rank == "0" else [])
    assert not (tmp_path / "out").exists()


def test_zero3_that_would_keep_the_matrices_to_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": "3", "DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false"}
    for name, value in variables.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    monkeypatch.setattr(distributed, "find_spec", lambda name: name)
    with pytest.raises(LaunchError, match="set stage3_gather_16bit_weights_on_model_save to true"):
        distributed.join()
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL", "true")
    distributed.join()


def test_a_rate_that_diverges_is_out_in_both_processes(results: Results) -> None:
    found = metrics(results, "diverged")["adapter"]
    assert found["learning_rate"] == 0.1
    assert ["failed" in candidate for candidate in found["candidates"]] == [False, True]


@pytest.mark.parametrize("path", sorted(worker.CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_every_configuration_file(path: Path) -> None:
    config: Any = load_config_from_file(str(path))
    assert (config.num_processes, config.main_process_port) == (2, 0)
    if config.distributed_type == DistributedType.DEEPSPEED:
        settings = json.loads(
            (worker.CONFIGS.parents[1] / config.deepspeed_config["deepspeed_config_file"]).read_text()
        )
        assert path.stem == f"zero{settings['zero_optimization']['stage']}"


@pytest.mark.slow
def test_the_launch_command_of_the_documentation(results: Results, folder: Path, tmp_path: Path) -> None:
    """`accelerate launch` with the file in docs/; then a run that its first process refuses."""
    fields = recipe(folder, tmp_path / "out", trainer__max_steps=2, evaluate_base=False)
    options = [word for key, value in fields.items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(worker.CONFIGS / "ddp.yaml")]

    def run() -> subprocess.CompletedProcess[str]:
        command = [*launch, "-m", "pica", "train", *options]
        return subprocess.run(
            command, env=environment(PICA_CACHE_DIR=""), capture_output=True, text=True, timeout=300, cwd=tmp_path
        )

    done = run()
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Adapter:") == 1
    assert done.stderr.count("Trainable parameters") == 1
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["processes"] == 2
    assert peft.PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(folder / "model"), str(tmp_path / "out" / "adapter")
    )
    refused = run()
    assert refused.returncode != 0
    assert "is not empty; choose another with --output" in refused.stderr
    assert "This is a bug" not in refused.stderr
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == found
