"""The arithmetic task: generated problems, and files in the LLM-Adapters form."""

import json
import logging
from pathlib import Path

import pytest

from pica.errors import ConfigError, DataError
from pica.tasks import Example, Source, get_task
from pica.tasks.arithmetic import ArithmeticTask

TASK = ArithmeticTask()
ROW = {"instruction": "How many?", "input": "", "output": "\nA: 2 + 2 = 4. The answer is 4.", "answer": "4.0"}


def write(folder: Path, *rows: dict, name: str = "data.json") -> str:
    path = folder / name
    path.write_text(json.dumps(rows, indent=1))
    return str(path)


def test_embedded_splits_share_no_problem_and_are_reproducible():
    splits = {name: TASK.load(name, Source("embedded", limit=60)) for name in ("train", "validation", "test")}
    prompts = [{example.prompt for example in examples} for examples in splits.values()]
    assert [len(examples) for examples in splits.values()] == [60, 60, 60]
    assert len(set.union(*prompts)) == sum(map(len, prompts))
    assert TASK.load("test", Source("embedded", limit=60)) == splits["test"]
    assert TASK.load("test", Source("embedded", limit=60, seed=1)) != splits["test"]


def test_gold_solutions_of_embedded_problems_are_right():
    for example in TASK.load("train", Source("embedded", limit=100)):
        assert TASK.correct(TASK.extract(example.completion), example.answer)


def test_file_row_becomes_prompt_completion_and_answer(tmp_path: Path):
    (example,) = TASK.load("test", Source(write(tmp_path, ROW)))
    assert example == Example("Question: How many?\nAnswer:", " A: 2 + 2 = 4. The answer is 4.", "4.0")
    assert TASK.correct(TASK.extract("So it is. The answer is 4"), example.answer)
    assert not TASK.correct(TASK.extract("So it is. The answer is 40"), example.answer)


def test_alpaca_template_shows_an_input_only_where_there_is_one(tmp_path: Path):
    location = write(tmp_path, ROW, {**ROW, "input": "Some facts."})
    plain, with_input = TASK.load("test", Source(location, template="alpaca"))
    assert plain.prompt.endswith("### Instruction:\nHow many?\n\n### Response:\n")
    assert "### Input" not in plain.prompt
    assert "### Instruction:\nHow many?\n\n### Input:\nSome facts.\n\n### Response:\n" in with_input.prompt


def test_braces_in_a_question_stay_as_they_are(tmp_path: Path):
    (example,) = TASK.load("test", Source(write(tmp_path, {**ROW, "instruction": "What is {question} {0}?"})))
    assert example.prompt == "Question: What is {question} {0}?\nAnswer:"


def test_unscorable_rows_may_be_learnt_from_but_not_tested_on(tmp_path: Path):
    location = write(tmp_path, ROW, {**ROW, "answer": "C"})
    assert [example.answer for example in TASK.load("train", Source(location))] == ["4.0", ""]
    with pytest.raises(DataError, match=r"line 8: field 'answer' is not a number: 'C'"):
        TASK.load("test", Source(location))


def test_rows_without_a_solution_are_left_out_of_training_with_a_warning(tmp_path: Path, caplog):
    location = write(tmp_path, {**ROW, "output": ""}, ROW)
    with caplog.at_level(logging.WARNING):
        assert len(TASK.load("train", Source(location))) == 1
    assert "1 of the rows" in caplog.text
    assert "line 2" in caplog.text
    assert len(TASK.load("test", Source(location))) == 2


def test_columns_rename_the_fields_of_a_file(tmp_path: Path):
    location = write(tmp_path, {"q": "How many?", "s": "The answer is 4.", "gold": 4})
    columns = {"question": "q", "solution": "s", "answer": "gold"}
    (example,) = TASK.load("test", Source(location, columns=columns))
    assert example.answer == "4"
    with pytest.raises(DataError, match="line 2: field 'instruction' is missing"):
        TASK.load("test", Source(location, columns={"answer": "gold"}))
    with pytest.raises(ConfigError, match="data.columns: 'questions' is no field"):
        TASK.load("test", Source(location, columns={"questions": "q"}))


def test_limit_takes_the_first_rows(tmp_path: Path):
    location = write(tmp_path, ROW, {**ROW, "answer": "5"}, {**ROW, "answer": "6"})
    assert [example.answer for example in TASK.load("test", Source(location, limit=2))] == ["4.0", "5"]


def test_unknown_task_and_template_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="did you mean 'arithmetic'"):
        get_task("aritmetic")
    with pytest.raises(ConfigError, match="template 'alpacca' is unknown"):
        TASK.load("test", Source("embedded", limit=1, template="alpacca"))
