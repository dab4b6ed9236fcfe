"""VTAB-1K's group means from the folders of runs and comparisons."""

import csv
import json
from pathlib import Path

import html5lib
import pytest
import yaml
from tests import results
from tests.report.browser import check_page

from pica.cli import main
from pica.errors import ConfigError
from pica.experiments.results.documents import write_result
from pica.experiments.results.run import METRICS, ParameterCounts
from pica.report.vtab import overall_standing, read_vtab
from pica.report.vtab_page import vtab_page
from pica.tasks.vtab import GROUPS

LORA = {
    "method": "lora",
    "title": "lora r=8",
    "parameters": ParameterCounts(trainable=1002, head=2, total=9999),
}


def write_run(folder: Path, subset: str, score: float, task: str = "vtab") -> Path:
    """What a finished run leaves that a report needs."""
    folder.mkdir(parents=True)
    (folder / "recipe.resolved.yaml").write_text(yaml.safe_dump({"task": {"name": task, "subset": subset}}))
    counts = ParameterCounts(trainable=10, head=2, total=9999)
    result = results.trained(title="pica r=64", score=score, parameters=counts)
    write_result(folder / METRICS, results.metrics(adapter=result, baseline=results.trained(score=score, **LORA)))
    return folder


def write_comparison(folder: Path, subset: str, scores: list[float]) -> Path:
    """Two seeds of one method as `pica compare` records them."""
    (folder / "cells").mkdir(parents=True)
    content = {"name": "c", "base": {"task": {"name": "vtab", "subset": subset}}, "methods": [{"label": "pica r=64"}]}
    (folder / "comparison.yaml").write_text(yaml.safe_dump(content))
    cells = [{"key": str(seed), "label": "pica r=64", "seed": seed, "status": "done"} for seed, _ in enumerate(scores)]
    (folder / "cells.json").write_text(json.dumps({"cells": cells, "workers": 1}))
    for seed, score in enumerate(scores):
        counts = ParameterCounts(trainable=10, head=2, total=9999)
        cell = results.done_cell(family="pica", result=results.trained(score=score, stderr=0.1, parameters=counts))
        write_result(folder / "cells" / f"{seed}.json", cell)
    return folder


def test_runs_and_comparisons_make_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folders = [
        write_run(tmp_path / name, name, 0.25 + 0.5 * (name in GROUPS["specialised"]))
        for group in GROUPS.values()
        for name in group
        if name != "svhn"
    ]
    folders.append(write_comparison(tmp_path / "c", "svhn", [0.5, 1.0]))
    assert main(["report", "--vtab", *map(str, folders), "-o", str(tmp_path / "t.csv")]) == 0
    shown = capsys.readouterr().out
    assert "pica r=64" in shown
    with (tmp_path / "t.csv").open() as file:
        pica, lora = csv.DictReader(file)
    assert float(pica["svhn"]) == 0.75
    assert float(pica["natural"]) == pytest.approx((6 * 0.25 + 0.75) / 7)
    assert (float(pica["specialised"]), float(pica["structured"])) == (0.75, 0.25)
    assert float(pica["all sets"]) == pytest.approx((14 * 0.25 + 5 * 0.75) / 19)
    assert (lora["svhn"], lora["natural"], lora["all sets"]) == ("", "", ""), "the comparison had no LoRA"
    assert float(lora["structured"]) == 0.25


def test_the_page_shows_every_set_and_only_whole_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    natural = [write_comparison(tmp_path / name, name, [0.5, 0.7]) for name in GROUPS["natural"]]
    folders = [*natural, write_run(tmp_path / "eurosat", "eurosat", 0.125)]
    page = tmp_path / "t.html"
    assert main(["report", "--vtab", *map(str, folders), "-o", str(page)]) == 0
    text = page.read_text()
    check_page(text)
    lines = rows_of(text)
    assert lines["pica r=64"] == ["pica r=64", "8", "8", "60.0%", "", "", "", ""], "8 parameters without the head"
    assert lines["lora r=8"] == ["lora r=8", "1,000", "1", "", "", "", "", ""]
    assert lines["cifar"] == ["cifar", "natural", "60.0% ± 14.1%", ""]
    assert lines["eurosat"] == ["eurosat", "specialised", "12.5%", "12.5%"]
    assert "dmlab" not in lines
    assert "Missing with at least one method: natural: caltech101," in text
    assert "Highest mean" not in text, "no method has all nineteen"
    assert main(["report", "--vtab", str(folders[0]), "-o", str(tmp_path / "t.txt")]) == 2
    assert "ends in .html (a page) or .csv" in capsys.readouterr().err
    assert not (tmp_path / "t.txt").exists()


def test_the_page_names_the_best_of_the_complete(tmp_path: Path):
    folders = [write_run(tmp_path / name, name, 0.5) for group in GROUPS.values() for name in group]
    text = vtab_page(read_vtab(folders))
    check_page(text)
    assert "Highest mean of all nineteen sets: a tie of both: pica r=64 (50.0%) and lora r=8 (50.0%)." in text
    assert "Not every method" not in text


def rows_of(text: str) -> dict[str, list[str]]:
    """The shown text of every table's rows by their first cell."""
    document = html5lib.HTMLParser(namespaceHTMLElements=False).parse(text)
    lines = [["".join(cell.itertext()) for cell in row] for row in document.iter("tr")]
    return {line[0]: line for line in lines}


def test_folders_that_do_not_fit_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    first, twice = write_run(tmp_path / "a", "dtd", 0.5), write_run(tmp_path / "b", "dtd", 0.5)
    with pytest.raises(ConfigError, match=r"a' and '.*b' both have pica r=64 on dtd"):
        read_vtab([first, twice])
    with pytest.raises(ConfigError, match="^'[^']*' is of task glue, not vtab"):
        read_vtab([write_run(tmp_path / "c", "mrpc", 0.5, task="glue")])
    (twice / "metrics.json").unlink()
    assert main(["report", "--vtab", str(twice)]) == 2
    assert "holds no metrics.json: it is no finished run" in capsys.readouterr().err
    (first / "metrics.json").write_text("[")
    with pytest.raises(ConfigError, match="is damaged"):
        read_vtab([first])


def test_means_are_paired_by_the_problems_of_every_set(tmp_path: Path):
    folders = []
    for place, name in enumerate(name for group in GROUPS.values() for name in group):
        folder = write_run(tmp_path / name, name, 0.6)
        metrics = json.loads((folder / "metrics.json").read_text())
        for kind, file, right in (("adapter", "adapter", 12), ("baseline", "baseline-lora", 12 - 4 * (place % 2))):
            metrics[kind] |= {"accuracy": right / 20, "stderr": 0.11, "examples": 20}
            rows = [{"predicted": 1, "gold": 1, "correct": index < right} for index in range(20)]
            (folder / f"predictions-{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        metrics["baseline"]["method"] = "lora"
        (folder / "metrics.json").write_text(json.dumps(metrics))
        folders.append(folder)
    methods = read_vtab(folders)
    found = overall_standing(methods)
    assert found is not None
    assert [one.label for one in found.top] == ["pica r=64"]
    assert "95% paired bootstrap, 380 test problems, one seed" in found.statement()
    text = vtab_page(methods)
    check_page(text)
    assert "<b>60.0%</b>" in text
    assert '<tr class="best"><th scope="row" data-value="pica r=64">' in text
