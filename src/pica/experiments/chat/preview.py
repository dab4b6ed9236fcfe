"""What a model would see of conversations, before any training: the words that are learnt, lengths, and what is lost."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from pica.experiments.chat.rendering import Overflow, Renderer, Rows, cut_rows
from pica.experiments.encoding import IGNORED
from pica.tasks.chat import Conversation, with_system


@dataclass(frozen=True)
class Stretch:
    """A piece of text, and whether the loss is on it."""

    text: str
    learnt: bool


@dataclass(frozen=True)
class Preview:
    """What training would be given.

    Attributes:
        lengths: Tokens of each conversation, whole.
        learnt: Of them, those that the loss is on.
        rows: What `max_length` makes of them.
        duplicates: Places of conversations that are there twice, with the place of the first.
        shared: Places of conversations that are test conversations too.
        examples: (place, stretches) of the first few.
    """

    lengths: list[int]
    learnt: list[int]
    rows: Rows
    duplicates: list[tuple[str, str]]
    shared: list[str]
    examples: list[tuple[str, list[Stretch]]]

    def facts(self, max_length: int) -> dict[str, str]:
        """The numbers, by what they are called."""
        rows, total = self.rows, sum(self.lengths)
        found = {
            "tokens": f"{total:,}, of which {sum(self.learnt):,} are learnt ({sum(self.learnt) / max(1, total):.0%})",
            "length": f"{min(self.lengths):,} to {max(self.lengths):,} tokens, median {median(self.lengths):,.0f}",
            "rows": f"{len(rows.input_ids):,} of at most {max_length:,} tokens (trainer.max_length)",
        }
        for name, count, what in (
            ("cut off", rows.cut, "longer than max_length"),
            ("split", rows.split, "longer than max_length"),
            ("left out", rows.dropped, "longer than max_length"),
            ("empty", rows.empty, "with nothing to learn within max_length: left out"),
            (
                "duplicates",
                len(self.duplicates),
                "there twice: " + "; ".join(f"{b} = {a}" for b, a in self.duplicates[:3]),
            ),
            ("in the test", len(self.shared), "are test conversations too: " + ", ".join(self.shared[:3])),
        ):
            if count:
                found[name] = f"{count:,} {what}"
        return found


def preview(
    renderer: Renderer,
    train: Sequence[Conversation],
    test: Sequence[Conversation] = (),
    *,
    system: str | None = None,
    max_length: int,
    overflow: Overflow = "cut",
    examples: int = 3,
) -> Preview:
    """Look at conversations as training would.

    Args:
        renderer: With the model's tokenizer and template.
        train: What would be learnt.
        test: What would be measured on.
        system: A system prompt for those without one.
        max_length: Longest row.
        overflow: What becomes of longer conversations.
        examples: How many to show.
    Returns:
        Lengths, what is cut off and what stands twice, and the examples.
    Raises:
        DataError: The template refuses one, or nothing is left to learn.
    """
    given = [with_system(conversation, system) for conversation in train]
    tokens = [renderer.tokens(conversation) for conversation in given]
    first: dict[str, Conversation] = {}
    duplicates = []
    for conversation in train:
        before = first.setdefault(conversation.identity, conversation)
        if before is not conversation:  # a weight repeats the very same one, which is no duplicate
            duplicates.append((conversation.place, before.place))
    tested = {conversation.identity for conversation in test}
    return Preview(
        [len(ids) for ids, _ in tokens],
        [sum(label != IGNORED for label in labels) for _, labels in tokens],
        cut_rows(tokens, max_length=max_length, overflow=overflow),
        duplicates,
        [conversation.place for conversation in train if conversation.identity in tested],
        [(conversation.place, stretches(renderer, conversation)) for conversation in given[:examples]],
    )


def stretches(renderer: Renderer, conversation: Conversation) -> list[Stretch]:
    """The text of a conversation as the model sees it, in pieces that are learnt or not."""
    found = renderer.render(conversation)
    pieces, at = [], 0
    for begin, end in found.spans:
        pieces += [Stretch(found.text[at:begin], False), Stretch(found.text[begin:end], True)]
        at = end
    return [piece for piece in [*pieces, Stretch(found.text[at:], False)] if piece.text]
