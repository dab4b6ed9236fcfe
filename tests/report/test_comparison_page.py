"""The page of a comparison, from records as `pica compare` leaves them."""

import csv
import html
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from benchmarks.comparisons import comparison_table, heading
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tests import results
from tests.report.browser import check_page, document_after, needs_browser

from pica.cli.compare import print_summary
from pica.errors import ConfigError
from pica.experiments.results.documents import result_document
from pica.experiments.results.run import ParameterCounts
from pica.report.comparison import write_report
from pica.report.comparison_figures import side_by_side
from pica.report.figures import Sheet
from pica.report.summary import result_of, summarise

LABELS = ["PiCa <r=8>", "LoRA & co", "broken", "never run"]


def record(label: str, seed: int, score: float, rates: list[float], chosen: float, **more: Any) -> dict[str, Any]:
    candidates = [results.candidate(learning_rate=rate, validation_loss=1.0 + abs(rate - chosen)) for rate in rates]
    count = 1100 if label.startswith("PiCa") else 90_000
    result = results.trained(
        learning_rate=chosen,
        candidates=candidates,
        score=score,
        stderr=0.01,
        loss=2 - score,
        parameters=ParameterCounts(trainable=count, head=100, total=10**6),
        training=results.training(seconds=5.0 + seed, peak_memory={"host": 500.0 + 100 * len(rates)}),
        file_bytes=4400,
    )
    family, key = "PiCa" if label.startswith("PiCa") else "LoRA", f"{LABELS.index(label)}-{seed}"
    return result_document(results.done_cell(key=key, label=label, seed=seed, family=family, result=result)) | more


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
    results.check_file("comparison", folder / "results.json")


