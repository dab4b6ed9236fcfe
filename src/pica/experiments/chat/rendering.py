"""From a conversation to tokens, and which of them the loss is on: what the assistant says, and the mark that ends its turn.

A chat template is a program, and no two say where the assistant's words are. So they are found by what changes when they
change: a turn is rendered a second time with other words in it, and where the two texts differ, there it speaks. From
there the turn reaches back to where generation would begin, and on to the mark that ends it. That holds for templates that
trim, that move the system prompt, or that drop the reasoning of earlier turns.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from pica.errors import ConfigError, DataError
from pica.experiments.encoding import IGNORED
from pica.tasks.chat import Conversation, Message
from pica.text import first_line

logger = logging.getLogger(__name__)

Loss = Literal["assistant", "last", "all"]
Overflow = Literal["cut", "split", "drop"]

# Words that no one says. Two, so that the real ones differ from one of them at their first and at their last character.
_OTHERS = ("\ue00a\ue00b", "\ue00c\ue00d")


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model sees it.

    Attributes:
        text: The whole of it.
        spans: (first, end) of each stretch of characters that the loss is on, in order.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


@dataclass
class Rows:
    """Token sequences with their labels, and what became of conversations that were too long.

    Attributes:
        input_ids, labels: Of each row; labels are -100 where no loss is taken.
        owners: Index of the conversation that each row is of.
        cut, split, dropped: How many conversations were cut off, became several rows, or were left out.
        empty: How many had nothing to learn within their length.
    """

    input_ids: list[list[int]] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    cut: int = 0
    split: int = 0
    dropped: int = 0
    empty: int = 0


class Renderer:
    """Renders conversations with a tokenizer's chat template, and finds what is to be learnt of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, loss: Loss = "assistant") -> None:
        """`tokenizer` has the template that is to be used.

        Raises:
            ConfigError: The tokenizer cannot say where its tokens stand in a text.
        """
        if not tokenizer.is_fast:
            raise ConfigError(
                "This model's tokenizer does not tell where its tokens stand in a text, so the assistant's words cannot "
                "be found in it; convert it to a fast one."
            )
        self.tokenizer, self.loss = tokenizer, loss
        self._in_parts = False  # whether the template takes contents as lists of parts, as those of vision models do
        self._stops: tuple[str, ...] | None = None
        self._looked_for_tools = False

    @property
    def stops(self) -> tuple[str, ...]:
        """Special tokens that end the assistant's turn, in the middle of a conversation and at its end."""
        return self._find_form()

    def render(self, conversation: Conversation) -> Rendered:
        """Write a conversation as the template has it.

        Returns:
            Its text, and where in it the loss is.
        Raises:
            DataError: The template refuses the conversation, or its words cannot be found in what the template makes of it.
        """
        if not conversation.messages:
            return Rendered(conversation.text, ((conversation.learnt_from, len(conversation.text)),))
        stops = self.stops
        text = self._text(conversation, conversation.messages)
        self._look_for_tools(conversation, text)
        if self.loss == "all":
            return Rendered(text, ((0, len(text)),))
        spoken = [
            index
            for index, message in enumerate(conversation.messages)
            if message["role"] == "assistant" and index >= conversation.learnt_from
        ]
        if self.loss == "last":
            spoken = spoken[-1:]
        spans = [span for index in spoken if (span := self._span(conversation, index, text)) is not None]
        if any(one[1] > other[0] for one, other in pairwise(spans)):
            raise DataError(f"{conversation.place}: the chat template mixes the assistant's turns; leave this one out.")
        if not spans:
            raise DataError(f"{conversation.place}: the chat template leaves out all that the assistant says.")
        begin, end = spans[-1]
        if end == len(text.rstrip()) and not text[begin:end].endswith(stops):
            text = text[:end] + stops[0]  # a template that leaves this mark to the beginning of the next turn
            spans[-1] = begin, len(text)
        return Rendered(text, tuple(spans))

    def tokens(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """(ids, labels) of a conversation, of the same length; labels are -100 where no loss is taken."""
        found = self.render(conversation)
        encoded = self.tokenizer(
            found.text, add_special_tokens=not conversation.messages, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]  # pyright: ignore[reportArgumentType]
        labels = [IGNORED] * len(ids)
        for first, end in found.spans:
            for position, (begin, stop) in enumerate(offsets):  # pyright: ignore[reportArgumentType, reportGeneralTypeIssues]
                if first <= begin < stop <= end:
                    labels[position] = ids[position]
        ends = self.tokenizer.eos_token_id
        if not conversation.messages and ids and ids[-1] != ends and isinstance(ends, int):
            ids, labels = [*ids, ends], [*labels, ends]
        if labels:
            labels[0] = IGNORED  # nothing predicts it; in a packed row another conversation would
        return ids, labels

    def rows(
        self, conversations: Sequence[Conversation], *, max_length: int | None = None, overflow: Overflow = "cut"
    ) -> Rows:
        """Encode conversations.

        Args:
            conversations: What to encode.
            max_length: Longest row; None for no limit.
            overflow: What becomes of a longer conversation: it is cut off, split into several rows, or left out.
        Returns:
            All of them as rows of at most `max_length` tokens.
        Raises:
            DataError: As `render`, or nothing is left to learn.
        """
        return cut_rows(map(self.tokens, conversations), max_length=max_length, overflow=overflow)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """Ids of what comes before the assistant's answer to `messages`."""
        self._find_form()
        asked = Conversation(tuple(messages), tools=tuple(tools), place="The question")
        text = self._text(asked, messages, add_generation_prompt=True)
        encoded: Any = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])

    # ---- the assistant's words -------------------------------------------------------------------------------------

    def _text(self, conversation: Conversation, messages: Sequence[Message], **options: Any) -> str:
        given = {"tools": list(conversation.tools)} if conversation.tools else {}
        if self._in_parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **given, **options))
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            if isinstance(error, TypeError) and (written := _arguments_as_text(messages)) is not None:
                return self._text(conversation, written, **options)
            raise DataError(
                f"{conversation.place}: the model's chat template refuses this conversation: {first_line(error)}"
            ) from error

    def _look_for_tools(self, conversation: Conversation, text: str) -> None:
        """Say so, once, where the template leaves out the tools that may be called."""
        if not conversation.tools or self._looked_for_tools:
            return
        self._looked_for_tools = True
        if self._text(replace(conversation, tools=()), conversation.messages) == text:
            logger.warning(
                "%s: the chat template leaves out which tools there are, so the model is not told; another can be named "
                "with task.chat_template",
                conversation.place,
            )

    def _span(self, conversation: Conversation, index: int, text: str) -> tuple[int, int] | None:
        """(first, end) of what the assistant says in message `index`, as it would generate it; None if that is nothing."""
        messages = list(conversation.messages)
        first, end = len(text), 0
        for other in _OTHERS:
            changed = self._with_other_words(conversation, index, other)
            if other not in changed:
                return None  # a turn that the template leaves out
            begin = _common(text, changed)
            first = min(first, begin)
            end = max(end, len(text) - _common(text[begin:][::-1], changed[begin:][::-1]))
        end = max(first, end)
        begin = self._generation_begins(conversation, index, text, first)
        told = messages[index + 1]["content"] if index + 1 < len(messages) else ""
        if told.strip() and messages[index + 1]["role"] == "tool" and told.strip() in text[first:end]:
            # templates that read ahead put what the tool says into the assistant's turn
            end = min(end, _common(text, self._text(conversation, messages[: index + 1])))
        if (name := self._left_out_call(conversation, index)) is not None:
            raise DataError(
                f"{conversation.place}: message {index + 1} calls {name!r}, and the chat template leaves tool calls "
                "out; name another with task.chat_template."
            )
        end = self._turn_ends(conversation, text, end)
        return (begin, end) if end > begin else None

    def _with_other_words(self, conversation: Conversation, index: int, other: str) -> str:
        """The conversation's text with `other` in place of what the assistant says in message `index`."""
        messages, message = list(conversation.messages), conversation.messages[index]
        messages[index] = {"role": "assistant", "content": other}
        try:
            return self._text(conversation, messages)
        except DataError:  # a template that wants the call before a tool's answer
            if not message.get("tool_calls"):
                raise
        calls = [{**call, "function": {**call.get("function", call), "name": other}} for call in message["tool_calls"]]
        messages[index] = {"role": "assistant", "content": "", "tool_calls": calls}
        return self._text(conversation, messages)

    def _left_out_call(self, conversation: Conversation, index: int) -> str | None:
        """The first call of message `index` that the template leaves out: under another name it would not be seen."""
        messages, message = list(conversation.messages), conversation.messages[index]
        calls, other = list(message.get("tool_calls") or ()), _OTHERS[0]
        for at, call in enumerate(calls):
            function = call.get("function", call)
            renamed = {**call, "function": {**function, "name": other}}
            messages[index] = {**message, "tool_calls": [*calls[:at], renamed, *calls[at + 1 :]]}
            if other not in self._text(conversation, messages):
                return str(function.get("name", ""))
        return None

    def _generation_begins(self, conversation: Conversation, index: int, text: str, first: int) -> int:
        """Where generation would begin: before marks (such as empty think blocks) that the template adds to the words."""
        before = conversation.messages[:index]
        try:
            asked = self._text(conversation, before, add_generation_prompt=True)
            plain = self._text(conversation, before) if before else ""
        except DataError:  # a template that takes whole conversations only
            return first
        if not text.startswith(plain):
            return first
        common = _common(text, asked)
        return min(first, common) if common > len(plain) else first

    def _turn_ends(self, conversation: Conversation, text: str, end: int) -> int:
        """The end with the mark that ends the turn."""
        if not self.stops:
            raise DataError(
                f"{conversation.place}: the chat template puts none of the tokenizer's marks after the assistant's words, "
                "so the model could not learn to stop; name another with task.chat_template."
            )
        if text[:end].rstrip().endswith(self.stops):
            return end
        rest = text[end:]
        blank = len(rest) - len(rest.lstrip())
        stop = next((stop for stop in self.stops if rest.startswith(stop, blank)), None)
        return end if stop is None else end + blank + len(stop)

    def _find_form(self) -> tuple[str, ...]:
        """Find out, once, in which form the template takes contents, and which marks end a turn; returns the marks."""
        if self._stops is not None:
            return self._stops
        words = "\ue00e"
        tokenizer: Any = self.tokenizer
        marks = sorted(map(str, tokenizer.get_added_vocab()), key=len, reverse=True)
        asked, spoken = {"role": "user", "content": "?"}, {"role": "assistant", "content": words}
        probe = Conversation((asked, spoken, asked, spoken), place="Two questions with two answers")
        try:
            text = self._text(probe, probe.messages)
        except DataError:
            text = ""
        if words not in text:
            self._in_parts = True
            text = self._text(probe, probe.messages)
        found: list[str] = []
        for rest in text.split(words)[1:]:
            found += [mark for mark in marks if rest.lstrip().startswith(mark)][:1]
        end = self.tokenizer.eos_token
        self._stops = tuple(dict.fromkeys([*found, *([end] if isinstance(end, str) and found else [])]))
        return self._stops


