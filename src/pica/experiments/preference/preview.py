"""What a model would see of pairs, before any training: the answers that are learnt from, lengths, and what is lost."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from pica.experiments.chat.preview import Stretch, stretches
from pica.experiments.chat.rendering import Renderer
from pica.experiments.preference.encoding import PairRows, cut_pairs, lost_pairs, pair_tokens
from pica.tasks.chat import with_system
from pica.tasks.preference import Pair


@dataclass(frozen=True)
class PairPreview:
    """What training would be given.

    Attributes:
        pairs: What would be learnt.
        rows: What `max_length` makes of them.
        lengths: Tokens of prompt and chosen answer, and of prompt and rejected answer, of each pair, whole.
        shared: Places of pairs whose prompt is in the test part too.
        examples: (place, stretches) of the first few, chosen and rejected in turn.
    """

    pairs: Sequence[Pair]
    rows: PairRows
    lengths: list[tuple[int, int]]
    shared: list[str]
    examples: list[tuple[str, list[Stretch]]]

    def facts(self, max_length: int) -> dict[str, str]:
        """The numbers, by what they are called."""
        found = {}
        for at, name in enumerate(("chosen", "rejected")):
            some = [lengths[at] for lengths in self.lengths]
            found[name] = f"{min(some):,} to {max(some):,} tokens with the prompt, median {median(some):,.0f}"
        found["rows"] = f"{len(self.rows.owners):,} pairs of at most {max_length:,} tokens (trainer.max_length)"
        if said := lost_pairs(self.rows, self.pairs, max_length):
            found["too long"] = "; ".join(said)
        if self.shared:
            found["in the test"] = f"{len(self.shared):,} have a prompt of the test pairs: " + ", ".join(
                self.shared[:3]
            )
        return found


def preview_pairs(
    renderer: Renderer,
    train: Sequence[Pair],
    test: Sequence[Pair] = (),
    *,
    system: str | None = None,
    max_length: int,
    overflow: Literal["cut", "drop"] = "cut",
    examples: int = 3,
) -> PairPreview:
    """Look at pairs as training would.

    Args:
        renderer: With the model's tokenizer and template.
        train: What would be learnt.
        test: What would be measured on.
        system: A system prompt for those without one.
        max_length: Longest sequence.
        overflow: What becomes of longer ones.
        examples: How many to show.

    Returns:
        What was found.

    Raises:
        DataError: The template refuses one, or nothing is left to learn.
    """
    tokens = [pair_tokens(renderer, pair, system=system) for pair in train]
    whole = cut_pairs(tokens)
    tested = {pair.identity for pair in test}
    shown = [
        (f"{pair.place or f'pair {number}'}, {name}", stretches(renderer, with_system(conversation, system)))
        for number, pair in enumerate(train[:examples], start=1)
        for name, conversation in zip(("chosen", "rejected"), pair.conversations)
    ]
    return PairPreview(
        train,
        cut_pairs(tokens, max_length=max_length, overflow=overflow),
        [(len(chosen), len(rejected)) for (chosen, _), (rejected, _) in zip(whole.chosen, whole.rejected)],
        [pair.place for pair in train if pair.identity in tested],
        shown,
    )
