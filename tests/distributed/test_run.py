"""`pica train` in two processes: one set of files, the same choices, and going on after an interruption."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from transformers import LlamaForCausalLM

from pica.experiments.parsing import load_recipe
from pica.experiments.reporting import Silent
from pica.experiments.run import start
from tests.distributed import worker
from tests.distributed.conftest import Results, environment
from tests.distributed.jobs import recipe

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


def test_two_processes_leave_what_one_leaves(results: Results, folder: Path, tmp_path: Path) -> None:
    found = metrics(results, "run")
    assert sorted(path.name for path in (folder / "run").iterdir()) == FILES
    written = json.loads((folder / "run" / "metrics.json").read_text())
    assert written == found
    assert found["processes"] == 2
    fields = recipe(folder, tmp_path / "one", trainer__batch_size=4)
    alone = start(load_recipe(None, list(fields.items())), reporter=Silent()).metrics
    assert found["base"] == alone["base"]
    for name in ("learning_rate", "validation_loss", "loss"):
        assert found["adapter"][name] == pytest.approx(alone["adapter"][name], rel=1e-5)
    first, *_, last = (found["adapter"]["training"][name] for name in ("first_loss", "last_loss"))
    assert (first, last) == pytest.approx(
        tuple(alone["adapter"]["training"][name] for name in ("first_loss", "last_loss")), rel=1e-5
    )


def test_both_processes_choose_the_same_rate(results: Results) -> None:
    chosen = [found["metrics"]["adapter"]["learning_rate"] for found in results["run"]]
    assert chosen == [0.1, 0.1]


def test_a_signal_to_one_process_stops_both_and_the_run_goes_on(results: Results) -> None:
    expected = metrics(results, "run")["adapter"]
    found = metrics(results, "interrupted")["adapter"]
    stopped = [process["stopped"] for process in results["interrupted"]]
    assert stopped[0] == stopped[1]
    assert stopped[0].endswith("checkpoint-1")
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


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
