"""Messages of a conversation as files have them: who speaks, what is said, and which tools are called."""

import json
from collections.abc import Mapping
from typing import Any

from pica.errors import DataError
from pica.tasks.records import Record

Message = dict[str, Any]
"""`role` and `content`, and what templates know beside them (`tool_calls`, `reasoning_content`, ...)."""

ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


def under_our_names(record: Record, columns: Mapping[str, str]) -> Record:
    """Give a row the names that the forms know.

    Returns:
        The row, without the fields that had other names.

    Raises:
        DataError: The row has no such field.
    """
    if not columns:
        return record
    if missing := next((theirs for theirs in columns.values() if theirs not in record.fields), None):
        there = ", ".join(map(repr, record.fields)) or "no fields"
        raise DataError(
            f"{record.place}: data.columns names {missing!r}, which the row does not have (it has {there})."
        )
    taken = set(columns.values())
    kept = {name: value for name, value in record.fields.items() if name not in taken}
    return Record({**kept, **{ours: record.fields[theirs] for ours, theirs in columns.items()}}, record.place)


def read_message(record: Record, turn: Any, number: int) -> Message:
    """Read one message; `number`, from 1, is said of a wrong one.

    Returns:
        It, with a role of `ROLES` and text as its content.

    Raises:
        DataError: It is none, or holds more than text, or the assistant says nothing in it.
    """
    if not isinstance(turn, Mapping) or "role" not in turn:
        raise DataError(f"{record.place}: message {number} is no object with `role` and `content`.")
    role = _OTHER_NAMES.get(str(turn["role"]).lower(), str(turn["role"]).lower())
    if role not in ROLES:
        raise DataError(
            f"{record.place}: message {number} has the role {turn['role']!r}; known are {', '.join(ROLES)}."
        )
    message: Message = {"role": role, "content": _content(record, turn, number)}
    for key, value in turn.items():
        if key not in ("role", "content") and value is not None:  # tables fill what a row lacks with nulls
            message[key] = [_call(record, call, number) for call in value] if key == "tool_calls" else value
    if not message["content"].strip() and role == "assistant" and not message.get("tool_calls"):
        raise DataError(f"{record.place}: message {number} is empty, so that the assistant would learn to say nothing.")
    return message


def _content(record: Record, turn: Mapping[str, Any], number: int) -> str:
    content = turn.get("content")
    if content is None:
        return ""
    if isinstance(content, (list, tuple)):  # parts, as multimodal templates have them
        kinds = {part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content}
        if kinds - {"text"}:
            other = ", ".join(sorted(map(str, kinds - {"text"})))
            raise DataError(f"{record.place}: message {number} holds {other}; only text can be learnt.")
        content = "".join(str(part["text"]) for part in content)
    if not isinstance(content, str):
        raise DataError(
            f"{record.place}: the content of message {number} must be text, found {type(content).__name__}."
        )
    return content


def _call(record: Record, call: Any, number: int) -> Any:
    """A tool call with its arguments as an object: templates write them as JSON themselves."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except ValueError:
            raise DataError(
                f"{record.place}: the tool call in message {number} has arguments that are no JSON."
            ) from None
        return {**call, "function": {**function, "arguments": arguments}}
    return call


def message_list(record: Record, name: str) -> list[Any]:
    """Read a field that holds messages, as a list or as JSON text.

    Returns:
        One or more of them, which are not looked at.

    Raises:
        DataError: It is no list, or an empty one.
    """
    value = _parsed(record.fields[name])
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"{record.place}: field {name!r} must be a list of messages.")
    return list(value)


def read_tools(record: Record) -> list[Any]:
    """Read the field `tools`.

    Returns:
        Descriptions of functions that the assistant may call; none where there is no such field.

    Raises:
        DataError: It is no list.
    """
    value = _parsed(record.fields.get("tools"))
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{record.place}: field 'tools' must be a list of function descriptions.")
    return list(value)


def _parsed(value: Any) -> Any:
    """A list that a table keeps as JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value
