"""Conversations as people have them: which form a file's rows have, and each row as one list of messages.

Six forms are known: `messages`; `prompt` and `completion`, as text or as messages; ShareGPT's `conversations`; Alpaca's
`instruction`, `input` and `output`; pairs such as `question` and `answer`; and plain `text`. A file has one form throughout.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from statistics import mean
from typing import Any

from pica.errors import DataError
from pica.tasks.base import Kind, Source, Split
from pica.tasks.messages import Message, message_list, read_message, read_tools, under_our_names
from pica.tasks.records import Record, read_records

_PAIRS = (
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("prompt", "response"),
    ("input", "output"),
    ("user", "assistant"),
)


@dataclass(frozen=True)
class Conversation:
    """One conversation, or one plain text.

    Attributes:
        messages: What is said, the last word the assistant's; empty for a plain text.
        text: The plain text, where that is all there is.
        tools: Descriptions of functions that the assistant may call, as templates take them.
        learnt_from: Index of the first message (of a text, the first character) that may be learnt: what comes before
            belongs to a `prompt`.
        place: Where it stands ("chats.jsonl, line 7"), for messages.
        form: What the form of its file is called.
        source: The data location that it is of, where there are several.
        unanswered: Messages at its end that nobody answers, and that are left out.
    """

    messages: tuple[Message, ...] = ()
    text: str = ""
    tools: tuple[Any, ...] = ()
    learnt_from: int = 0
    place: str = field(default="", compare=False)
    form: str = field(default="", compare=False)
    source: str = field(default="", compare=False)
    unanswered: int = field(default=0, compare=False)

    @property
    def identity(self) -> str:
        """What makes two conversations the same: everything that is said in them."""
        return self.text or "\n".join(f"{m['role']}: {json.dumps(_said(m), sort_keys=True)}" for m in self.messages)

    @property
    def turns(self) -> int:
        """How often the assistant speaks."""
        return sum(message["role"] == "assistant" for message in self.messages)


@dataclass(frozen=True)
class Form:
    """One way in which rows hold conversations.

    Attributes:
        name: What it is called in messages.
        fields: The fields that a row of this form has at least.
        read: From a row to its conversation.
    """

    name: str
    fields: tuple[str, ...]
    read: Callable[[Record], Conversation]


class ChatTask:
    """Conversations from files; what is learnt is what the assistant says. See `Conversation`."""

    name = "chat"
    kind: Kind = "chat"
    subsets = ()
    has_embedded = False

    def load(self, split: Split, source: Source) -> list[Conversation]:
        """Read one split; see `Task.load`. Conversations are those of the file, in its order."""
        if source.location == "embedded":
            raise DataError("Task chat has no embedded conversations; set data.train to a file of yours.")
        names = {*field_names(), *source.columns.values()}
        records = read_records(source.location, split, names=names)[: source.limit]
        records = [under_our_names(record, source.columns) for record in records]
        form = form_of(records)
        return [replace(form.read(record), form=form.name) for record in records]


def field_names() -> set[str]:
    """The fields by which a table's header is told from its first row."""
    return {name for form in FORMS for name in form.fields}


def form_of(records: Sequence[Record]) -> Form:
    """Recognise how the rows of a file are written.

    Args:
        records: All rows, at least one.
    Returns:
        The form that all of them have.
    Raises:
        DataError: A row has another form than the first one, or none that is known; names its line and the nearest form.
    """
    first = _form(records[0])
    if first is None:
        raise DataError(f"{records[0].place}: {_unknown(records[0].fields)}")
    for record in records[1:]:
        if not _fits(record, first):
            other = _form(record)
            what = "has no form that is known" if other is None else f"has the form {other.name!r}"
            raise DataError(
                f"{record.place}: {what}, where the rows before have the form {first.name!r}. A file has one form; put "
                "the others into a file of their own."
            )
    return first


def looks_like_chat(fields: Mapping[str, Any]) -> bool:
    """Whether a row with these fields holds a conversation, and nothing that another task would read."""
    form = _form(Record(dict(fields), ""))
    return form is not None and not (form.name == "alpaca" and fields.get("answer") is not None)


def described(conversations: Sequence[Conversation]) -> str:
    """What was read, in one line."""
    count, form = len(conversations), "`, `".join(dict.fromkeys(one.form for one in conversations))
    if all(not one.messages for one in conversations):
        return f"{count:,} texts, `{form}`, {mean(len(one.text) for one in conversations):,.0f} characters on average"
    parts = [f"{count:,} conversation{'s' if count != 1 else ''}", f"`{form}`"]
    turns = mean(one.turns for one in conversations)
    parts.append("one turn each" if all(one.turns == 1 for one in conversations) else f"{turns:.1f} turns on average")
    for what, has in (
        ("a system prompt", lambda one: one.messages[0]["role"] in ("system", "developer")),
        ("tools", lambda one: bool(one.tools) or any("tool_calls" in message for message in one.messages)),
    ):
        if share := sum(map(has, conversations)) / count:
            parts.append(f"{share:.0%} with {what}")
    if open_ended := sum(one.unanswered > 0 for one in conversations):
        parts.append(f"{open_ended:,} of which the last words are left out, as nobody answers them")
    return ", ".join(parts)


