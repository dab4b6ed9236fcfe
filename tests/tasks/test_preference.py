"""Preferences as people have them: every form, and what is said of rows that have none."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pica.errors import DataError
from pica.tasks.base import LeftOut, Source
from pica.tasks.preference import Pair, PreferenceTask, described_pairs, looks_like_preferences
from pica.tasks.wordproblems import extract_answer

ASKED, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5")))
SYSTEM = {"role": "system", "content": "Be brief."}


def load(folder: Path, *rows: dict, **options: object) -> list[Pair]:
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return PreferenceTask().load("train", Source(str(path), **options))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {"question": "2+2?", "chosen": "4", "rejected": "5"},
        {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [ASKED], "chosen": GOOD, "rejected": BAD},
        {"prompt": "2+2?", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "2+2?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},  # as UltraFeedback has it
        {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"chosen": json.dumps([ASKED, GOOD]), "rejected": json.dumps([ASKED, BAD])},  # as tables have lists
        {
            "chosen": "\n\nHuman: 2+2?\n\nAssistant: 4",
            "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5",
        },  # as HH-RLHF has it
        {
            "instruction": "2+2?",
            "chosen": [ASKED, GOOD, ASKED],
            "rejected": [ASKED, BAD],
        },  # the last one nobody answers
    ],
    ids=lambda row: "+".join(f"{name}:{type(value).__name__}" for name, value in row.items()),
)
def test_each_form_gives_the_same_pair(tmp_path: Path, row: dict):
    (found,) = load(tmp_path, row)
    assert (found.prompt, found.chosen, found.rejected) == ((ASKED,), (GOOD,), (BAD,))
    assert looks_like_preferences(row)
    good, bad = found.conversations
    assert (good.messages, bad.messages, good.learnt_from) == ((ASKED, GOOD), (ASKED, BAD), 1)
    assert good.place.endswith("pairs.jsonl, line 1")


def test_system_prompts_and_earlier_turns_belong_to_the_prompt(tmp_path: Path):
    (found,) = load(tmp_path, {"system": "Be brief.", "question": "2+2?", "chosen": "4", "rejected": "5"})
    assert found.prompt == (SYSTEM, ASKED)
    (found,) = load(
        tmp_path, {"system": "Be brief.", "prompt": "2+2?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}
    )
    assert (found.prompt, found.chosen) == ((SYSTEM, ASKED), (GOOD,))
    (found,) = load(tmp_path, {"instruction": "Add.", "input": "2, 2", "chosen": "4", "rejected": "5"})
    assert found.prompt == ({"role": "user", "content": "Add.\n\n2, 2"},)
    (found,) = load(tmp_path, {"chosen": [ASKED, GOOD, ASKED, GOOD], "rejected": [ASKED, GOOD, ASKED, BAD]})
    assert found.prompt == (ASKED, GOOD, ASKED)
    assert described_pairs([found]) == "1 pair, `chosen/rejected conversations`, 2.0 questions on average"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The answer is 41", "The answer is 42", "The answer is"),  # not in the middle of a number
        ("Q: 2+2?\nA: 4", "Q: 2+2?\nA: five", "Q: 2+2?\nA:"),
    ],
)
def test_whole_texts_share_a_prompt_that_ends_with_a_word(tmp_path: Path, chosen: str, rejected: str, prompt: str):
    (found,) = load(tmp_path, {"chosen": chosen, "rejected": rejected})
    assert found.prompt == prompt
    good, bad = found.conversations
    assert (good.text, bad.text, good.learnt_from) == (chosen, rejected, len(prompt))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "2+2?", "chosen": "4"}, "'rejected' is missing (the row has 'prompt', 'chosen')"),
        ({"prompt": "2+2?", "chosen": "4", "rejected": None}, "'rejected' is missing"),
        ({"prompt": "2+2?", "chosen": "4", "rejected": [BAD]}, "'chosen' is text and 'rejected' a list of messages"),
        ({"chosen": [ASKED, GOOD], "rejected": [{**ASKED, "content": "3?"}, BAD]}, "the prompts of 'chosen' and 'rejected'"),
        ({"chosen": [ASKED, GOOD, ASKED, GOOD], "rejected": [ASKED, GOOD, {**ASKED, "content": "?"}, BAD]}, "(message 3)"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "the prompts of 'chosen' and 'rejected' differ (message 1)"),
        ({"prompt": "1+1?", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}, "begins with another prompt than 'prompt'"),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED]}, "one of 'chosen' and 'rejected' ends where the other goes on"),
        ({"chosen": "Yes.", "rejected": "No."}, "as texts they must begin with the same prompt"),
        ({"prompt": "2+2?", "chosen": [SYSTEM], "rejected": [BAD]}, "begins with another prompt"),
        ({"prompt": "2+2?", "chosen": "", "rejected": "5"}, "field 'chosen' is empty"),
    ],
)  # fmt: skip
def test_a_row_without_a_preference_is_refused_in_one_sentence(tmp_path: Path, row: dict, said: str):
    with pytest.raises(DataError) as caught:
        load(tmp_path, row)
    assert said in str(caught.value)
    assert "pairs.jsonl, line 1: " in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_names_are_mapped_and_other_forms_refused(tmp_path: Path):
    (found,) = load(
        tmp_path, {"q": "2+2?", "a": "4", "b": "5"}, columns={"prompt": "q", "chosen": "a", "rejected": "b"}
    )
    assert found.chosen == (GOOD,)
    with pytest.raises(DataError, match="line 2: has the form .*conversations.* where the rows before"):
        load(
            tmp_path,
            {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
            {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        )


def test_equal_answers_are_left_out_and_listed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    told: list[LeftOut] = []
    pairs = [{"prompt": "2+2?", "chosen": "4", "rejected": word} for word in ("5", "4 ", "6")]
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path, *pairs, left_out=told.append)) == 2
    assert "1 of the rows have the same answer as chosen and as rejected and are left out" in caplog.text
    assert [(each.place.rpartition("/")[2], each.reason) for each in told] == [
        ("pairs.jsonl, line 2", "chosen and rejected are the same")
    ]
    with pytest.raises(DataError, match="the same in every row"):
        load(tmp_path, {"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD]})


def test_embedded_pairs_end_in_a_right_and_a_wrong_answer_and_splits_share_no_prompt():
    task = PreferenceTask()
    train, test = (task.load(split, Source("embedded", 300)) for split in ("train", "test"))
    for pair in [*train, *test]:
        good, bad = (extract_answer(one.messages[-1]["content"]) for one in pair.conversations)
        assert good is not None
        assert bad is not None
        assert good != bad
    assert not {pair.identity for pair in train} & {pair.identity for pair in test}
    assert task.load("train", Source("embedded", 300)) == train != task.load("train", Source("embedded", 300, seed=1))
