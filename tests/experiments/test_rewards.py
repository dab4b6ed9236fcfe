"""Learning from rewards: what is rewarded and measured, resuming, and a run on the embedded model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pica import cli
from pica.errors import ConfigError, DataError
from pica.experiments.interrupts import Interrupted
from pica.experiments.pipelines import make_pipeline
from pica.experiments.recipes.parsing import load_recipe
from pica.experiments.recipes.recipe import Recipe
from pica.experiments.reporting import Silent
from pica.experiments.train.run import resume, start
from pica.tasks.base import Example
from tests.experiments.preference.test_preferences import measured, same_results
from tests.experiments.train.test_training import InterruptAt
from tests.report.browser import check_page


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems to which the embedded model happens to say what is right now and then."""
    path = tmp_path_factory.mktemp("problems") / "train.json"
    rows = [{"instruction": f"Say {n}.", "output": "The answer is 1.", "answer": "1"} for n in range(24)]
    path.write_text(json.dumps(rows))
    (path.parent / "test.json").write_text(
        json.dumps([{**row, "instruction": f"And {n}?"} for n, row in enumerate(rows[:6])])
    )
    return path.parent


@pytest.fixture
def reward(problems: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A quick recipe on them."""

    def make(**overrides: object) -> Recipe:
        quick = {
            "output": str(tmp_path / "out"),
            "evaluate_base": False,
            "data.train": str(problems),
            "task.name": "reward",
            "task.subset": "arithmetic",
            "task.max_new_tokens": 4,
            "adapter.r": 8,
            "trainer.max_steps": 5,
            "trainer.batch_size": 16,
            "trainer.learning_rate": 0.02,
            "trainer.log_steps": 1,
            "trainer.threads": 1,
        }
        quick |= {key.replace("__", "."): value for key, value in overrides.items()}
        return load_recipe(None, list(quick.items()))

    return make


def test_rewards_are_what_the_task_scores(reward: Callable[..., Recipe]):
    pipeline: Any = make_pipeline(reward())
    texts = [" The answer is 1.", " 7 + 1 = 8. The answer is 1.0 dollars", " The answer is 2.", " no number"]
    columns = {"answer": ["1"] * 4, "choices": [[]] * 4}
    assert pipeline._rewards(["?"] * 4, texts, **columns) == [1.0, 1.0, 0.0, 0.0]
    pipeline = make_pipeline(reward(task__subset="commonsense"))
    columns = {"answer": ["true", "true"], "choices": [["true", "false"]] * 2}
    assert pipeline._rewards(["?"] * 2, ["it is True", "false, not true"], **columns) == [1.0, 0.0]


def test_a_run_raises_the_reward_and_says_so(reward: Callable[..., Recipe], capsys: pytest.CaptureFixture[str]):
    changes = {"trainer__max_steps": 10, "trainer__sample_steps": 5, "task__answers": 1, "reward__test_generations": 8}
    result = start(reward(evaluate_base=True, **changes), reporter=Silent())
    base, adapter = (measured(result)[kind] for kind in ("base", "adapter"))
    assert adapter["metric"] == "accuracy"
    assert adapter["mean_reward"] - base["mean_reward"] > 4 * adapter["mean_reward_stderr"] > 0
    rows = [json.loads(line) for line in (result.output / "predictions-adapter.jsonl").read_text().splitlines()]
    assert sum(row["mean_reward"] for row in rows) / len(rows) == pytest.approx(adapter["mean_reward"])
    curve = (result.output / "loss_curve.csv").read_text().splitlines()
    assert curve[0].endswith("reward,answer_tokens")
    assert len((result.output / "samples.jsonl").read_text().splitlines()) == 2
    assert cli.main(["report", str(result.output)]) == 0
    page = (result.output / "report.html").read_text()
    assert "reward-plot" in page
    assert "mean reward of sampled answers" in page
    capsys.readouterr()
    assert cli.main(["evaluate", str(result.output), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["mean_reward"] == pytest.approx(adapter["mean_reward"])
    assert "| mean reward |" in (result.output / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_resuming_in_a_later_epoch_ends_in_the_same_adapter(reward: Callable[..., Recipe], tmp_path: Path, beta: float):
    changes: dict[str, Any] = {
        "data__train_limit": 6,
        "reward__beta": beta,
        "reward__test_generations": 1,
    }  # 3 steps an epoch
    whole = start(reward(output=str(tmp_path / "whole"), evaluate_base=True, **changes), reporter=Silent())
    with pytest.raises(Interrupted):
        start(reward(evaluate_base=True, **changes), reporter=InterruptAt(4))
    assert (tmp_path / "out" / "checkpoints" / "adapter-lr0.02" / "checkpoint-4").is_dir()
    same_results(whole, resume(tmp_path / "out", reporter=Silent()))


def test_measuring_leaves_the_random_numbers_alone(reward: Callable[..., Recipe]):
    pipeline = make_pipeline(reward(reward__test_generations=2))
    model, examples = pipeline.load_base(), [Example("Question: 1?\nAnswer:", " The answer is 1.", "1")]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, other = (pipeline.evaluate(model, examples, reporter=Silent(), label="") for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert one.metrics == other.metrics


def test_long_prompts_are_left_out_or_refused(reward: Callable[..., Recipe], caplog: pytest.LogCaptureFixture):
    pipeline = make_pipeline(reward(trainer__max_length=40))
    examples = [Example("Question: " + "x" * n, "", "1") for n in (1, 300)]
    assert pipeline.encode(examples)["prompt"] == [examples[0].prompt]
    assert "1 of 2 prompts are left out, longer than trainer.max_length = 40 tokens" in caplog.text
    with pytest.raises(DataError, match="All 1 prompts are longer than"):
        pipeline.encode(examples[1:])


def test_what_does_not_go_with_rewards_is_said(reward: Callable[..., Recipe]):
    for changes, said in (
        ({"task__subset": None}, "task.subset is not set: task reward is several tasks; choose one of arithmetic"),
        ({"task__subset": "chat"}, "'chat': task reward needs a task that can tell right answers from wrong ones"),
        ({"trainer__batch_size": 12}, "= 12 answers a step: must be a multiple of reward.num_generations = 8"),
        ({"reward__num_generations": 1}, "reward.num_generations = 1: must be 2 or more"),
        ({"reward__temperature": 0.0}, "reward.temperature = 0.0: must be above 0"),
        ({"reward__top_p": 1.5}, "reward.top_p = 1.5: must be above 0 and at most 1"),
        ({"reward__beta": -1.0}, "reward.beta = -1.0: must be 0 or more"),
        ({"trainer__group_by_length": True}, "trainer.group_by_length is for texts that are there already"),
    ):
        with pytest.raises(ConfigError, match=said):
            reward(**changes)
    with pytest.raises(ConfigError, match="pissa: it changes the frozen weights"):
        start(reward(adapter__method="pissa", reward__beta=0.1), reporter=Silent())


def test_the_recipe_runs_in_miniature_on_what_a_run_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The two lines at the head of the recipe, with little of everything."""
    few = ["--data.train_limit", "8", "--data.test_limit", "2", "--trainer.max_steps", "2", "--trainer.threads", "1"]
    sums, merged, rewarded = (str(tmp_path / name) for name in ("sums", "sums-merged", "rewarded"))
    assert cli.main(["train", "arithmetic-tiny", "--baseline.method", "null", "-o", sums, *few]) == 0
    assert cli.main(["merge", sums, "-o", merged]) == 0
    assert cli.main(["train", "reward-tiny", "-o", rewarded]) == 2
    assert "model.path is not set" in capsys.readouterr().err
    given = ["reward-tiny", "--model.path", merged, "--trainer.batch_size", "16", "--task.max_new_tokens", "4", *few]
    assert cli.main(["train", *given, "-o", rewarded]) == 0
    printed = capsys.readouterr().out
    assert "mean reward: " in printed
    assert "accuracy ± standard error" in printed
    assert cli.main(["train", *given, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "8 problems, whose answers task arithmetic scores" in printed
    assert "step      16 answers, 8 to each of 2 problems" in printed
    assert "held out  2 to be measured on" in printed


def test_what_would_be_asked_is_shown(problems: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = json.loads((problems / "train.json").read_text())
    rows += [rows[0], {**rows[1], "instruction": "Say " + "x" * 3000}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    (tmp_path / "test.json").write_text(json.dumps(rows[2:4]))
    data = ["data", str(tmp_path / "train.json"), "--model", "embedded", "--test", str(tmp_path / "test.json")]
    assert cli.main([*data, "--task", "reward", "--subset", "arithmetic", "--page", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert "read         26 problems, whose answers task arithmetic scores" in printed
    assert "left out     1 longer than" in printed
    assert "duplicates   1 there before" in printed
    assert re.search(r"in the test  2 are test problems too: \S*train.json, row \d+, ", printed)
    assert "row 1, right: 1\nQuestion: Say 0.\nAnswer:\n" in printed
    assert "learns from answers of its own" in (tmp_path / "page.html").read_text()
    for more, said in (
        (["--task", "reward"], "task.subset is not set: task reward is several tasks; choose one of arithmetic"),
        (["--task", "reward", "--subset", "arithmetic", "--system", "x"], "task.system is for tasks chat, preference"),
        (["--subset", "math"], "task.subset = 'math': unknown subset: task chat has none"),
        (["--overflow", "split", "--task", "preference"], "a pair cannot be split"),
    ):
        assert cli.main([*data, *more]) == 2
        assert said in capsys.readouterr().err


def test_rewards_are_compared(reward: Callable[..., Recipe], problems: Path, tmp_path: Path):
    base = {
        "data": {"train": str(problems)},
        "task": {"name": "reward", "subset": "arithmetic", "max_new_tokens": 4},
        "trainer": {"max_steps": 2, "batch_size": 8, "threads": 1},
    }
    methods = [
        {"label": "PiCa", "adapter": {"method": "pica", "r": 4}, "learning_rates": [0.01, 0.02]},
        {"label": "LoRA", "adapter": {"method": "lora", "r": 1}, "learning_rates": [0.01]},
    ]
    file, folder = tmp_path / "both.yaml", tmp_path / "compared"
    file.write_text(yaml.safe_dump({"name": "both", "seeds": [0, 1], "base": base, "methods": methods}))
    assert cli.main(["compare", str(file), "-o", str(folder)]) == 0
    found = json.loads((folder / "results.json").read_text())
    assert [row["seeds_done"] for row in found["rows"]] == [2, 2]
    cell = json.loads(next((folder / "cells").glob("*.json")).read_text())
    assert cell["result"]["mean_reward_stderr"] >= 0
    check_page((folder / "report.html").read_text())