def with_system(conversation: Conversation, system: str | None) -> Conversation:
    """The conversation with a system prompt, where it has none of its own."""
    messages = conversation.messages
    if not system or not messages or messages[0]["role"] in ("system", "developer"):
        return conversation
    messages = ({"role": "system", "content": system}, *messages)
    return replace(conversation, messages=messages, learnt_from=conversation.learnt_from + 1)


# ---- forms -----------------------------------------------------------------------------------------------------------


def _messages(record: Record) -> Conversation:
    return _conversation(record, message_list(record, "messages"), learnt_from=0)


def _share_gpt(record: Record) -> Conversation:
    name = "conversations" if "conversations" in record.fields else "conversation"
    turns = message_list(record, name)
    said = [
        {"role": turn.get("from"), "content": turn.get("value"), **_rest(turn)} if "from" in turn else turn
        for turn in turns
    ]
    if isinstance(system := record.fields.get("system"), str) and system.strip():
        said = [{"role": "system", "content": system}, *said]
    return _conversation(record, said, learnt_from=0)


def _rest(turn: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in turn.items() if key not in ("from", "value")}


def _prompt_completion(record: Record) -> Conversation:
    prompt, completion = _turns(record, "prompt", "user"), _turns(record, "completion", "assistant")
    return _conversation(record, [*prompt, *completion], learnt_from=len(prompt))


def _turns(record: Record, name: str, role: str) -> list[Message]:
    value = record.fields[name]
    return [{"role": role, "content": record.text(name)}] if isinstance(value, str) else message_list(record, name)


def _alpaca(record: Record) -> Conversation:
    asked = record.text("instruction")
    if context := record.text("input", required=False, filled=False).strip():
        asked = f"{asked}\n\n{context}"
    system = record.text("system", required=False, filled=False).strip()
    return _pair(record, asked, record.text("output", "response"), system)


def _pair(record: Record, asked: str, answered: str, system: str = "") -> Conversation:
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return _conversation(
        record, [{"role": "system", "content": system}, *messages] if system else messages, learnt_from=0
    )


def _pair_of(question: str, answer: str) -> Form:
    def read(record: Record) -> Conversation:
        system = record.text("system", required=False, filled=False).strip()
        return _pair(record, record.text(question), record.text(answer), system)

    return Form(f"{question}/{answer}", (question, answer), read)


def _text(record: Record) -> Conversation:
    return Conversation(text=record.text("text"), place=record.place)


FORMS: tuple[Form, ...] = (
    Form("messages", ("messages",), _messages),
    Form("conversations", ("conversations",), _share_gpt),
    Form("conversation", ("conversation",), _share_gpt),
    Form("prompt/completion", ("prompt", "completion"), _prompt_completion),
    Form("alpaca", ("instruction", "output"), _alpaca),
    Form("alpaca", ("instruction", "response"), _alpaca),
    *(_pair_of(question, answer) for question, answer in _PAIRS),
    Form("text", ("text",), _text),
)
"""All forms, those with more to tell them by first."""


def _form(record: Record) -> Form | None:
    return next((form for form in FORMS if _fits(record, form)), None)


def _fits(record: Record, form: Form) -> bool:
    return all(record.fields.get(name) is not None for name in form.fields)


def _unknown(fields: Mapping[str, Any]) -> str:
    if {"chosen", "rejected"} <= fields.keys():
        return "these are preferences (chosen and rejected), not conversations: learn from them with task preference."
    names = [name for form in FORMS for name in form.fields]
    there = ", ".join(map(repr, fields)) or "no fields"
    for name in fields:
        if near := get_close_matches(name, names, n=1):
            form = next(form for form in FORMS if near[0] in form.fields)
            wanted = " and ".join(map(repr, form.fields))
            return f"no conversation: the row has {there}. The nearest form is {form.name!r}, with {wanted}."
    forms = ", ".join(dict.fromkeys(form.name for form in FORMS))
    return (
        f"no conversation: the row has {there}. Known forms: {forms}. If the file uses other names, map them with "
        "data.columns, for instance {prompt: your_question, completion: your_answer}."
    )


def _conversation(record: Record, turns: Sequence[Any], *, learnt_from: int) -> Conversation:
    messages = [read_message(record, turn, number) for number, turn in enumerate(turns, start=1)]
    given = len(messages)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not any(message["role"] == "assistant" for message in messages[learnt_from:]):
        raise DataError(f"{record.place}: the assistant says nothing, so there is nothing to learn.")
    return Conversation(
        tuple(messages),
        tools=tuple(read_tools(record)),
        learnt_from=learnt_from,
        place=record.place,
        unanswered=given - len(messages),
    )


def _said(message: Message) -> Any:
    calls = message.get("tool_calls")
    return [message["content"].strip(), calls] if calls else message["content"].strip()
