"""The same training in one process and in two: losses, gradients, trained matrices and saved files must agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import worker
from tests.distributed.conftest import Results, run_jobs

# Both sum the same float32 numbers in another order.
LOSS, MATRIX = 2e-6, 1e-6
ALIKE: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, accumulation, checkpointing": {"accumulation": 2, "reentrant": False},
    "ddp, reentrant, static graph": {
        "reentrant": True,
        "ddp_static_graph": True,
        "ddp_find_unused_parameters": False,
    },
    "ddp, reentrant, nothing shared": {
        "reentrant": True,
        "ddp_find_unused_parameters": False,
        "adapter": {"share": "none"},
    },
    "ddp, svft": {"adapter": {"method": "svft"}},
}
REFUSED: dict[str, dict[str, Any]] = {
    "ddp, reentrant": {"reentrant": True, "ddp_find_unused_parameters": False},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    fits = {**ALIKE, **REFUSED}
    return run_jobs({n: ("fit", {"folder": str(folder / n), **arguments}) for n, arguments in fits.items()}, folder)


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_train_like_one(name: str, results: Results, folder: Path, tmp_path: Path) -> None:
    first, second = results[name]
    assert "error" not in first, first.get("trace")
    arguments = {k: v for k, v in ALIKE[name].items() if not k.startswith(("ddp_", "fsdp"))}
    alone = worker.fit(str(tmp_path), **arguments)
    assert first["losses"] == pytest.approx(alone["losses"], abs=LOSS)
    assert first["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    assert first["bases"] == second["bases"]
    trained, expected = (load_file(place / "adapter_model.safetensors") for place in (folder / name, tmp_path))
    assert trained.keys() == expected.keys()
    moved = 0.0
    for key, value in expected.items():
        if value.is_floating_point():
            assert value.shape == trained[key].shape
            torch.testing.assert_close(trained[key], value, rtol=0, atol=MATRIX)
            moved = max(moved, float(value.abs().max()))
        else:
            assert torch.equal(trained[key], value), key
    assert moved > 100 * MATRIX  # else agreement would say nothing


@pytest.mark.parametrize("name", ALIKE)
def test_what_two_processes_saved_loads_in_one(name: str, results: Results, folder: Path) -> None:
    assert "error" not in results[name][0]
    model = peft.PeftModel.from_pretrained(worker.tiny_model(), str(folder / name)).eval()
    batch = worker.collate(worker.rows()[:4])
    with torch.no_grad():
        tuned = model(**batch).loss
        with model.disable_adapter():
            assert abs(float(tuned - model(**batch).loss)) > 1e-3


def test_reentrant_checkpointing_of_shared_matrices_is_refused(results: Results) -> None:
    for found in results["ddp, reentrant"]:
        assert found["error"] == "TrainingError", found
        assert "'use_reentrant': False" in found["message"]
