"""DeepSpeed ZeRO in two processes, where it is installed: `pip install deepspeed` builds from source, on a CPU too."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pica.errors import BasisError, TargetError
from pica.experiments.recipes.parsing import load_recipe
from pica.experiments.reporting import Silent
from pica.experiments.train.run import start
from pica.tuners.base.sharding import in_parts, whole
from tests.distributed import worker
from tests.distributed.conftest import Results, run_jobs
from tests.distributed.jobs import placed, recipe
from tests.distributed.test_run import check_like_one
from tests.experiments.tiny import write_tiny_llama

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed, and no extra of ours brings it"
)
NOTHING_KEPT = {"stage3_param_persistence_threshold": 0}  # else stage 3 keeps weights as small as these whole
FITS: dict[str, dict[str, Any]] = {
    "zero2": worker.zero(2),
    "zero2, accumulation, checkpointing": {**worker.zero(2), "accumulation": 2, "reentrant": False},
    "zero2, mixture": {**worker.zero(2), "mixture": "mixture"},
    "zero3": worker.zero(3),
    "zero3, accumulation, checkpointing": {**worker.zero(3, **NOTHING_KEPT), "accumulation": 2, "reentrant": False},
    "zero3, mixture": {**worker.zero(3, **NOTHING_KEPT), "mixture": "mixture", "before": True},
    "zero3, loaded in parts": {**worker.zero(3, **NOTHING_KEPT), "base": "base"},
}
RUNS: dict[str, dict[str, Any]] = {
    "run, zero2": {},
    "interrupted, zero2": {"interrupt": True},
    "run, zero3": {},
    "interrupted, zero3": {"interrupt": True},
    "checkpointing, zero3": {"gradient_checkpointing": True},
}
STAGES = [2, 3]


@pytest.fixture(scope="module")
def zero_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def zero_results(zero_folder: Path) -> Results:
    worker.tiny_model().save_pretrained(zero_folder / "base")
    worker.tiny_mixture().save_pretrained(zero_folder / "mixture")
    write_tiny_llama(zero_folder / "model")
    jobs: dict[str, tuple[str, dict[str, Any]]] = {}
    for stage in STAGES:  # in this order: stage 3 leaves functions of torch replaced
        settings = worker.zero(stage)
        for name, arguments in {**FITS, **RUNS}.items():
            if f"zero{stage}" not in name:
                continue
            place = {"folder": str(zero_folder / name)}
            if name in RUNS:
                checkpointing = arguments.get("gradient_checkpointing", False)
                fields = recipe(zero_folder, zero_folder / name, trainer__gradient_checkpointing=checkpointing)
                more = {"launch": f"zero{stage}", "interrupt": arguments.get("interrupt", False)}
                jobs[name] = ("run_recipe", {"fields": fields, **more})
            else:
                jobs[name] = ("fit", {**place, **placed(arguments, zero_folder)})
        jobs[f"resumed {stage}"] = ("resume", {"folder": str(zero_folder / f"resumed {stage}"), **settings})
        jobs[f"reentrant {stage}"] = (
            "fit",
            {"folder": str(zero_folder / f"reentrant {stage}"), **settings, "reentrant": True},
        )
    return run_jobs(jobs, zero_folder)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("name", FITS)
def test_zero_trains_like_one_process(name: str, zero_results: Results, zero_folder: Path, tmp_path: Path) -> None:
    first, second = zero_results[name]
    assert "error" not in first, first.get("trace")
    assert first["kind"] == "DEEPSPEED"
    assert first["in parts"] == (name == "zero3, loaded in parts")
    kept = ("accumulation", "reentrant", "mixture")
    alone = worker.fit(str(tmp_path), **{k: v for k, v in placed(FITS[name], zero_folder).items() if k in kept})
    assert first["losses"] == pytest.approx(alone["losses"], abs=2e-6)
    assert first["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    assert first["bases"] == second["bases"]
    assert len(first["solved"]) + len(second["solved"]) == len(alone["solved"])
    trained, expected = (load_file(place / "adapter_model.safetensors") for place in (zero_folder / name, tmp_path))
    assert trained.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(trained[key], value, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def alone(zero_folder: Path, zero_results: Results) -> Path:
    """Output folder of the same recipe in one process."""
    fields = recipe(zero_folder, zero_folder / "alone", trainer__batch_size=4)
    return start(load_recipe(None, list(fields.items())), reporter=Silent()).output


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("name", RUNS)
def test_pica_train_leaves_what_one_process_leaves(
    name: str, zero_results: Results, zero_folder: Path, alone: Path
) -> None:
    check_like_one(zero_results[name], zero_folder / name, alone)
    for process in zero_results[name]:
        if "interrupted" in name:
            assert process["stopped"].endswith("checkpoint-1")
            assert f"2 processes (ZeRO-{name[-1]})" in process["otherwise"]


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_resuming_gives_what_one_go_gives(stage: int, zero_results: Results, zero_folder: Path) -> None:
    found = zero_results[f"resumed {stage}"][0]
    assert "error" not in found, found["trace"]
    assert found["again"]["losses"][-1] == found["once"]["losses"][-1]
    place = zero_folder / f"resumed {stage}"
    again, once = (load_file(path / "adapter_model.safetensors") for path in (place / "again", place))
    assert all(torch.equal(again[key], once[key]) for key in once)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_reentrant_checkpointing_is_refused(stage: int, zero_results: Results) -> None:
    for process in zero_results[f"reentrant {stage}"]:
        assert process["error"] == "TrainingError", process
        assert "under DeepSpeed's ZeRO" in process["message"]


def test_a_weight_in_parts_is_gathered_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What DeepSpeed leaves of a weight in a process, without DeepSpeed."""
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)
    left: Any = torch.nn.Parameter(torch.empty(0))
    left.ds_id, left.ds_numel = 0, 64
    assert in_parts(left)
    with pytest.raises(BasisError, match="layers.0.q_proj: its weight is partitioned by DeepSpeed"):
        whole(left, 64, "layers.0.q_proj")


def test_a_stack_of_experts_in_parts_is_refused() -> None:
    model = worker.tiny_mixture()
    left: Any = torch.nn.Parameter(torch.empty(0))
    left.ds_id, left.ds_numel = 0, 4 * 64 * 48
    model.get_submodule("model.layers.1.mlp.experts").down_proj = left
    with pytest.raises(TargetError, match="layers.1.mlp.experts.down_proj: DeepSpeed ZeRO-3 has split this stack"):
        worker.adapted(model, target_modules=[], target_parameters=worker.STACKS)


def test_a_part_that_nobody_can_gather_is_refused() -> None:
    with pytest.raises(BasisError, match="this process holds 32 of its weight's 64 numbers"):
        whole(torch.zeros(32), 64, "layers.0.q_proj")
