"""Preferences: to one prompt an answer that was chosen and one that was rejected, as people have them.

Known are `prompt`, `chosen` and `rejected` as text or as messages; whole conversations as `chosen` and `rejected`, which
begin alike; and whole texts, with the marks "Human:" and "Assistant:" before each turn or without any. A file has one form
throughout.
"""

import logging
import os.path
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from pica.errors import DataError
from pica.tasks.base import Kind, Source, Split
from pica.tasks.chat import Conversation
from pica.tasks.messages import Message, message_list, read_message, read_tools, under_our_names
from pica.tasks.records import Record, read_records
from pica.tasks.wordproblems import generate, with_a_mistake

logger = logging.getLogger(__name__)

_ANSWERS = ("chosen", "rejected")
_PROMPTS = ("prompt", "question", "instruction", "query")
_EMBEDDED_COUNTS = {"train": 1000, "validation": 100, "test": 200}  # where the source sets no limit
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_TEXTS = "chosen/rejected as text"


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, of which the first is the better one.

    Attributes:
        prompt: The messages before the answers, or the text before them.
        chosen, rejected: The answers, as messages or as text like the prompt; they differ.
        tools: Descriptions of functions that the assistant may call, as templates take them.
        place: Where it stands ("pairs.jsonl, line 7"), for messages.
        form: What the form of its file is called.
        source: The data location that it is of, where there are several.
    """

    prompt: tuple[Message, ...] | str
    chosen: tuple[Message, ...] | str
    rejected: tuple[Message, ...] | str
    tools: tuple[Any, ...] = ()
    place: str = field(default="", compare=False)
    form: str = field(default="", compare=False)
    source: str = field(default="", compare=False)

    @property
    def identity(self) -> str:
        """The prompt: of two pairs that share it, one would tell what the other asks."""
        return _as_text(self.prompt)

    @property
    def conversations(self) -> tuple[Conversation, Conversation]:
        """The prompt with the chosen answer, and with the rejected one; only the answers are to be learnt."""
        return self._with(self.chosen), self._with(self.rejected)

    def _with(self, answer: tuple[Message, ...] | str) -> Conversation:
        if isinstance(self.prompt, str) or isinstance(answer, str):
            text = f"{_as_text(self.prompt)}{_as_text(answer)}"
            return Conversation(text=text, learnt_from=len(self.prompt), place=self.place, form=self.form)
        return Conversation((*self.prompt, *answer), "", self.tools, len(self.prompt), self.place, self.form)


class PreferenceTask:
    """Pairs from files, or embedded ones: word problems with a right solution and one that makes a mistake."""

    name = "preference"
    kind: Kind = "preference"
    subsets = ()
    has_embedded = True

    def load(self, split: Split, source: Source) -> list[Pair]:
        """Read one split; see `Task.load`. Pairs of two equal answers are left out: nothing can be learnt from them."""
        if source.location == "embedded":
            return _embedded(split, source.limit or _EMBEDDED_COUNTS[split], source.seed)
        names = {*field_names(), *source.columns.values()}
        records = read_records(source.location, split, names=names)[: source.limit]
        pairs, equal = list[Pair](), list[str]()
        for record in records:
            pair = _pair(under_our_names(record, source.columns))
            if pairs and pair.form != pairs[0].form:
                raise DataError(
                    f"{record.place}: has the form {pair.form!r}, where the rows before have the form {pairs[0].form!r}. A "
                    "file has one form; put the others into a file of their own."
                )
            if _as_text(pair.chosen).strip() == _as_text(pair.rejected).strip():
                equal.append(record.place)
                source.leave_out(record.place, pair.identity, "chosen and rejected are the same")
            else:
                pairs.append(pair)
        if not pairs:
            raise DataError(
                f"{source.location}: chosen and rejected are the same in every row, so nothing is preferred."
            )
        if equal:
            logger.warning(
                "%d of the rows have the same answer as chosen and as rejected and are left out, the first at %s",
                len(equal),
                equal[0],
            )
        return pairs


def field_names() -> set[str]:
    """The fields by which a table's header is told from its first row."""
    return {*_ANSWERS, *_PROMPTS, "system"}


def looks_like_preferences(fields: Mapping[str, Any]) -> bool:
    """Whether a row with these fields holds a preference."""
    return all(fields.get(name) is not None for name in _ANSWERS)


def described_pairs(pairs: Sequence[Pair]) -> str:
    """What was read, in one line."""
    count = len(pairs)
    forms = "`, `".join(dict.fromkeys(pair.form for pair in pairs))
    parts = [f"{count:,} pair{'s' if count != 1 else ''}", f"`{forms}`"]
    asked = [pair.prompt for pair in pairs if not isinstance(pair.prompt, str)]
    turns = [sum(message["role"] == "user" for message in prompt) for prompt in asked]
    if turns and set(turns) != {1}:
        parts.append(f"{mean(turns):.1f} questions on average")
    if share := sum(prompt[0]["role"] in ("system", "developer") for prompt in asked) / count:
        parts.append(f"{share:.0%} with a system prompt")
    return ", ".join(parts)


def _as_text(said: tuple[Message, ...] | str) -> str:
    return said if isinstance(said, str) else Conversation(said).identity


