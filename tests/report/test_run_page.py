"""The page of one run: what it says, that texts from files stay texts, and that it can be searched and put in order."""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from tests import results
from tests.report.browser import check_page, document_after, needs_browser

from pica import cli
from pica.cli.train import split_arguments
from pica.experiments.recipes.parsing import dump_recipe, load_recipe
from pica.experiments.results.documents import write_result
from pica.experiments.results.run import METRICS, ParameterCounts
from pica.report.run_page import command_of, write_run_page

NASTY = "</p><script>alert(1)</script> & \x1b[31m"
MEASURED = {"metric": "token_accuracy", "stderr": 0.01, "examples": 4, "tokens": 100}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def finished_run(folder: Path, task: str, base: dict[str, Any], adapter: dict[str, Any]) -> Path:
    """A run's folder, but for its predictions."""
    folder.mkdir()
    rates = [("adapter.r", "7"), ("trainer.learning_rates", "[0.01, 0.03]"), ("data.train", "embedded")]
    (folder / "recipe.resolved.yaml").write_text(dump_recipe(load_recipe(None, [("model.path", "embedded"), *rates])))
    tried = [results.candidate(learning_rate=rate, validation_loss=5 - rate) for rate in (0.01, 0.03)]
    trained = {
        "title": "pica r=7",
        "learning_rate": 0.03,
        "parameters": ParameterCounts(trainable=1234, head=0, total=99999),
        "candidates": tried,
    }
    measured = {"base": results.measurement(**base), "adapter": results.trained(**trained, **adapter)}
    write_result(folder / METRICS, results.metrics(name=f"my {NASTY}", task=task, **measured))
    lines = ["run,method,peak_rate,step,epoch,loss,learning_rate,grad_norm"]
    lines += [f"adapter,pica,{rate},{step},,{9 - step / 10},0.1,1.0" for rate in (0.01, 0.03) for step in (1, 10, 20)]
    (folder / "loss_curve.csv").write_text("\n".join(lines) + "\n")
    return folder


