"""Files of results: what the schemas say, what earlier versions wrote, and what is refused."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import fastjsonschema
import pytest

from pica.experiments.results.documents import (
    from_document,
    parse_result,
    read_result,
    result_document,
    to_document,
    write_result,
)
from pica.experiments.results.run import METRICS, Attempt, Candidate, GroupScore, RunMetrics
from pica.files.documents import DocumentError
from tests import results

ROOT = Path(__file__).parents[3]


def test_the_schemas_are_those_of_the_dataclasses():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        from write_schemas import FOLDER, written  # pyright: ignore[reportMissingImports]
    finally:
        sys.path.pop(0)
    assert {file.name: file.read_text() for file in FOLDER.iterdir()} == written(), "run tools/write_schemas.py"


def test_what_was_not_measured_is_not_there_and_what_is_undefined_is_null(tmp_path: Path):
    groups = {"a": GroupScore(accuracy=0.5, stderr=math.nan, examples=1)}
    base = results.measurement(score=math.nan, groups=groups, scores={"pearson": math.nan})
    write_result(tmp_path / METRICS, results.metrics(base=base))
    document = json.loads((tmp_path / METRICS).read_text())
    assert document["format"] == 1
    assert "tokens" not in document["base"]
    assert "baseline" not in document
    assert document["base"]["score"] is document["base"]["pearson"] is document["base"]["groups"]["a"]["stderr"] is None
    read = read_result(RunMetrics, tmp_path / METRICS)
    assert math.isnan(read.models["base"].score)
    assert math.isnan(read.models["base"].scores["pearson"])
    assert result_document(read) == document


def test_runs_of_the_first_versions_are_read():
    """They had accuracy alone, no titles, no heads and no standing."""
    kept = json.loads((ROOT / "benchmarks" / "results" / "real_input.json").read_text())["tasks"]["gsm8k"]
    for run in kept.values():
        metrics = parse_result(RunMetrics, run)
        adapter = metrics.adapter
        assert (adapter.metric, adapter.score) == ("accuracy", run["adapter"]["accuracy"])
        assert adapter.title == f"{run['adapter']['method']} r={run['adapter']['r']}"
        assert [one.validation_loss for one in adapter.usable] == [
            one["validation_loss"] for one in run["adapter"]["candidates"]
        ]
        assert parse_result(RunMetrics, result_document(metrics)) == metrics


def test_what_an_earlier_version_noted_of_a_run_under_way_is_read():
    curve = [{"step": 1, "loss": 3.0}, {"step": 2, "validation_loss": 2.5}, {"step": 3, "loss": 2.0}]
    sample = {"step": 2, "prompt": "a", "answer": "b"}
    noted = to_document(results.candidate())
    noted["training"] |= {"curve": curve, "samples": [sample], "best": None, "stopped_early": False}
    found = from_document(Attempt, noted)
    assert (found.curve, found.samples) == (curve, [sample])
    assert isinstance(found.result, Candidate)
    assert (found.result.training.first_loss, found.result.training.last_loss) == (3.0, 2.0)
    assert from_document(Attempt, to_document(found)) == found
    failed = from_document(Attempt, {"learning_rate": 1.0, "failed": "nan"})
    assert to_document(failed) == {"result": {"learning_rate": 1.0, "failed": "nan"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "its format is 2, and this version of pica reads 1; upgrade pica"),
        ({"seed": None}, "seed: Input should be a valid integer"),
        ({"seed": "many"}, "seed: Input should be a valid integer"),
        ({"adapter": {}}, "it lacks 'adapter.loss'"),
        ({"machine": 3}, "machine: Input should be"),
    ],
)
def test_a_file_that_is_no_such_result_is_refused_by_its_name(tmp_path: Path, change: dict[str, Any], message: str):
    document = result_document(results.metrics())
    results.check_schema("metrics", document)
    if "format" not in change:
        with pytest.raises(fastjsonschema.JsonSchemaException):
            results.check_schema("metrics", document | change)
    (tmp_path / METRICS).write_text(json.dumps(document | change))
    with pytest.raises(DocumentError) as caught:
        read_result(RunMetrics, tmp_path / METRICS)
    assert str(caught.value).startswith(f"{tmp_path / METRICS}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_a_file_without_fields_is_refused(tmp_path: Path, text: str):
    (tmp_path / METRICS).write_text(text)
    with pytest.raises(DocumentError, match="where an object of fields should be"):
        read_result(RunMetrics, tmp_path / METRICS)
