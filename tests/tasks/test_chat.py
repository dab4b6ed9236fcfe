"""Conversations as people have them: every form, and what is said of rows that have none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pica.errors import DataError
from pica.tasks.base import Source
from pica.tasks.chat import ChatTask, Conversation, described, looks_like_chat, with_system

ASKED, ANSWERED = {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}


def load(folder: Path, *rows: dict, columns: dict | None = None, name: str = "chats.jsonl") -> list[Conversation]:
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return ChatTask().load("train", Source(str(path), columns=columns or {}))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, ANSWERED]},
        {"conversations": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}]},
        {"conversation": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]},
        {"prompt": "Hello?", "completion": "Hi."},
        {"prompt": [ASKED], "completion": [ANSWERED]},
        {"instruction": "Hello?", "input": "", "output": "Hi."},
        {"instruction": "Hello?", "response": "Hi."},
        {"question": "Hello?", "answer": "Hi."},
        {"query": "Hello?", "response": "Hi."},
        {"input": "Hello?", "output": "Hi."},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}, {**ANSWERED, "name": None}]},
    ],
    ids=lambda row: "+".join(row),
)
def test_each_form_gives_the_same_conversation(tmp_path: Path, row: dict):
    (found,) = load(tmp_path, row)
    assert found.messages == (ASKED, ANSWERED)
    assert found.turns == 1
    assert found.place.endswith("chats.jsonl, line 1")


def test_alpaca_input_follows_the_instruction_and_system_prompts_come_first(tmp_path: Path):
    (found,) = load(tmp_path, {"system": "Be brief.", "instruction": "Add.", "input": "1 and 2", "output": "3"})
    assert [m["content"] for m in found.messages] == ["Be brief.", "Add.\n\n1 and 2", "3"]
    (found,) = load(
        tmp_path, {"system": "S", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    )
    assert found.messages[0] == {"role": "system", "content": "S"}


def test_a_table_and_other_names(tmp_path: Path):
    path = tmp_path / "chats.csv"
    path.write_text("frage,antwort\nHello?,Hi.\n", encoding="utf-8")
    (found,) = ChatTask().load("train", Source(str(path), columns={"prompt": "frage", "completion": "antwort"}))
    assert found.messages == (ASKED, ANSWERED)
    with pytest.raises(
        DataError, match=r"line 1: data.columns names 'fragen', which the row does not have .*'question'"
    ):
        load(tmp_path, {"question": "a", "answer": "b"}, columns={"prompt": "fragen"})


def test_only_the_completion_of_a_prompt_is_to_be_learnt(tmp_path: Path):
    earlier = {"role": "assistant", "content": "Hm?"}
    (found,) = load(tmp_path, {"prompt": [ASKED, earlier, ASKED], "completion": [ANSWERED]})
    assert found.learnt_from == 3
    assert with_system(found, "S").learnt_from == 4
    (other,) = load(tmp_path, {"messages": [ASKED, earlier, ASKED, ANSWERED]})
    assert other.learnt_from == 0


def test_tool_calls_are_kept_and_their_arguments_are_objects(tmp_path: Path):
    call = {"type": "function", "function": {"name": "get", "arguments": '{"city": "Rome"}'}}
    rows = {
        "messages": [
            ASKED,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "sun"},
            ANSWERED,
        ],
        "tools": json.dumps([{"type": "function", "function": {"name": "get"}}]),
    }
    (found,) = load(tmp_path, rows)
    assert found.messages[1]["content"] == ""
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Rome"}
    assert found.tools[0]["function"]["name"] == "get"


def test_what_nobody_answers_is_left_out_at_the_end(tmp_path: Path):
    (found,) = load(tmp_path, {"messages": [ASKED, ANSWERED, ASKED]})
    assert found.messages == (ASKED, ANSWERED)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"message": [ASKED, ANSWERED]},
            "line 2: no conversation: the row has 'message'. The nearest form is 'messages'",
        ),
        ({"chosen": "a", "rejected": "b"}, "these are preferences"),
        ({"a": 1}, "Known forms: messages, conversations"),
        ({"messages": "Hello?"}, "field 'messages' must be a list of messages"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "message 1 has the role 'narrator'; known are system"),
        ({"messages": [{"content": "x"}]}, "message 1 is no object with `role` and `content`"),
        ({"messages": [ASKED]}, "the assistant says nothing"),
        ({"messages": [ASKED, {"role": "assistant", "content": " "}]}, "message 2 is empty"),
        ({"messages": [ASKED, {"role": "assistant", "content": 5}]}, "content of message 2 must be text, found int"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "message 1 holds image; only text",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_wrong_is_said_with_its_line(tmp_path: Path, row: dict, said: str):
    rows = [row] if "line 2" not in said else [{"messages": [ASKED, ANSWERED]}, row]
    expected = said.replace(
        "line 2: no conversation: the row has 'message'. The nearest form is 'messages'", "line 2: has no form"
    )
    with pytest.raises(DataError) as caught:
        load(tmp_path, *rows)
    assert expected in str(caught.value)
    assert f"line {len(rows)}" in str(caught.value)


def test_a_file_has_one_form(tmp_path: Path):
    with pytest.raises(
        DataError, match="line 2: has the form 'question/answer', where the rows before have the form 'messages'"
    ):
        load(tmp_path, {"messages": [ASKED, ANSWERED]}, {"question": "a", "answer": "b"})
    with pytest.raises(DataError, match="line 1: no conversation.*The nearest form is 'messages', with 'messages'"):
        load(tmp_path, {"mesages": []})


def test_what_was_read_is_said(tmp_path: Path):
    system = {"role": "system", "content": "S"}
    found = load(tmp_path, {"messages": [ASKED, ANSWERED]}, {"messages": [system, ASKED, ANSWERED, ASKED, ANSWERED]})
    assert described(found) == "2 conversations, `messages`, 1.5 turns on average, 50% with a system prompt"
    asked = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"},
    ]
    found = load(tmp_path, {"messages": asked})
    assert [len(one.messages) for one in found] == [2]
    assert described(found).endswith("one turn each, 1 of which the last words are left out, as nobody answers them")
    assert described(load(tmp_path, {"text": "abcd"})) == "1 texts, `text`, 4 characters on average"


def test_the_same_conversation_is_the_same_and_no_other_is(tmp_path: Path):
    one, same, other = load(
        tmp_path,
        {"messages": [ASKED, ANSWERED]},
        {"messages": [ASKED, {**ANSWERED, "content": "Hi. "}]},
        {"messages": [ASKED, {**ANSWERED, "content": "Ho."}]},
    )
    assert one.identity == same.identity != other.identity


def test_which_rows_look_like_conversations():
    assert looks_like_chat({"messages": []})
    assert looks_like_chat({"instruction": "a", "output": "b"})
    assert not looks_like_chat({"instruction": "a", "input": "", "output": "b", "answer": "2"})  # arithmetic
    assert not looks_like_chat({"sentence": "a", "label": 1})