def without_curve(run: Path) -> None:
    """Without a figure, drawing which takes most of the time."""
    header = (run / "loss_curve.csv").read_text().splitlines()[0]
    (run / "loss_curve.csv").write_text(header + "\n")


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    before, after = (
        MEASURED
        | {"score": score, "loss": loss}
        | {"scores": {"token_accuracy": score, "perplexity": perplexity, "loss_stderr": 0.2}}
        for score, loss, perplexity in ((0.1, 8.0, 2981.0), (0.3, 4.0, 54.6))
    )
    run = finished_run(tmp_path / "chat", "chat", before, after)
    told = [{"role": "system", "content": f"Be {NASTY}"}, {"role": "user", "content": "Where is the ship?"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    talks: list[Any] = [
        [*told, {"role": "assistant", "content": "In the bay."}],
        [*told, call],
        [{"role": "user", "content": "Who sails?"}, {"role": "assistant", "content": "Anne"}],
        "plain text",
    ]
    for name, losses in (("base", (9.0, 8.0, 7.0, 8.0)), ("adapter", (3.0, 9.5, 4.0, None))):
        rows: list[dict[str, Any]] = [
            {"messages": talk, "loss": loss, "token_accuracy": 0.5, "tokens": 10} for talk, loss in zip(talks, losses)
        ]
        for row in rows[:2]:
            row["answer"] = f"{name} says {NASTY}"
        jsonl(run / f"predictions-{name}.jsonl", rows)
    return run


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    scores = {"loss": 2.0}
    run = finished_run(tmp_path / "sums", "arithmetic", scores, scores)
    for name, right in (("base", (1, 0, 0, 1)), ("adapter", (1, 0, 1, 0))):
        rows = [
            {"prompt": f"1 + {at}?", "completion": f" {name}", "extracted": None, "gold": "3", "correct": bool(one)}
            for at, one in enumerate(right)
        ]
        jsonl(run / f"predictions-{name}.jsonl", rows)
    return run


def titles(text: str) -> list[str]:
    return re.findall(r"<summary><b>(?:Conversation|Problem) (\d+)</b>", text)


def test_the_page_of_conversations(chat: Path):
    text = write_run_page(chat).read_text(encoding="utf-8")
    check_page(text)
    assert "<script>alert" not in text
    assert "alert(1)" in text
    assert "\x1b" not in text
    assert "base says" in text
    assert "adapter says" in text
    assert "Loss 9.000 → 3.000 (-6.000) over 10 tokens" in text
    assert titles(text) == ["2", "1", "3", "4"]  # with answers first: the worst, the best; then the others
    assert "10.0% ± 1.0%" in text
    assert "8.0000 ± 0.2000" in text
    assert "The held-out loss changes by " in text
    assert "54.60 ± 10.92" in text  # 54.6 * 0.2
    assert "4.97" in text  # a rate that was tried: its validation loss
    assert "&#34;name&#34;: &#34;look&#34;" in text, "what is said by a tool call is shown"
    assert "pica train recipe.resolved.yaml -o again" in text


def test_the_page_of_problems_with_right_answers(sums: Path):
    text = write_run_page(sums).read_text(encoding="utf-8")
    check_page(text)
    assert titles(text) == ["4", "3", "1", "2"]
    kinds = re.findall(r'<li data-kind="([^"]*)"', text)
    assert kinds == ["became wrong", "became right", "right before and after", "wrong before and after"]
    assert "(read as: nothing)" in text


def test_classes_numbers_and_runs_without_a_base(sums: Path):
    without_curve(sums)
    rows = [{"text": "good", "predicted": "yes", "gold": "no", "correct": False, "probabilities": {"yes": 0.75}}]
    jsonl(sums / "predictions-base.jsonl", rows)
    jsonl(sums / "predictions-adapter.jsonl", rows)
    assert "yes (75.0%)" in write_run_page(sums).read_text(encoding="utf-8")
    metrics = json.loads((sums / "metrics.json").read_text())
    del metrics["base"]
    (sums / "metrics.json").write_text(json.dumps(metrics))
    jsonl(sums / "predictions-adapter.jsonl", [{"text": "good", "predicted": 0.5, "gold": 2.0}])
    text = write_run_page(sums).read_text(encoding="utf-8")
    check_page(text)
    assert "Error 1.500" in text


def test_the_command_that_repeats_a_run_is_the_same_recipe(tmp_path: Path):
    jsonl(tmp_path / "it's.jsonl", [{"prompt": "a", "completion": "b"}])
    given = [("model.path", "embedded"), ("data.train", str(tmp_path / "it's.jsonl")), ("task.name", "chat")]
    given += [
        ("adapter.r", "7"),
        ("adapter.target_modules", "[q_proj, v_proj]"),
        ("trainer.learning_rates", "[1, 3e-5]"),
    ]
    recipe = load_recipe(None, given)
    recipe.task.system = '--It\'s "so": a $1'
    words = shlex.split(command_of(dataclasses.asdict(recipe)).replace("\\\n", " "))
    _, overrides, _ = split_arguments(words[2:])
    assert ("model.path", "embedded") in overrides  # the default, but without it pica train takes a recipe of its own
    assert load_recipe(None, [*overrides, ("output", "null")]) == recipe


def test_the_command_writes_it_and_says_what_is_wrong(chat: Path, capsys: pytest.CaptureFixture[str]):
    without_curve(chat)
    assert cli.main(["report", str(chat)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (chat / "report.html").is_file()
    page = chat.parent / "x.html"
    assert cli.main(["report", str(chat), "-o", str(page)]) == 0
    assert page.is_file()
    rows = (chat / "predictions-base.jsonl").read_text().splitlines()
    (chat / "predictions-base.jsonl").write_text(rows[0] + "\n")
    assert cli.main(["report", str(chat)]) == 2
    assert "4 lines" in capsys.readouterr().err
    (chat / "metrics.json").unlink()
    assert cli.main(["report", str(chat)]) == 2
    assert "is not finished" in capsys.readouterr().err


@needs_browser
def test_it_is_searched_and_put_in_order_in_a_browser(chat: Path, tmp_path: Path):
    page = write_run_page(chat)
    script = """
      const shown = () => [...document.querySelectorAll(".entries li")].filter((item) => !item.hidden)
        .map((item) => item.querySelector("summary b").textContent.split(" ")[1]).join("");
      const found = [shown()];
      const set = (name, event, value) => {
        const field = document.querySelector(`.entries ${name}`);
        field.value = value; field.dispatchEvent(new Event(event)); found.push(shown());
      };
      set("input", "input", "ship BAY"); set("input", "input", "");
      set("select[name=kind]", "change", "without answers"); set("select[name=kind]", "change", "");
      set("select[name=order]", "change", "best"); set("select[name=order]", "change", "place");
      document.title = found.join(" ") + ` wide ${document.documentElement.scrollWidth > innerWidth}`;"""
    found = document_after(page, script, folder=tmp_path)
    assert re.findall("<title>(.*?)</title>", found)[0] == "2134 1 2134 34 2134 1342 1234 wide false"
