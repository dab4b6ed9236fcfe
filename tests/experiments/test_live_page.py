"""`pica train --page`: the page of a run that is under way."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from pica import cli
from pica.cli import run_page
from pica.experiments.recipes.recipe import Recipe
from pica.experiments.reporting import Silent
from pica.experiments.train.progress import Progress
from pica.experiments.train.run import start
from pica.report.live_page import write_live_page
from tests.report.browser import browser, check_page, needs_browser


def command(model: Path, folder: Path, output: str, *more: str) -> list[str]:
    """A quick run on conversations."""
    rows = [[{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": "It is."}] for n in range(20)]
    (folder / "train.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    given = {
        "model.path": model,
        "data.train": folder / "train.jsonl",
        "task.chat_template": "plain",
        "task.max_new_tokens": 4,
        "adapter.r": 4,
        "trainer.max_steps": 4,
        "evaluate_base": "false",
        "trainer.eval_steps": 2,
        "trainer.sample_steps": 2,
        "trainer.log_steps": 1,
        "output": folder / output,
    }
    return ["train", *(f"--{name}={value}" for name, value in given.items()), *more]


def test_the_page_is_whole_at_any_moment_and_changes_nothing(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(run_page, "_EVERY", 0.0)
    monkeypatch.setattr(run_page, "_SHARE", 0.0)
    seen: list[str] = []
    real = run_page.write_live_page

    def write(progress: Progress, *given, **options) -> None:
        real(progress, *given, **options)
        seen.append((progress.folder / "report.html").read_text(encoding="utf-8"))

    monkeypatch.setattr(run_page, "write_live_page", write)
    assert cli.main(command(model_folder, tmp_path, "shown", "--page")) == 0
    assert len(seen) > 10
    for page in (seen[0], seen[-1]):
        check_page(page)
    assert all('http-equiv="refresh"' in page and page.rstrip().endswith("</html>") for page in seen)
    during = next(page for page in seen if "3 of 4" in page)
    assert "Loss against optimizer steps" in during
    assert "Say " in during.partition("The newest answers.")[2]
    last = (tmp_path / "shown" / "report.html").read_text(encoding="utf-8")
    assert 'http-equiv="refresh"' not in last
    assert "Before and after" in last, "the page of pica report"
    assert f"One page:    {tmp_path / 'shown' / 'report.html'}" in capsys.readouterr().out

    assert cli.main(command(model_folder, tmp_path, "plain")) == 0
    for name in ("adapter/adapter_model.safetensors", "loss_curve.csv", "samples.jsonl"):
        assert (tmp_path / "shown" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    assert not (tmp_path / "plain" / "report.html").exists()


class Falling(Silent):
    @contextmanager
    def bar(self, label: str, total: int):
        def advance(count: int = 1, note: str = "") -> None:
            if "rate" in label:
                raise KeyboardInterrupt

        yield advance


def test_a_run_that_stops_says_so_on_its_page(recipe: Callable[..., Recipe], tmp_path: Path):
    reporter = run_page.PageReporter(Falling())
    with pytest.raises(BaseException, match="interrupted"):
        start(recipe(), reporter=reporter)
    reporter.end("Stopped.")
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    check_page(text)
    assert 'http-equiv="refresh"' not in text
    assert "Stopped." in text


def test_each_answer_is_shown_once(tmp_path: Path):
    """Also where the training before this one gave its last answers at the same step, and few at a time."""
    samples = [
        {"run": run, "step": step, "prompt": "Hello?", "answer": f"{run} says {step}."}
        for run in ("adapter-lr0.01", "adapter-lr0.02")
        for step in (10, 20)
    ]
    write_live_page(Progress(tmp_path, Recipe(), {"adapter": "pica r=4"}, [], samples), "now", [])
    newest, _, older = (tmp_path / "report.html").read_text(encoding="utf-8").partition("3 earlier answers")
    cells = [f">{row['answer']}</td>" for row in samples]
    assert [newest.count(cell) for cell in cells] == [0, 0, 0, 1]
    assert [older.count(cell) for cell in cells] == [1, 1, 1, 0]


@needs_browser
def test_a_browser_looks_again_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pica.report.live_page._REFRESH", 1)
    progress = Progress(tmp_path, Recipe(), {"adapter": "pica r=4"}, [], [])
    write_live_page(progress, "first", [])
    with browser(tmp_path / "browser") as tab:
        tab.open((tmp_path / "report.html").as_uri())
        tab.wait("document.body && document.body.innerText.includes('first')")
        write_live_page(progress, "second", ["a note"])
        tab.wait("document.body && document.body.innerText.includes('second')", 30)
