"""The page of a comparison, from records as `pica compare` leaves them."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.report.browser import check_page, document_after, needs_browser

from pica.errors import ConfigError
from pica.report.comparison import write_report
from pica.report.summary import summarise

LABELS = ["PiCa <r=8>", "LoRA & co", "broken", "never run"]


def record(label: str, seed: int, score: float, rates: list[float], chosen: float, **more: Any) -> dict[str, Any]:
    candidates = [
        {"learning_rate": rate, "validation_loss": 1.0 + abs(rate - chosen), "validation_score": None} for rate in rates
    ]
    result = {
        "method": "pica",
        "learning_rate": chosen,
        "candidates": candidates,
        "metric": "accuracy",
        "score": score,
        "stderr": 0.01,
        "loss": 2 - score,
        "parameters": {"trainable": 1100 if label.startswith("PiCa") else 90_000, "head": 100, "total": 10**6},
        "training": {"seconds": 5.0 + seed, "step_seconds": 0.05, "peak_memory": {"host": 500.0 + 100 * len(rates)}},
        "file_bytes": 4400,
    }
    return {
        "format": 1,
        "key": f"{LABELS.index(label)}-{seed}",
        "label": label,
        "seed": seed,
        "family": "PiCa" if label.startswith("PiCa") else "LoRA",
        "status": "done",
        "recipe": {"name": "x"},
        "recipe_yaml": "name: x\n",
        "base": None,
        "result": result,
        "curve": [[step, 3.0 / step] for step in range(1, 9)],
        "problems": {"train": 100, "validation": 10, "test": 50},
        "versions": {"torch": "2"},
        "machine": {"system": "Linux", "cores": 2, "threads": 1, "accelerators": []},
    } | more


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records = [
        record(LABELS[0], 0, 0.8, [0.01, 0.1, 1.0], 0.1),
        record(LABELS[0], 1, 0.9, [0.1], 0.1),
        record(LABELS[1], 0, 0.5, [0.01, 0.1], 0.1),
        record(LABELS[1], 1, 0.6, [0.1], 0.1),
    ]
    failed = {"key": "2-0", "label": "broken", "seed": 0, "status": "failed", "error": "it does <not> fit"}
    (tmp_path / "cells").mkdir()
    for one in records:
        (tmp_path / "cells" / f"{one['key']}.json").write_text(json.dumps(one))
    cells = [{key: one.get(key) for key in ("label", "seed", "key", "status", "error")} for one in [*records, failed]]
    (tmp_path / "cells.json").write_text(json.dumps({"workers": 2, "cells": cells}))
    content = {
        "name": "x",
        "title": "Some <comparison>",
        "seeds": [0, 1],
        "base": {"model": {"path": "/a/b/model"}, "task": {"name": "math"}},
        "methods": [{"label": label} for label in LABELS],
        "ablations": [{"title": "Two", "question": "Which?", "methods": LABELS[:2]}],
    }
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(content))
    return tmp_path


def test_numbers(folder: Path):
    summary = write_report(folder)
    row = summary.rows[0]
    assert row.score.mean == pytest.approx(0.85)
    assert row.score.deviation == pytest.approx(0.05 * 2**0.5)
    assert (row.parameters, row.head) == (1000, 100)
    assert row.seconds.mean == 5.5
    assert row.memory.mean == 600.0, "of the process that trained once, not of the one that trained three times"
    assert [one.edge for one in summary.rows] == [None, "highest", None, None]
    lines = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text())))
    assert [line["label"] for line in lines] == LABELS
    assert float(lines[0]["score_mean"]) == pytest.approx(0.85)
    assert lines[2]["score_mean"] == ""
    assert lines[2]["failures"] == "it does <not> fit"
    assert json.loads((folder / "results.json").read_text())["rows"][1]["rate_at_edge"] == "highest"


def test_page_is_valid_and_tells_everything(folder: Path):
    write_report(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    check_page(text)
    for part in (
        "Some &lt;comparison&gt;",
        "PiCa &lt;r=8&gt;, seed 1",
        "it does &lt;not&gt; fit",
        "Not run yet: never run.",
        "Cells failed: broken.",
        "a higher one may do better: LoRA &amp; co (0.1)",
        "85.0% ± 7.1%",
        "Which?",
        'download="results.csv"',
        'download="comparison.yaml"',
    ):
        assert part in text, part
    assert "nan" not in re.sub(r"base64,[^\"]*", "", text).replace("finance", "")


def test_the_same_records_give_the_same_page(folder: Path, tmp_path: Path):
    write_report(folder)
    write_report(folder, page=tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == (folder / "report.html").read_bytes()


def test_a_comparison_of_failures_still_has_a_page(folder: Path):
    index = json.loads((folder / "cells.json").read_text())
    index["cells"] = index["cells"][-1:]
    (folder / "cells.json").write_text(json.dumps(index))
    write_report(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    check_page(text)
    assert "No cell has finished" in text


@pytest.mark.parametrize("name", ["comparison.yaml", "cells.json", "cells/0-0.json"])
def test_damaged_files_are_told(folder: Path, name: str):
    (folder / name).write_text("{[")
    with pytest.raises(ConfigError, match="is damaged"):
        summarise(folder)


@pytest.mark.parametrize("name", ["comparison.yaml", "cells.json"])
def test_a_file_that_lacks_a_field_is_told(folder: Path, name: str):
    content = yaml.safe_load((folder / name).read_text())
    del content["name" if name == "comparison.yaml" else "workers"]
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="is damaged .it lacks '"):
        summarise(folder)


@needs_browser
@pytest.mark.parametrize(("width", "shown"), [(1200, "wide"), (500, "narrow")])
def test_page_fits_a_desk_and_a_phone(folder: Path, tmp_path: Path, width: int, shown: str):
    write_report(folder)
    script = """
      const visible = [...document.querySelectorAll("figure svg")].filter((svg) => getComputedStyle(svg).display !== "none");
      const kinds = new Set(visible.map((svg) => svg.getAttribute("class")));
      const drawn = visible.every((svg) => svg.getBoundingClientRect().height > 100);
      document.querySelectorAll("table.sortable")[1].tHead.rows[0].cells[1].querySelector("button").click();
      const first = document.querySelectorAll("table.sortable")[1].tBodies[0].rows[0].cells[0].textContent;
      const fits = document.documentElement.scrollWidth <= innerWidth;
      document.body.dataset.out = [visible.length, [...kinds].join(" "), drawn, first, fits].join(";");
    """
    document = document_after(folder / "report.html", script, width=width, folder=tmp_path)
    found = re.search(r'data-out="([^"]*)"', document)
    assert found is not None
    assert found[1] == f"5;{shown};true;PiCa &lt;r=8&gt;;true"
