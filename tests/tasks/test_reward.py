"""Whose problems are rewarded, and that what cannot be checked is left out."""

import json
from pathlib import Path

import pytest

from pica.errors import ConfigError, DataError
from pica.tasks.arithmetic import ArithmeticTask
from pica.tasks.base import LeftOut, Source
from pica.tasks.reward import RewardTask, scored_task


def test_the_problems_are_those_of_the_task_that_scores_them():
    source = Source("embedded", 20, subset="arithmetic")
    assert RewardTask().load("train", source) == ArithmeticTask().load("train", source)


def test_problems_without_an_answer_to_check_are_left_out(tmp_path: Path):
    rows = [
        {"instruction": "2+2?", "output": "The answer is 4.", "answer": "4"},
        {"instruction": "A or B?", "output": "The answer is B.", "answer": "B"},
    ]
    path, told = tmp_path / "train.json", list[LeftOut]()
    path.write_text(json.dumps(rows))
    (kept,) = RewardTask().load("train", Source(str(path), subset="arithmetic", left_out=told.append))
    assert kept.answer == "4"
    assert [each.reason for each in told] == ["has no answer that can be checked"]
    path.write_text(json.dumps(rows[1:]))
    with pytest.raises(DataError, match="none of the 1 problems has an answer that task arithmetic can check"):
        RewardTask().load("train", Source(str(path), subset="arithmetic"))


def test_a_task_that_scores_nothing_is_refused():
    with pytest.raises(
        ConfigError, match="'chat': task reward needs a task that can tell right answers from wrong ones"
    ):
        scored_task("chat")
