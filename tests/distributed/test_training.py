"""The same training in one process and in two: losses, gradients, trained matrices and saved files must agree."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import worker
from tests.distributed.conftest import Results
from tests.distributed.jobs import ALIKE, RESUMED, placed

# Both sum the same float32 numbers in another order.
LOSS, MATRIX = 2e-6, 1e-6
KINDS = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "fsdp1": "FSDP", "sharded by from_pretrained": "MULTI_CPU"}


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_train_like_one(name: str, results: Results, folder: Path, tmp_path: Path) -> None:
    first, second = results[name]
    assert "error" not in first, first.get("trace")
    assert first["kind"] == KINDS[name.partition(",")[0]]
    kept = ("accumulation", "reentrant", "adapter", "mixture")
    alone = worker.fit(str(tmp_path), **{k: v for k, v in placed(ALIKE[name], folder).items() if k in kept})
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
    base = worker.tiny_mixture() if "mixture" in ALIKE[name] else worker.tiny_model()
    model = peft.PeftModel.from_pretrained(base, str(folder / name)).eval()
    batch = worker.collate(worker.rows()[:4])
    with torch.no_grad():
        tuned = model(**batch).loss
        with model.disable_adapter():
            assert abs(float(tuned - model(**batch).loss)) > 1e-3


def test_reentrant_checkpointing_of_shared_matrices_is_refused(results: Results) -> None:
    for found in results["ddp, reentrant"]:
        assert found["error"] == "TrainingError", found
        assert "'use_reentrant': False" in found["message"]


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_gives_what_one_go_gives(name: str, results: Results, folder: Path) -> None:
    found = results[f"resumed {name}"][0]
    assert "error" not in found, found["trace"]
    assert found["again"]["losses"][-1] == found["once"]["losses"][-1]
    if "sharded" in name:
        return  # Trainer writes no adapter then: its checkpoints are for itself
    place = folder / f"resumed {name}"
    again, once = (load_file(path / "adapter_model.safetensors") for path in (place / "again", place))
    assert again.keys() == once.keys()
    assert all(torch.equal(again[key], once[key]) for key in once)


def test_an_adapter_loads_into_a_sharded_model(results: Results, folder: Path) -> None:
    assert "error" not in results["loaded"][0], results["loaded"][0]["trace"]
    read, expected = (load_file(folder / name / "adapter_model.safetensors") for name in ("loaded", "ddp"))
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], expected[key]) for key in expected)


def test_nothing_is_saved_that_was_not_gathered(results: Results, folder: Path) -> None:
    for found in results["loaded"]:
        assert "the model is sharded" in found["ungathered"], found
        assert found["by PEFT"], "PEFT itself finds no memory to write"
    assert not list((folder / "loaded").glob("*/*.safetensors"))


def test_nothing_is_merged_into_a_part(results: Results) -> None:
    for found in results["loaded"]:
        assert "split between processes" in found["merged"]