def _pair(record: Record) -> Pair:
    for name in _ANSWERS:
        if record.fields.get(name) is None:
            there = ", ".join(map(repr, record.fields)) or "no fields"
            raise DataError(
                f"{record.place}: a preference has {' and '.join(map(repr, _ANSWERS))}, and {name!r} is missing (the row "
                f"has {there}). If the file uses other names, map them with data.columns, for instance {{{name}: "
                "your_column}."
            )
    asked = next((name for name in _PROMPTS if record.fields.get(name) is not None), None)
    written = [_is_text(record.fields[name]) for name in _ANSWERS]
    if written[0] != written[1]:
        kinds = ["text" if text else "a list of messages" for text in written]
        raise DataError(f"{record.place}: 'chosen' is {kinds[0]} and 'rejected' {kinds[1]}; both must be alike.")
    if written[0] and asked is None:
        return _of_texts(record)
    answers = [_messages(record, name, "assistant") for name in _ANSWERS]
    if asked is None:
        return _of_conversations(record, answers, form="chosen/rejected conversations")
    form = f"{asked}/chosen/rejected as {'text' if written[0] else 'messages'}"
    prompt = _prompt(record, asked)
    if all(each[0]["role"] == "assistant" for each in answers):
        return _made(record, prompt, answers, form)
    if any(_said(each[: len(prompt)]) != _said(prompt) for each in answers):
        system = len(prompt) > 1 and prompt[0]["role"] == "system"
        if not system or any(_said(each[: len(prompt) - 1]) != _said(prompt[1:]) for each in answers):
            raise DataError(
                f"{record.place}: 'chosen' or 'rejected' begins with another prompt than {asked!r}; both answer "
                "one prompt."
            )
        answers = [[prompt[0], *each] for each in answers]  # the system prompt has a column of its own
    return _of_conversations(record, answers, form=form)


def _of_conversations(record: Record, both: Sequence[list[Message]], *, form: str) -> Pair:
    """The chosen and the rejected conversation, of which all that is alike at the beginning is the prompt."""
    chosen, rejected = both
    alike = 0
    while alike < min(len(chosen), len(rejected)) and _said(chosen[: alike + 1]) == _said(rejected[: alike + 1]):
        alike += 1
    if alike == len(chosen) == len(rejected):  # equal answers: the caller leaves the pair out
        alike -= 1
    rest = [chosen[alike:], rejected[alike:]]
    if not alike or any(each and each[0]["role"] != "assistant" for each in rest):
        raise DataError(
            f"{record.place}: the prompts of 'chosen' and 'rejected' differ (message {alike + 1}); both "
            "answer one prompt."
        )
    if not all(rest):
        raise DataError(
            f"{record.place}: one of 'chosen' and 'rejected' ends where the other goes on, without an answer."
        )
    return _made(record, chosen[:alike], rest, form)


def _made(record: Record, prompt: list[Message], answers: Sequence[list[Message]], form: str) -> Pair:
    ended = []
    for name, answer in zip(_ANSWERS, answers):
        while answer and answer[-1]["role"] != "assistant":
            answer = answer[:-1]  # nobody answers it
        if not answer:
            raise DataError(f"{record.place}: the assistant says nothing in {name!r}.")
        ended.append(tuple(answer))
    return Pair(tuple(prompt), ended[0], ended[1], tuple(read_tools(record)), record.place, form)


def _of_texts(record: Record) -> Pair:
    """Two whole texts: turns with marks, or two continuations of what they share."""
    chosen, rejected = (record.text(name) for name in _ANSWERS)
    if all(_TURN.match(text.lstrip("\n")) for text in (chosen, rejected)):
        return _of_conversations(record, [_turns(chosen), _turns(rejected)], form="Human:/Assistant: texts")
    shared = os.path.commonprefix((chosen, rejected))
    if (
        chosen != rejected
        and re.search(r"\w$", shared)
        and any(re.match(r"\w", t[len(shared) :]) for t in (chosen, rejected))
    ):
        shared = re.sub(r"\w+$", "", shared)  # not in the middle of a word
    shared = shared.rstrip()  # a space belongs to the word after it
    if not shared or not all(text[len(shared) :].strip() for text in (chosen, rejected)):
        if chosen.strip() != rejected.strip():
            raise DataError(
                f"{record.place}: the prompts of 'chosen' and 'rejected' differ: as texts they must begin with the same "
                "prompt, or have it in a column of its own, which data.columns can name as prompt."
            )
        shared = ""
    return Pair(shared, chosen[len(shared) :], rejected[len(shared) :], (), record.place, _TEXTS)


def _turns(text: str) -> list[Message]:
    parts = _TURN.split(text.lstrip("\n"))[1:]
    said = [{"role": _SPEAKERS[who], "content": words.strip()} for who, words in zip(parts[::2], parts[1::2])]
    return [message for message in said if message["content"] or message["role"] == "user"]


def _prompt(record: Record, name: str) -> list[Message]:
    system = record.text("system", required=False, filled=False).strip()
    messages = _messages(record, name, "user")
    if name == "instruction" and (context := record.text("input", required=False, filled=False).strip()):
        messages = [{"role": "user", "content": f"{messages[0]['content']}\n\n{context}"}]
    return [{"role": "system", "content": system}, *messages] if system else messages


def _messages(record: Record, name: str, role: str) -> list[Message]:
    """A field as messages: text is one of the given role."""
    value = record.fields[name]
    if _is_text(value):
        return [{"role": role, "content": record.text(name)}]
    turns = [value] if isinstance(value, Mapping) else message_list(record, name)
    return [read_message(record, turn, number) for number, turn in enumerate(turns, start=1)]


def _is_text(value: Any) -> bool:
    return not isinstance(value, (list, tuple, Mapping)) and not str(value).lstrip().startswith("[{")


def _said(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"].strip()) for message in messages]


def _embedded(split: Split, count: int, seed: int) -> list[Pair]:
    rng = random.Random(f"preference/{split}/{seed}")
    return [
        Pair(
            ({"role": "user", "content": problem.question},),
            ({"role": "assistant", "content": problem.solution},),
            ({"role": "assistant", "content": with_a_mistake(problem, rng)},),
            form="embedded word problems",
        )
        for problem in generate(split, count, seed=seed)
    ]
