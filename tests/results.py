"""Results as runs leave them, of which a test says what matters to it."""

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import fastjsonschema

from pica.experiments.results import FILES
from pica.experiments.results.comparison import DoneCell
from pica.experiments.results.documents import read_result, result_document
from pica.experiments.results.run import (
    Candidate,
    Machine,
    Measurement,
    ParameterCounts,
    RunMetrics,
    SplitSizes,
    Trained,
    TrainingResult,
)


def training(**given: Any) -> TrainingResult:
    usual: dict[str, Any] = {
        "steps": 40,
        "seconds": 1.0,
        "step_seconds": 0.1,
        "peak_memory": {"host": 1.0},
        "sharded": False,
    }
    return TrainingResult(**usual | given)


def candidate(**given: Any) -> Candidate:
    usual: dict[str, Any] = {"learning_rate": 0.01, "validation_loss": None, "validation_score": None}
    counts = ParameterCounts(trainable=10, head=0, total=100)
    return Candidate(**usual | {"parameters": counts, "training": training()} | given)


def measurement(**given: Any) -> Measurement:
    usual: dict[str, Any] = {"metric": "accuracy", "score": 0.5, "stderr": 0.25, "loss": 1.0, "examples": 4}
    usual["scores"] = {"accuracy": given.get("score", 0.5)}
    return Measurement(**usual | given)


def trained(**given: Any) -> Trained:
    """A model that was trained with one rate."""
    one = candidate(**{name: given[name] for name in ("learning_rate", "parameters") if name in given})
    usual: dict[str, Any] = {**vars(measurement(score=given.get("score", 0.5))), **vars(one)}
    usual |= {"method": "pica", "title": "pica r=4", "file_bytes": 3, "candidates": [one]}
    return Trained(**usual | given)


def metrics(**given: Any) -> RunMetrics:
    """A run that measured its adapter alone."""
    usual: dict[str, Any] = {"name": "test", "seed": 0, "model": "a/b", "task": "arithmetic"}
    usual |= {
        "problems": SplitSizes(train=30, validation=2, test=4),
        "versions": {"torch": "2.13"},
        "machine": Machine(system="Linux", cores=2, threads=1, accelerators=[]),
        "adapter": trained(),
    }
    return RunMetrics(**usual | given)


def done_cell(**given: Any) -> DoneCell:
    """The record of a cell that trained with one rate."""
    run = metrics()
    usual: dict[str, Any] = {"key": "k", "label": "x", "seed": 0, "family": "PiCa", "recipe": {"name": "x"}}
    usual |= {"recipe_yaml": "name: x\n", "status": "done", "result": run.adapter, "problems": run.problems}
    usual |= {"curve": [[step, 3.0 / step] for step in range(1, 9)], "versions": run.versions, "machine": run.machine}
    return DoneCell(**usual | {"finished": "2026-01-01T00:00:00Z", "wall_seconds": 1.0} | given)


@cache
def _validator(name: str) -> Any:
    text = (resources.files("pica") / "assets" / "schemas" / f"{name}.schema.json").read_text(encoding="utf-8")
    return fastjsonschema.compile(json.loads(text), use_default=False)


def check_schema(name: str, document: Any) -> None:
    """Raise `fastjsonschema.JsonSchemaException` unless a document is what its schema says."""
    _validator(name)(document)


def check_file(name: str, file: Path) -> None:
    """A file is what its schema says, and nothing of it is lost when it is read and written again."""
    document = json.loads(file.read_text(encoding="utf-8"))
    check_schema(name, document)
    assert result_document(read_result(FILES[name], file)) == document
