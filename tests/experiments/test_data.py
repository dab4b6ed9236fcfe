"""Splits and token sequences."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pica.errors import ConfigError, DataError
from pica.experiments.data import load_splits, take_out
from pica.experiments.encoding import IGNORED, encode
from pica.experiments.recipes.recipe import Recipe
from pica.tasks import Example, get_task

ARITHMETIC = get_task("arithmetic")


def rows(folder: Path, name: str, count: int, offset: int = 0) -> str:
    path = folder / name
    made = [
        {"instruction": f"Number {offset + n}?", "input": "", "output": f"The answer is {n}.", "answer": str(n)}
        for n in range(count)
    ]
    path.write_text(json.dumps(made))
    return str(path)


def test_loss_is_on_completion_and_end_only(model_folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    row = encode([Example("Question: 1?\nAnswer:", " It is 2.", "2")], tokenizer)[0]
    learnt = [token for token, label in zip(row["input_ids"], row["labels"]) if label != IGNORED]
    assert tokenizer.decode(row["input_ids"]) == "Question: 1?\nAnswer: It is 2.<eos>"
    assert tokenizer.decode(learnt) == " It is 2.<eos>"
    assert [label for label in row["labels"] if label != IGNORED] == learnt


def test_long_sequences_are_cut_and_lone_prompts_dropped(model_folder: Path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    examples = [Example("ab", "cd", ""), Example("abc", "defgh", ""), Example("abcdefgh", "i", "")]
    with caplog.at_level(logging.WARNING):
        encoded = encode(examples, tokenizer, max_length=6)
    assert [len(ids) for ids in encoded["input_ids"]] == [5, 6]
    assert "2 of 3 sequences are cut off at trainer.max_length = 6" in caplog.text
    assert "1 sequences are dropped" in caplog.text
    with pytest.raises(DataError, match="All prompts are longer than trainer.max_length = 2"):
        encode(examples, tokenizer, max_length=2)


def test_taken_out_problems_are_disjoint_seeded_and_rid_of_their_doubles():
    examples = [Example(f"p{n % 30}", "c", "") for n in range(40)]
    kept, taken = take_out(examples, 10, seed=0)
    assert len(taken) == 10
    assert not {example.prompt for example in kept} & {example.prompt for example in taken}
    assert take_out(examples, 10, seed=0) == (kept, taken)
    doubles: list = []
    take_out(examples, 10, seed=0, left_out=doubles.append)
    assert len(doubles) == 30 - len(kept)
    assert take_out(examples, 10, seed=1)[1] != taken
    with pytest.raises(DataError, match="holds 40 problems, too few to take 21 out"):
        take_out(examples, 21, seed=0)


def test_validation_comes_out_of_the_training_file_and_never_from_the_test_file(recipe: Callable, tmp_path: Path):
    made: Recipe = recipe(
        data__train=rows(tmp_path, "train.json", 30),
        data__test=rows(tmp_path, "test.json", 5, offset=100),
        trainer__learning_rates=[0.01, 0.02],
    )
    splits = load_splits(made, ARITHMETIC)
    prompts = {name: {example.prompt for example in getattr(splits, name)} for name in ("train", "validation", "test")}
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [26, 4, 4]
    assert len(set.union(*prompts.values())) == 34


def test_nothing_is_taken_out_when_nothing_is_chosen(recipe: Callable, tmp_path: Path):
    train, test = rows(tmp_path, "train.json", 30), rows(tmp_path, "test.json", 5, offset=100)
    splits = load_splits(recipe(data__train=train, data__test=test), ARITHMETIC)
    assert [len(splits.train), len(splits.validation)] == [30, 0]


def test_a_validation_file_is_used_as_it_is(recipe: Callable, tmp_path: Path):
    train, test = rows(tmp_path, "train.json", 30), rows(tmp_path, "test.json", 5, offset=100)
    validation = rows(tmp_path, "validation.json", 6, offset=200)
    splits = load_splits(recipe(data__train=train, data__test=test, data__validation=validation), ARITHMETIC)
    assert [len(splits.train), len(splits.validation)] == [30, 4]


def test_test_problems_are_not_learnt_from_unless_asked(recipe: Callable, tmp_path: Path, caplog):
    train, test = rows(tmp_path, "train.json", 30), rows(tmp_path, "test.json", 4, offset=28)
    written = Path(test).read_text()
    Path(test).write_text(written.replace("Number 28?", "number  28 ?"))  # the same but for case and spacing
    with caplog.at_level(logging.WARNING):
        splits = load_splits(recipe(data__train=train, data__test=test), ARITHMETIC)
    assert "2 of 30 training problems are test or validation problems too: left out" in caplog.text
    assert [len(splits.train), len(splits.test)] == [28, 4]
    kept = load_splits(recipe(data__train=train, data__test=test, data__keep_test_problems=True), ARITHMETIC)
    assert len(kept.train) == 30
    assert "kept, as data.keep_test_problems says" in caplog.text
    first = splits.left_out[0]
    assert (first.place, first.reason) == (f"{train}, row 29", f"is a test problem too ({test}, row 1)")
    assert first.problem.startswith("Question: Number 28?")
    assert [len(splits.left_out), len(kept.left_out)] == [2, 0]


def test_test_problems_choose_nothing(recipe: Callable, tmp_path: Path, caplog):
    train, test = rows(tmp_path, "train.json", 30), rows(tmp_path, "test.json", 4, offset=100)
    validation = rows(tmp_path, "validation.json", 3, offset=102)
    named = {"data__train": train, "data__test": test, "data__refit": True}
    with caplog.at_level(logging.WARNING):
        splits = load_splits(recipe(**named, data__validation=validation), ARITHMETIC)
    assert "2 of 3 validation problems are test problems too: left out" in caplog.text
    assert [each.place for each in splits.left_out] == [f"{validation}, row {number}" for number in (1, 2)]
    assert [example.answer for example in splits.validation] == ["2"]
    with pytest.raises(DataError, match=r"data\.validation: all of its problems are test problems"):
        load_splits(recipe(**named, data__validation=test), ARITHMETIC)


def test_nothing_left_to_learn_from_is_an_error(recipe: Callable, tmp_path: Path):
    train = rows(tmp_path, "train.json", 4)
    with pytest.raises(DataError, match="data.train: no problems are left"):
        load_splits(recipe(data__train=train, data__test=train), ARITHMETIC)


def test_a_limit_beside_held_out_rows_draws_from_the_whole_of_a_sorted_file(
    recipe: Callable[..., Recipe], tmp_path: Path
):
    file = tmp_path / "sorted.tsv"
    file.write_text("text\tlabel\n" + "".join(f"row {n}\t{n // 50}\n" for n in range(100)))
    (test := tmp_path / "test.tsv").write_text("text\tlabel\nother\t0\nothers\t1\n")
    data = {"data__train": str(file), "data__test": str(test), "data__train_limit": 20, "data__hold_out": True}
    made = recipe(task__name="sentiment", task__max_new_tokens=None, **data)
    splits = load_splits(made, get_task("sentiment"))
    assert len(splits.validation) == 4
    assert {example.label for example in splits.train} == {"0", "1"}
    assert len(splits.train) > 10


@pytest.mark.parametrize("given", ["{text: 3, label: 1}", {"text": 3, "label": 1}, "{text: '3', label: '1'}"])
def test_columns_of_a_table_without_a_header_are_named_by_their_numbers(recipe: Callable, given: object):
    assert recipe(data__columns=given).data.columns == {"text": "3", "label": "1"}
    with pytest.raises(ConfigError, match=r"data.columns = .* must be a mapping of text to \(text or a mapping"):
        recipe(data__columns="{text: [1]}")


def test_columns_may_differ_between_splits(recipe: Callable, tmp_path: Path):
    for name, question in (("train", "prompt"), ("test", "problem")):
        made = [{question: f"{name} {n}?", "instruction": "other", "target": "is 1", "answer": "1"} for n in range(30)]
        (tmp_path / f"{name}.json").write_text(json.dumps(made))
    columns = {"solution": "target", "train": {"question": "prompt"}, "test": {"question": "problem"}}
    named = {"data__train": str(tmp_path), "data__columns": columns, "trainer__learning_rates": [0.1, 0.2]}
    splits = load_splits(recipe(**named), ARITHMETIC)
    assert splits.train[0].prompt == "Question: train 0?\nAnswer:"
    assert splits.validation[0].prompt.startswith("Question: train")
    assert splits.test[0].prompt == "Question: test 0?\nAnswer:"
    with pytest.raises(ConfigError, match="data.columns: 'tset' has names below it, and is no split"):
        recipe(data__columns={"tset": {"question": "problem"}})
