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


MATH = {
    "problem": "Half of 1?",
    "solution": "We get $\\boxed{\\frac{1}{2}}$.",
    "answer": "\\frac{1}{2}",
    "level": "Level 1",
}
NOTHING = {"query": "What is x?", "response": "It depends."}


def test_formulas_are_the_gold_answer_where_they_are(tmp_path: Path):
    location = write(tmp_path, GSM8K, FORMULA, MATH)
    assert [example.answer for example in TASK.load("test", Source(location))] == ["72", "\\frac{1}{2}", "\\frac{1}{2}"]


def test_solutions_without_an_answer_may_be_learnt_from_but_not_tested_on(tmp_path: Path):
    location = write(tmp_path, GSM8K, NOTHING)
    assert [example.answer for example in TASK.load("train", Source(location))] == ["72", ""]
    with pytest.raises(DataError, match="line 2: the solution gives no final answer"):
        TASK.load("test", Source(location))


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("The answer is: $\\frac12$.", "\\frac{1}{2}", True),
        ("The answer is: 0.5", "\\frac{1}{2}", True),
        ("The answer is: \\frac{10}{2}", "5", True),
        ("The answer is: \\frac{10}{2}", "10", False),
        ("so $x = \\boxed{\\sqrt{12}}$ and that is all 7", "2\\sqrt{3}", True),
        ("\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", "(3,\\frac{\\pi}{2})", True),
        ("\\boxed{(3, 4)}", "(4, 3)", False),
        ("\\boxed{[0,1)}", "[0,1]", False),
        ("\\boxed{x^2+1}", "1+x^2", True),
        ("\\boxed{5\\text{ cm}}", "5", True),
        ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}", True),
        ("\\boxed{\\text{odd}}", "\\text{even}", False),
        ("The answer is: x = 3", "3", True),
        ("\\boxed{", "3", False),
        ("The answer is: 9^{9^{9^{9^9}}}", "3", False),
        ("The answer is: __import__('os').getcwd()", "3", False),
    ],
)
def test_formulas_are_compared_by_value(text: str, gold: str, right: bool):
    assert TASK.correct(TASK.extract(text), gold) is right


@pytest.mark.parametrize(
    ("text", "gold", "right"),
    [
        ("The answer is: \\dfrac{1}{2}", "\\frac12", True),
        ("The answer is: 0.5", "\\frac{1}{2}", False),
        ("The answer is: $1,080", "1080", True),
        ("She has 3 and 5, so 8 in all", "8", True),
        ("The answer is: 10 cm", "10", True),
        ("no idea", "\\frac{1}{2}", False),
    ],
)
def test_the_papers_comparison_is_of_texts_and_numbers(text: str, gold: str, right: bool):
    assert TASK.other_scores["exact_match"](text, gold) is right


def test_there_are_no_embedded_problems():
    with pytest.raises(DataError, match="no embedded problems"):
        TASK.load("test", Source("embedded"))


def test_a_column_of_bare_answers_is_fine_to_test_on(tmp_path: Path):
    (tmp_path / "a.csv").write_text("question,answer\nWhat is 3 + 1?,4\n")
    (example,) = TASK.load("test", Source(str(tmp_path / "a.csv")))
    assert example.answer == "4"
