"""The commonsense task: LLM-Adapters' rows, sets in folders, and answers read out of texts."""

import json
from pathlib import Path

import pytest

from pica.errors import DataError
from pica.tasks import Source
from pica.tasks.commonsense import SETS, CommonsenseTask

TASK = CommonsenseTask()
KINDS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4"),
    "winogrande": ("option1", "option2"),
}


def row(number: int, choices: tuple[str, ...], **changes: str) -> dict[str, str]:
    answer = choices[number % len(choices)]
    made = {
        "instruction": f"Please answer question {number}?\n\nAnswer format: {'/'.join(choices)}",
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }
    return made | changes


@pytest.fixture
def sets(tmp_path: Path) -> str:
    for name, choices in KINDS.items():
        (tmp_path / name).mkdir()
        for split, count, offset in (("train", 6, 0), ("test", 3, 50)):
            rows = [row(offset + number, choices) for number in range(count)]
            (tmp_path / name / f"{split}.json").write_text(json.dumps(rows))
    return str(tmp_path)


def test_a_folder_of_sets_is_their_mixture_in_the_papers_order(sets: str):
    train, test = TASK.load("train", Source(sets)), TASK.load("test", Source(sets))
    assert (len(train), len(test)) == (24, 12)
    assert list(dict.fromkeys(example.group for example in test)) == ["boolq", "piqa", "winogrande", "ARC-Challenge"]
    assert len(SETS) == 8
    assert test[0].choices == ("true", "false")
    assert test[0].completion == "the correct answer is true"
    assert test[0].prompt.endswith("Answer format: true/false\n\n### Response:\n")


def test_a_single_file_is_one_group(sets: str):
    examples = TASK.load("test", Source(f"{sets}/piqa/test.json"))
    assert {example.group for example in examples} == {""}
    assert len(TASK.load("test", Source(f"{sets}/piqa"))) == 3


def test_a_limit_samples_every_set(sets: str):
    found = TASK.load("train", Source(sets, limit=12))
    assert len(found) == 12
    assert len({example.group for example in found}) > 2
    assert found == TASK.load("train", Source(sets, limit=12)) != TASK.load("train", Source(sets, limit=12, seed=1))


@pytest.mark.parametrize(
    ("text", "choices", "expected"),
    [
        ("the correct answer is answer2", "ARC-Challenge", "answer2"),
        ("Answer3 of course, not answer1", "ARC-Challenge", "answer3"),
        ("true: answer4", "ARC-Challenge", "answer4"),
        ("answer5", "ARC-Challenge", None),
        ("It is True.", "boolq", "true"),
        ("nobody knows", "boolq", None),
        ("", "boolq", None),
    ],
)
def test_the_first_choice_in_a_text_is_its_answer(tmp_path: Path, text: str, choices: str, expected: str | None):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([row(1, KINDS[choices])]))
    (example,) = TASK.load("test", Source(str(path)))
    assert TASK.extract(text, example) == expected
    assert TASK.correct(expected, example.answer) == (expected == example.answer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"instruction": "What?"}, "does not end in 'Answer format"),
        ({"answer": "answer9"}, "answer 'answer9' is none of the choices true, false"),
        ({"answer": " "}, "field 'answer' is empty"),
    ],
)
def test_rows_that_are_not_of_the_form_are_named(tmp_path: Path, changes: dict[str, str], message: str):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "".join(json.dumps(made) + "\n" for made in (row(0, KINDS["boolq"]), row(1, KINDS["boolq"], **changes)))
    )
    with pytest.raises(DataError, match=f"line 2: .*{message}"):
        TASK.load("test", Source(str(path)))


def test_a_test_row_without_its_sentence_gets_one_that_ends_in_the_answer(tmp_path: Path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([row(1, KINDS["boolq"], output="")]))
    (example,) = TASK.load("test", Source(str(path)))
    assert example.completion == "the correct answer is false"


def test_a_folder_without_data_is_told(tmp_path: Path):
    with pytest.raises(DataError, match="neither a test file nor folders with one"):
        TASK.load("test", Source(str(tmp_path)))
