"""The math task: GSM8K and MetaMathQA rows."""

import json
from pathlib import Path

import pytest

from pica.errors import DataError
from pica.tasks import Source
from pica.tasks.math import MathTask

TASK = MathTask()
GSM8K = {"question": "Natalia sold clips. How many?", "answer": "She sold 48+24 = <<48+24=72>>72 clips.\n#### 72"}
GSM8K_TEST = {"query": "How much?", "response": "It is 2*$540 = $<<2*540=1080>>1080.\n#### 1,080"}
METAMATH = {"query": "What is x?", "response": "So x = 3.\n#### 3\nThe answer is: 3", "type": "GSM_SV"}
FORMULA = {"query": "What is x?", "response": "Thus $x = \\boxed{\\frac{1}{2}}$. The answer is: \\frac{1}{2}"}


def write(folder: Path, *rows: dict) -> str:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_both_field_forms_and_both_markers_give_the_gold_number(tmp_path: Path):
    examples = TASK.load("test", Source(write(tmp_path, GSM8K, GSM8K_TEST, METAMATH)))
    assert [example.answer for example in examples] == ["72", "1080", "3"]
    assert examples[0].completion == GSM8K["answer"]
    assert examples[0].prompt.endswith("### Instruction:\nNatalia sold clips. How many?\n\n### Response:\n")


def test_gold_solutions_are_right_by_their_own_extraction(tmp_path: Path):
    for example in TASK.load("test", Source(write(tmp_path, GSM8K, GSM8K_TEST, METAMATH))):
        assert TASK.correct(TASK.extract(example.completion), example.answer)


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("#### $1,080", "1080", True),
        ("#### 1080.00", "1080", True),
        ("The answer is: 50%", "50", True),
        ("The answer is -3.", "-3", True),
        ("The answer is 3.", "-3", False),
        ("She has 3 and 5, so 8 in all", "8", True),
        ("#### 8\n\n### Instruction:\nNext\n#### 9", "8", True),
        ("no idea", "8", False),
        ("", "8", False),
    ],
)
def test_generated_answers_are_scored_by_value(text: str, gold: str, right: bool):
    assert TASK.correct(TASK.extract(text), gold) is right


def test_formulas_may_be_learnt_from_but_not_tested_on(tmp_path: Path):
    location = write(tmp_path, GSM8K, FORMULA)
    assert [example.answer for example in TASK.load("train", Source(location))] == ["72", ""]
    with pytest.raises(DataError, match="line 2: the solution gives no final number"):
        TASK.load("test", Source(location))


def test_there_are_no_embedded_problems():
    with pytest.raises(DataError, match="no embedded problems"):
        TASK.load("test", Source("embedded"))
