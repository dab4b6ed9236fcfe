"""DeepSpeed ZeRO in two processes, where it is installed: `pip install deepspeed` builds from source, on a CPU too."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pica.errors import BasisError
from pica.tuner.sharding import in_parts, whole
from tests.distributed import worker
from tests.distributed.conftest import Results, run_jobs

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed, and no extra of ours brings it"
)
FITS: dict[str, dict[str, Any]] = {
    "zero2": worker.zero(2),
    "zero3": worker.zero(3),
    "zero3, loaded in parts": {**worker.zero(3), "base": "base"},
}


@pytest.fixture(scope="module")
def zero_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def zero_results(zero_folder: Path) -> Results:
    worker.tiny_model().save_pretrained(zero_folder / "base")
    jobs = {}
    for name, arguments in FITS.items():
        place = {"base": str(zero_folder / "base")} if "base" in arguments else {}
        jobs[name] = ("fit", {"folder": str(zero_folder / name), **arguments, **place})
    return run_jobs(jobs, zero_folder)


@pytest.mark.slow
@needs_deepspeed
@pytest.mark.parametrize("name", FITS)
def test_zero_trains_like_one_process(name: str, zero_results: Results, zero_folder: Path, tmp_path: Path) -> None:
    first, second = zero_results[name]
    assert "error" not in first, first.get("trace")
    assert first["kind"] == "DEEPSPEED"
    assert first["in parts"] == (name == "zero3, loaded in parts")
    alone = worker.fit(str(tmp_path))
    assert first["losses"] == pytest.approx(alone["losses"], abs=2e-6)
    assert first["bases"] == second["bases"]
    assert len(first["solved"]) + len(second["solved"]) == len(alone["solved"])
    trained, expected = (load_file(place / "adapter_model.safetensors") for place in (zero_folder / name, tmp_path))
    assert trained.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(trained[key], value, rtol=0, atol=1e-6)


def test_a_weight_in_parts_is_gathered_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What DeepSpeed leaves of a weight in a process, without DeepSpeed."""
    monkeypatch.setitem(__import__("sys").modules, "deepspeed", None)
    left: Any = torch.nn.Parameter(torch.empty(0))
    left.ds_id, left.ds_numel = 0, 64
    assert in_parts(left)
    with pytest.raises(BasisError, match="layers.0.q_proj: its weight is partitioned by DeepSpeed"):
        whole(left, 64, "layers.0.q_proj")


def test_a_part_that_nobody_can_gather_is_refused() -> None:
    with pytest.raises(BasisError, match="this process holds 32 of its weight's 64 numbers"):
        whole(torch.zeros(32), 64, "layers.0.q_proj")
