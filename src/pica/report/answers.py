"""What a run's models answered, side by side, in a list that can be searched and put into another order."""

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from pica.files.output import json_text
from pica.report.page import entries
from pica.text import counted

MOST = 300
"""Entries of a page; of more, those whose loss changed most, or whose answer became right or wrong."""

_OWN = {"mean_reward", "predicted", "gold", "correct", "probabilities", "group", "prompt", "completion", "extracted"}
_LEARNT, _LOST, _RIGHT, _WRONG = "became right", "became wrong", "right before and after", "wrong before and after"

Rows = Sequence[Mapping[str, Any]]


@dataclass
class Entry:
    """One example and what became of it.

    Attributes:
        title: Its heading.
        place: Where it stands among the test examples, from 0.
        kind: What the reader may choose it by.
        change: Of the loss or error, below zero where it got better; 0 where only right and wrong are known.
        asked: What the models were given, as (role, text).
        wanted: What they should have said.
        said: (title, answer, whether it is right, or None) of each model.
        notes: Further sentences.
        opened: Whether it is shown whole at first.
    """

    title: str
    place: int
    kind: str
    change: float
    asked: list[tuple[str, str]]
    wanted: str
    said: list[tuple[str, str, bool | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    opened: bool = True


def answers_block(rows: Mapping[str, Rows], titles: Mapping[str, str]) -> tuple[str, Markup]:
    """Show the answers of a run.

    Args:
        rows: Lines of the predictions files by "base", "adapter" and "baseline"; the adapter's must be there.
        titles: What these are called.
    Returns:
        One sentence on what is shown, and the list.
    Raises:
        KeyError: A row lacks a field.
        TypeError: A field has another type.
        ValueError: The rows are not those of one run.
    """
    counts = {len(some) for some in rows.values()}
    if len(counts) > 1:
        raise ValueError(f"the predictions files have {' and '.join(map(str, sorted(counts)))} lines")
    first = rows["adapter"][0]
    chat, preference = "messages" in first, "chosen" in first
    made = [
        (_conversation if chat else _pair if preference else _answer)(
            place, {name: some[place] for name, some in rows.items()}, titles
        )
        for place in range(len(rows["adapter"]))
    ]
    chosen = _both_ends(made)
    left = f" {len(made) - len(chosen):,} between these are left out." if len(made) > len(chosen) else ""
    if preference:
        text = (
            f"{len(made):,} held-out pairs, by how much their loss changed: the worst and the best first. The reward of an "
            "answer is beta times how much likelier it has become, in nats."
        )
    elif chat:
        answered = sum(bool(entry.said) for entry in made)
        text = (
            f"{len(made):,} held-out conversations, {answered:,} of them with answers to the last question "
            "(`task.answers`), by how much their loss changed: the worst and the best first."
        )
    else:
        text = f"{counted(len(made), 'test problem')}; those whose answer became wrong or right come first."
    orders = {
        "turns": "worst and best in turn",
        "best": "best first",
        "worst": "worst first",
        "place": "as in the data",
    }
    kinds = [kind for kind in dict.fromkeys(entry.kind for entry in made) if kind]
    items = [(_shown(entry), entry.kind, entry.change, entry.place) for entry in chosen]
    return text + left, entries(items, kinds=kinds, orders=orders)


def _both_ends(made: list[Entry]) -> list[Entry]:
    """The worst, the best, the second worst ...: with answers and a change first, at most `MOST` in all."""
    found: list[Entry] = []
    for opened, changed in ((True, True), (True, False), (False, True), (False, False)):
        some = [entry for entry in made if entry.opened == opened and (entry.change != 0) == changed]
        if not changed:
            found += some
            continue
        ordered = sorted(some, key=lambda entry: -entry.change)
        half = (len(ordered) + 1) // 2
        worst, best = ordered[:half], ordered[half:][::-1]
        for index in range(half):
            found += worst[index : index + 1] + best[index : index + 1]
    return found[:MOST]


def _conversation(place: int, rows: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> Entry:
    row, base = rows["adapter"], rows.get("base")
    messages = row["messages"]
    if isinstance(messages, str):
        asked, wanted = [("text", messages)], ""
    else:
        asked = _said_by(messages[:-1])
        wanted = message_text(messages[-1])
    loss = _number(row["loss"])
    before = _number(base["loss"]) if base else loss
    notes = [f"Loss {_change(before, loss, base is not None)} over {row['tokens']:,} tokens"]
    right = (f"{_number(base['token_accuracy']):.0%} → " if base else "") + f"{_number(row['token_accuracy']):.0%}"
    notes.append(f"tokens right {right}")
    said: list[tuple[str, str, bool | None]] = [
        (titles[name], str(some["answer"]), None) for name, some in rows.items() if "answer" in some
    ]
    change = loss - before if base else loss
    kind = "with answers" if said else "without answers"
    title = f"Conversation {place + 1}"
    return Entry(title, place, kind, _finite(change), asked, wanted, said, notes, bool(said))


def _pair(place: int, rows: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> Entry:
    row, base = rows["adapter"], rows.get("base")
    asked = [("text", row["prompt"])] if isinstance(row["prompt"], str) else _said_by(row["prompt"])
    rewards = [f"{kind} {_number(row[f'{kind}_reward']):+.2f}" for kind in ("chosen", "rejected")]
    loss = _number(row["loss"])
    before = _number(base["loss"]) if base else loss
    notes = [f"Loss {_change(before, loss, base is not None)}", f"rewards: {', '.join(rewards)}"]
    kind = {True: "chosen preferred", False: "rejected preferred", None: "neither preferred"}[row["correct"]]
    said: list[tuple[str, str, bool | None]] = [
        ("chosen", _text_of(row["chosen"]), None),
        ("rejected", _text_of(row["rejected"]), None),
    ]
    said += [(titles[name], str(some["answer"]), None) for name, some in rows.items() if "answer" in some]
    return Entry(
        f"Pair {place + 1}",
        place,
        kind,
        _finite(loss - before if base else loss),
        asked,
        "",
        said,
        notes,
        "answer" in row,
    )


def _said_by(messages: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [(str(message["role"]), message_text(message)) for message in messages]


def _text_of(answer: Any) -> str:
    """A chosen or rejected answer, which is text or messages."""
    return answer if isinstance(answer, str) else "\n\n".join(text for _, text in _said_by(answer))


def _answer(place: int, rows: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> Entry:
    row, base = rows["adapter"], rows.get("base")
    if "prompt" in row:
        asked = [("prompt", str(row["prompt"]))]
    else:
        asked = [(name, str(value)) for name, value in row.items() if name not in _OWN]
    said = [(titles[name], _said(some), some.get("correct")) for name, some in rows.items()]
    entry = Entry(f"Problem {place + 1}", place, "", 0.0, asked, str(row["gold"]), said)
    if group := row.get("group"):
        entry.notes.append(str(group))
    if "mean_reward" in row:
        was = f"{_number(base['mean_reward']):.2f} → " if base and "mean_reward" in base else ""
        entry.notes.append(f"mean reward of sampled answers {was}{_number(row['mean_reward']):.2f}")
    if "correct" in row:
        was = base["correct"] if base else row["correct"]
        table = {(False, True): _LEARNT, (True, False): _LOST, (True, True): _RIGHT, (False, False): _WRONG}
        entry.kind = table[bool(was), bool(row["correct"])] if base else ("right" if row["correct"] else "wrong")
        entry.change = float(was) - float(row["correct"]) if base else 1.0 - float(row["correct"])
    else:
        error = abs(_number(row["predicted"]) - _number(row["gold"]))
        before = abs(_number(base["predicted"]) - _number(base["gold"])) if base else error
        entry.change = _finite(error - before if base else error)
        entry.notes.append(f"Error {_change(before, error, base is not None)}")
    return entry


def _said(row: Mapping[str, Any]) -> str:
    if "completion" in row:
        read = row["extracted"]
        return f"{str(row['completion']).strip()}\n(read as: {'nothing' if read is None else read})"
    predicted = row["predicted"]
    share = (row.get("probabilities") or {}).get(str(predicted))
    shown = f"{predicted:.4g}" if isinstance(predicted, float) else str(predicted)
    return shown if share is None else f"{shown} ({share:.1%})"


def message_text(message: Mapping[str, Any]) -> str:
    """What a message says: its text, its reasoning and its tool calls."""
    parts = [message.get(name) for name in ("reasoning_content", "thinking", "content", "tool_calls")]
    return "\n".join(part if isinstance(part, str) else json_text(part) for part in parts if part)


def _change(before: float, after: float, compared: bool) -> str:
    return f"{before:.3f} → {after:.3f} ({after - before:+.3f})" if compared else f"{after:.3f}"


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _shown(entry: Entry) -> Markup:
    parts = [_turns(entry.asked)]
    if entry.wanted:
        parts.append(Markup('<div class="turn wanted"><b>wanted</b><p>{}</p></div>').format(entry.wanted))
    columns = [
        Markup('<div class="said{}"><b>{}{}</b><p>{}</p></div>').format(
            "" if right is None else " right" if right else " wrong",
            title,
            "" if right is None else Markup(' <span class="mark">{}</span>').format("✓ right" if right else "✗ wrong"),
            text or "(nothing)",
        )
        for title, text, right in entry.said
    ]
    body = Markup("").join([*parts, Markup('<div class="beside">{}</div>').format(Markup("").join(columns))])
    notes = " · ".join([*([entry.kind] if entry.kind and not entry.kind.endswith("answers") else []), *entry.notes])
    if not entry.opened and entry.asked:  # closed, it should still be known again
        notes += f" · {textwrap.shorten(entry.asked[-1][1], 60, placeholder=' ...')}"
    return Markup("<details{}><summary><b>{}</b> <span>{}</span></summary>{}</details>").format(
        Markup(" open") if entry.opened else "", entry.title, notes, body
    )


def _turns(asked: Iterable[tuple[str, str]]) -> Markup:
    turn = Markup('<div class="turn"><b>{}</b><p>{}</p></div>')
    return Markup("").join(turn.format(role, text) for role, text in asked)