def test_page_is_valid_and_tells_everything(folder: Path):
    write_report(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    check_page(text)
    assert "mathdefault" not in text, "labels are text, so a tick is a number and no formula"
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


def test_several_test_sets_have_a_table(folder: Path):
    for seed, right in ((0, 0.25), (1, 0.75)):
        path = folder / "cells" / f"0-{seed}.json"
        content = json.loads(path.read_text())
        content["result"]["groups"] = {
            "<gsm>": {"accuracy": right, "stderr": 0.1, "examples": 20},
            "maths": {"accuracy": 0.125, "stderr": 0.1, "examples": 8},
        }
        path.write_text(json.dumps(content))
    assert {name: stat.mean for name, stat in summarise(folder).rows[0].sets.items()} == {"<gsm>": 0.5, "maths": 0.125}
    write_report(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    check_page(text)
    assert "&lt;gsm&gt;" in text
    assert "50.0% ± 35.4%" in text
    assert "12.5% ± 0.0%" in text


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
    with pytest.raises(ConfigError, match="is damaged .*it lacks '"):
        summarise(folder)


def with_outcomes(folder: Path, right: dict[str, int], seeds: int = 2) -> None:
    """Give each method's cells as many right answers of fifty as said, and keep only so many seeds."""
    index = json.loads((folder / "cells.json").read_text())
    index["cells"] = [cell for cell in index["cells"] if cell["seed"] < seeds]
    (folder / "cells.json").write_text(json.dumps(index))
    for label, count in right.items():
        for seed in range(seeds):
            path = folder / "cells" / f"{LABELS.index(label)}-{seed}.json"
            content = json.loads(path.read_text())
            content["outcomes"] = {"adapter": {"correct": "1" * count + "0" * (50 - count)}}
            content["result"] |= {"score": count / 50, "stderr": 0.06, "examples": 50}
            path.write_text(json.dumps(content))


def test_a_tie_is_called_a_tie_everywhere(folder: Path, capsys: pytest.CaptureFixture[str]):
    with_outcomes(folder, {LABELS[0]: 30, LABELS[1]: 28})
    summary = write_report(folder)
    assert summary.standing is not None
    said = summary.standing.statement()
    assert said.startswith("Highest accuracy: a tie of both: PiCa <r=8> (60.0%) and LoRA & co (56.0%).")
    assert "95% paired bootstrap, 50 test problems, 2 seeds" in said
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert html.escape(said) in text
    assert text.count('<tr class="best">') == 2
    numbers = json.loads((folder / "results.json").read_text())
    assert numbers["standing"]["statement"] == said
    assert [row["place"] for row in numbers["rows"][:2]] == ["tie", "tie"]
    assert numbers["rows"][1]["behind_best"] == pytest.approx(0.04)
    lines = list(csv.DictReader(io.StringIO((folder / "results.csv").read_text())))
    assert [line["place"] for line in lines[:2]] == ["tie", "tie"]
    print_summary(summary, folder)
    assert said in capsys.readouterr().out
    assert said in heading(summary) + comparison_table(summary)


def test_a_method_ahead_of_all_others_is_the_best(folder: Path):
    with_outcomes(folder, {LABELS[0]: 40, LABELS[1]: 28})
    summary = summarise(folder)
    assert summary.standing is not None
    assert "Highest accuracy: PiCa <r=8> (80.0%), ahead of every other method." in summary.standing.statement()
    assert [getattr(row, "place", None) for row in result_of(summary).rows] == ["best", "", None, None]
    assert re.search(r"80\.0% ± 0\.0% \| 6.*% \| best \|", comparison_table(summary))


def test_one_seed_is_said_and_has_the_problems_uncertainty(folder: Path, capsys: pytest.CaptureFixture[str]):
    with_outcomes(folder, {LABELS[0]: 0, LABELS[1]: 1}, seeds=1)
    path = folder / "cells" / "0-0.json"
    content = json.loads(path.read_text())
    content["base"] = {"metric": "accuracy", "score": 0.0, "stderr": 0.0, "loss": 1.0, "examples": 50}
    content["outcomes"]["base"] = {"correct": "0" * 50}
    path.write_text(json.dumps(content))
    summary = write_report(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "<h2>Result, one seed</h2>" in text
    assert "0.0–7.1%" in text, "Wilson's interval of 0 of 50"
    assert "The best method is not told apart from the model without training." in text
    assert "the model without training (0.0%)" in text
    print_summary(summary, folder)
    shown = capsys.readouterr().out
    assert "Some <comparison>, one seed" in shown
    assert "0.0% (0.0–7.1%)" in shown
    assert "one seed" in heading(summary)


def test_old_records_say_that_they_are_not_paired(folder: Path):
    summary = summarise(folder)
    assert summary.standing is not None
    assert "The outcome of each test problem was not kept" in summary.standing.statement()
    assert [difference.paired for difference in summary.standing.differences.values()] == [False]


def test_markers_that_would_hide_each_other_stand_side_by_side():
    sheet = Sheet(Figure(figsize=(8, 4), layout="constrained"), narrow=False)
    panel = sheet.figure.subplots()
    drawn: list[Any] = [(x, y, panel.plot([x], [y], "o")) for x, y in ((1, 1), (1, 1), (5, 1), (1, 1.001))]
    side_by_side(panel, drawn)
    FigureCanvasAgg(sheet.figure).draw()
    points = [artists[0].get_transform().transform((x, y)) * 72 / sheet.figure.dpi for x, y, artists in drawn]
    apart = [abs(one - other).max() for one, other in itertools.combinations(points, 2)]
    assert min(apart) > 7.5, "points"
    assert points[2][0] == pytest.approx(panel.transData.transform((5, 1))[0] * 72 / sheet.figure.dpi)


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
      const caption = document.querySelectorAll("p.caption")[1].getBoundingClientRect();
      const mark = document.querySelector(`figure svg.${[...kinds][0]} [data-tip]`);
      mark.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
      const next = document.activeElement;
      const box = next.getBoundingClientRect();
      const at = { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2, bubbles: true };
      next.dispatchEvent(new PointerEvent("pointerdown", { ...at, pointerType: "touch" }));
      const touched = !document.getElementById("tip").hidden && document.getElementById("tip").textContent;
      document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
      const tips = [touched === next.dataset.tip, document.getElementById("tip").hidden, caption.right <= innerWidth];
      const fits = document.documentElement.scrollWidth <= innerWidth;
      document.body.dataset.out = [visible.length, [...kinds].join(" "), drawn, first, ...tips, fits].join(";");
    """
    document = document_after(folder / "report.html", script, width=width, folder=tmp_path)
    found = re.search(r'data-out="([^"]*)"', document)
    assert found is not None
    assert found[1] == f"5;{shown};true;PiCa &lt;r=8&gt;;true;true;true;true"
