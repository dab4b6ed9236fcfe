"""Two processes that share out the work of solving bases, and what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pica.basis import Holdings
from tests.distributed import worker
from tests.distributed.conftest import Results

LAYERS = 15


@pytest.mark.parametrize("name", ["shared", "sharded"])
def test_each_process_solves_its_share_and_both_have_all(name: str, results: Results) -> None:
    first, second = results[name]
    assert "error" not in first, first
    assert not set(first["solved"]) & set(second["solved"])
    assert len(first["solved"]) + len(second["solved"]) == LAYERS
    layers: dict[str, Any] = dict(worker.tiny_model().named_modules())
    costs = [Holdings([tuple(layers[n].weight.shape) for n in found["solved"]]).costs for found in (first, second)]
    assert abs(sum(costs[0]) - sum(costs[1])) <= max(costs[0] + costs[1])
    assert first["bases"] == second["bases"] == worker.digest(worker.adapted())  # bit for bit what one process solves
    assert (first["dtensors"] > 0) == (name == "sharded")


def test_sharing_can_be_switched_off(results: Results) -> None:
    assert [len(found["solved"]) for found in results["not shared"]] == [LAYERS, LAYERS]


def test_one_process_that_fails_stops_both(results: Results) -> None:
    for found in results["broken"]:
        assert found["error"] == "BasisError", found
        assert "model.layers.1.mlp.up_proj: the frozen weight holds NaN" in found["message"]


def test_processes_with_different_models_do_not_share(results: Results) -> None:
    first, second = results["different"]
    assert len(first["solved"]) == len(second["solved"]) == LAYERS
    assert first["bases"] != second["bases"]


def test_a_process_alone_is_not_kept_waiting(results: Results) -> None:
    first, second = results["alone"]
    assert (len(first["solved"]), len(second["solved"])) == (LAYERS, 0)
    assert results["together again"][0]["bases"] == results["together again"][1]["bases"]


def test_the_cache_holds_each_basis_once_and_whole(results: Results, folder: Path) -> None:
    files = [path.suffix for path in (folder / "cache" / "basis").iterdir()] if (folder / "cache").is_dir() else []
    assert set(files) <= {".safetensors"}


def test_tensor_parallel_weights_are_refused(results: Results) -> None:
    for found in results["tensor parallel"]:
        assert found["error"] == "TargetError", found
        assert "split between processes by tensor parallelism (tp_plan, tp_size)" in found["message"]


def test_sharding_before_the_adapter_is_refused(results: Results) -> None:
    for found in results["sharded first"]:
        assert found["error"] == "TargetError", found
        assert "Add the adapter first" in found["message"]
