"""The grid for real: a tiny model, every cell in a process of its own."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from html5lib import HTMLParser

from pica.errors import OutputError
from pica.experiments.compare.cells import Cell, make_cell
from pica.experiments.compare.comparison import Comparison, load_comparison
from pica.experiments.compare.grid import run_grid
from pica.experiments.compare.processes import PRELOADED
from pica.experiments.interrupts import Interrupted
from pica.experiments.results.comparison import CellRecord, record_path
from pica.experiments.results.documents import to_document, write_result
from pica.files.output import claimed, write_json
from pica.report.comparison import write_report
from tests import results

METHODS = [
    {"label": "PiCa", "adapter": {"method": "pica", "r": 4}, "learning_rates": [0.001, 0.03]},
    {"label": "LoRA", "adapter": {"method": "adalora", "r": 1}, "learning_rates": [0.01]},
    {
        "label": "VB-LoRA",
        "adapter": {"method": "vblora", "r": 1, "options": {"vector_length": 7}},
        "learning_rates": [0.01],
    },
]


class Recorder:
    """A watcher that notes what it is told, and can act on progress."""

    def __init__(self, act: Callable[[Cell, str], None] | None = None) -> None:
        self.began: list[str] = []
        self.counts: list[tuple[int, int, int]] = []
        self._cells: dict[int, Cell] = {}
        self._act = act

    def begun(self, worker: int, cell: Cell) -> None:
        self.began.append(cell.label)
        self._cells[worker] = cell

    def progress(self, worker: int, label: str, done: int, total: int, note: str) -> None:
        if self._act:
            self._act(self._cells[worker], label)

    def ended(self, worker: int, cell: Cell, record: CellRecord) -> None: ...

    def grid(self, done: int, failed: int, total: int) -> None:
        self.counts.append((done, failed, total))

    def warn(self, text: str) -> None: ...


@pytest.fixture
def comparison(model_folder: Path, tmp_path: Path) -> Callable[..., Comparison]:
    def make(methods: list[dict] = METHODS, **overrides: object) -> Comparison:
        base = {
            "model": {"path": str(model_folder)},
            "data": {"train_limit": 40, "test_limit": 4, "validation_limit": 4},
            "task": {"max_new_tokens": 4},
            "adapter": {"target_modules": ["q_proj", "v_proj", "up_proj"]},
            "trainer": {"max_steps": 4, "batch_size": 4, "log_steps": 1, "threads": 1},
        }
        file = tmp_path / "comparison.yaml"
        file.write_text(yaml.safe_dump({"name": "tiny", "seeds": [0, 1], "base": base, "methods": methods}))
        return load_comparison(
            str(file), overrides=[(key.replace("__", "."), value) for key, value in overrides.items()]
        )

    return make


def run(comparison: Comparison, folder: Path, watcher: Recorder | None = None, **options: Any) -> list[CellRecord]:
    return run_grid(comparison, comparison.rows, folder, watcher=watcher or Recorder(), **{"workers": 1, **options})


def test_a_grid_from_beginning_to_report(comparison: Callable[..., Comparison], tmp_path: Path):
    folder, first = tmp_path / "out", Recorder()
    records = run(comparison(), folder, first, workers=2)
    named = {(record.label, record.seed): to_document(record) for record in records}
    for file in (folder / "cells").iterdir():
        results.check_file("failed-cell" if "VB-LoRA" in file.read_text() else "cell", file)
    results.check_file("cells", folder / "cells.json")
    assert list(named) == [(row["label"], seed) for row in METHODS for seed in (0, 1)]
    chooser, repeat = named["PiCa", 0]["result"], named["PiCa", 1]["result"]
    losses = {c["learning_rate"]: c["validation_loss"] for c in chooser["candidates"]}
    assert sorted(losses) == [0.001, 0.03]
    assert chooser["learning_rate"] == min(losses, key=lambda rate: losses[rate])
    assert [c["learning_rate"] for c in repeat["candidates"]] == [chooser["learning_rate"]]
    assert repeat["training"]["last_loss"] != chooser["training"]["last_loss"], "another seed, another order"
    assert len(named["LoRA", 0]["curve"]) == 4
    assert named["PiCa", 0]["base"]["examples"] == 4
    assert [named["VB-LoRA", seed]["status"] for seed in (0, 1)] == ["failed", "failed"]
    assert "must be divisible by `vector_length` 7" in named["VB-LoRA", 0]["error"]
    assert named["VB-LoRA", 1]["error"].startswith("Not run: the cell that chooses the learning rate failed")
    assert first.counts[-1] == (6, 2, 6)
    assert not any((folder / "work").iterdir())

    again = Recorder()
    assert run(comparison(), folder, again) == records
    assert again.began == [], "finished and failed cells are not run again"
    retry = Recorder()
    run(comparison(), folder, retry, retry_failed=True)
    assert retry.began == ["VB-LoRA, seed 0"]
    only = Recorder()
    changed = comparison(trainer__max_steps=3)
    found = run_grid(changed, changed.rows[1:2], folder, workers=1, watcher=only)
    assert only.began == ["LoRA, seed 0", "LoRA, seed 1"], "a changed recipe makes new cells, for the rows asked for"
    assert [record.label for record in found] == ["LoRA", "LoRA"]

    run(comparison(), folder)
    summary = write_report(folder)
    assert [len(row.done) for row in summary.rows] == [2, 2, 0]
    text = (folder / "report.html").read_text(encoding="utf-8")
    HTMLParser(strict=True).parse(text)
    assert "must be divisible by <code>vector_length</code> 7" in text
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert rows[0]["score_mean"] == sum(named["PiCa", seed]["result"]["score"] for seed in (0, 1)) / 2
    assert rows[0]["parameters"] == named["PiCa", 0]["result"]["parameters"]["trainable"]


def test_an_interrupted_grid_goes_on(comparison: Callable[..., Comparison], tmp_path: Path):
    folder = tmp_path / "out"
    methods = [{**METHODS[0], "learning_rates": [0.01]}]

    def interrupt(cell: Cell, label: str) -> None:
        if cell.seed == 1:
            raise KeyboardInterrupt

    made = comparison(methods, trainer__max_steps=30)
    first = Recorder(interrupt)
    with pytest.raises(Interrupted) as caught:
        run(made, folder, first)
    assert caught.value.folder == folder
    assert len(list((folder / "cells").iterdir())) == 1
    (work,) = (folder / "work").iterdir()
    assert (work / "run" / "recipe.resolved.yaml").is_file()
    second = Recorder()
    records = run(made, folder, second)
    assert second.began == ["PiCa, seed 1"]
    assert [record.status for record in records] == ["done", "done"]
    assert to_document(records[1])["result"]["training"]["steps"] == 30


def test_a_killed_cell_is_recorded(comparison: Callable[..., Comparison], tmp_path: Path):
    killed: list[int] = []

    def kill(cell: Cell, label: str) -> None:
        for process in Path("/proc").glob("[0-9]*"):
            try:
                target = os.readlink(process / "fd" / "1")
            except OSError:
                continue
            if cell.key in target and not killed:
                killed.append(int(process.name))
                os.kill(int(process.name), signal.SIGKILL)

    records = run(comparison(METHODS[:1]), tmp_path / "out", Recorder(kill))
    assert killed
    assert [record.status for record in records] == ["failed", "failed"]
    assert "SIGKILL; the system does that when memory runs out" in to_document(records[0])["error"]


def test_a_folder_of_something_else_is_left_alone(comparison: Callable[..., Comparison], tmp_path: Path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="holds no comparison"):
        run(comparison(), folder)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    (folder / "comparison.yaml").write_text("name: other")
    with pytest.raises(OutputError, match="holds the comparison 'other'"):
        run(comparison(), folder)
    assert (folder / "comparison.yaml").read_text() == "name: other"


def test_cells_are_of_the_model_as_it_is(comparison: Callable[..., Comparison], model_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    made = comparison([{**METHODS[0], "learning_rates": [0.01]}], model__path=str(folder))
    before = [make_cell(made, made.rows[0], seed, (0.01,)) for seed in (0, 1)]
    assert make_cell(made, made.rows[0], 0, (0.01,)) == before[0]
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    after = make_cell(made, made.rows[0], 0, (0.01,))
    assert after.key != before[0].key
    assert after.earlier_key == before[0].earlier_key
    for cell in before:  # as a version that did not look at the model's files left them
        record = results.done_cell(key=cell.earlier_key, label="PiCa", seed=cell.seed)
        write_result(record_path(tmp_path / "out", cell.earlier_key), record)
    write_json(tmp_path / "out" / "comparison.yaml", {"name": "tiny"})
    watcher = Recorder()
    assert [record.key for record in run(made, tmp_path / "out", watcher)] == [cell.earlier_key for cell in before]
    assert watcher.began == []


def test_several_on_one_folder_run_each_cell_once(
    comparison: Callable[..., Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each begins at the first cell; whoever finds it taken runs another, and waits for what it did not run."""
    monkeypatch.setattr("pica.experiments.compare.grid._SECONDS_BETWEEN_LOOKS", 0.2)
    rows = [
        {"label": label, "adapter": {"method": "pica", "r": r}, "learning_rates": [0.01]}
        for label, r in (("r=2", 2), ("r=4", 4))
    ]
    made, watchers = replace(comparison(rows), seeds=(0,)), (Recorder(), Recorder())
    with ThreadPoolExecutor(2) as pool:
        records = list(pool.map(lambda watcher: run(made, tmp_path / "out", watcher), watchers))
    began = [label for watcher in watchers for label in watcher.began]
    assert sorted(began) == ["r=2, seed 0", "r=4, seed 0"]
    assert all(watcher.began for watcher in watchers), "both had something to do"
    assert [[record.key for record in found] for found in records] == [[record.key for record in records[0]]] * 2
    assert len(records[0]) == 2
    assert not list((tmp_path / "out").rglob("*.lock"))


def test_two_comparisons_do_not_share_a_folder(comparison: Callable[..., Comparison], tmp_path: Path):
    with claimed(tmp_path / "out"), pytest.raises(OutputError, match="Another pica"):
        run(comparison(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_server_that_cells_are_forked_from_loads_libraries_without_a_word():
    code = f"import sys, {PRELOADED}\nassert 'torch' in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