def cut_rows(
    tokens: Iterable[tuple[list[int], list[int]]], *, max_length: int | None = None, overflow: Overflow = "cut"
) -> Rows:
    """Make rows of conversations whose `Renderer.tokens` are there already.

    Returns:
        As `Renderer.rows`.
    Raises:
        DataError: Nothing is left to learn.
    """
    rows, owner = Rows(), -1
    for owner, (ids, labels) in enumerate(tokens):
        too_long = max_length is not None and len(ids) > max_length
        if too_long and overflow == "drop":
            rows.dropped += 1
            continue
        step = max_length or max(1, len(ids))
        starts = range(0, len(ids), step) if too_long and overflow == "split" else (0,)
        parts = [(ids[at : at + step], labels[at : at + step]) for at in starts]
        parts = [(i, [IGNORED, *lab[1:]]) for i, lab in parts if any(one != IGNORED for one in lab[1:])]
        rows.cut += too_long and overflow == "cut"
        rows.split += too_long and overflow == "split"
        rows.empty += not parts
        for some_ids, some_labels in parts:
            rows.input_ids.append(some_ids)
            rows.labels.append(some_labels)
            rows.owners.append(owner)
    if not rows.input_ids:
        raise DataError(
            f"None of the {owner + 1} conversations has anything to learn within trainer.max_length = "
            f"{max_length} tokens; raise it, or set trainer.overflow to split."
        )
    return rows


def _arguments_as_text(messages: Sequence[Message]) -> list[Message] | None:
    """The messages with the arguments of tool calls as JSON text, for templates that want it so; None if they are."""
    changed = False
    written = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls") or ():
            function = call.get("function")
            if isinstance(function, dict) and not isinstance(function.get("arguments", ""), str):
                call = {
                    **call,
                    "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)},
                }
                changed = True
            calls.append(call)
        written.append({**message, "tool_calls": calls} if calls else message)
    return written if changed else None


def _common(one: str, other: str) -> int:
    """Length of the beginning that two texts share."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # bisection: comparing slices is many times faster than a loop over characters
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
