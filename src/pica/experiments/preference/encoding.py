"""Pairs of answers as tokens, and as the batches that TRL's `DPOTrainer` takes."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import datasets
import torch

from pica.errors import DataError
from pica.experiments.batches import attended, padded
from pica.experiments.chat.rendering import Renderer
from pica.experiments.encoding import IGNORED
from pica.tasks.chat import with_system
from pica.tasks.preference import Pair

Sequences = tuple[list[int], list[int]]
"""Ids and labels of the prompt with one answer; labels are -100 on the prompt."""


@dataclass
class PairRows:
    """The tokens of pairs, and what became of those that were too long.

    Attributes:
        chosen, rejected: Of each row.
        owners: Index of the pair that each row is of.
        cut: How many pairs were cut off.
        dropped: How many were left out since they are longer than the limit (`overflow` drop).
        empty: Indices of those left out since the limit leaves nothing in which the two answers differ.
    """

    chosen: list[Sequences] = field(default_factory=list)
    rejected: list[Sequences] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    cut: int = 0
    dropped: int = 0
    empty: list[int] = field(default_factory=list)

    @cached_property
    def digest(self) -> bytes:
        """Of the tokens, by which the same pairs encoded anew are known. Taken once, when no more rows are added."""
        return hashlib.sha256(json.dumps([self.chosen, self.rejected]).encode()).digest()


def pair_rows(
    renderer: Renderer,
    pairs: Sequence[Pair],
    *,
    system: str | None = None,
    max_length: int | None = None,
    overflow: Literal["cut", "drop"] = "cut",
) -> PairRows:
    """Render pairs, each sequence of at most `max_length` tokens.

    Args:
        renderer: With the model's tokenizer and template.
        pairs: What to render.
        system: A system prompt for those without one.
        max_length: Longest sequence; None for no limit.
        overflow: What becomes of longer ones: they are cut off at the end, or left out.

    Returns:
        A row for each pair that is left.

    Raises:
        DataError: The template refuses one, or none is left.
    """
    tokens = (pair_tokens(renderer, pair, system=system) for pair in pairs)
    return cut_pairs(tokens, max_length=max_length, overflow=overflow)


def pair_tokens(renderer: Renderer, pair: Pair, *, system: str | None) -> tuple[Sequences, Sequences]:
    """The prompt with the chosen answer and with the rejected one, whole; `system` is for a prompt that has none."""
    chosen, rejected = (renderer.tokens(with_system(conversation, system)) for conversation in pair.conversations)
    return chosen, rejected


def cut_pairs(
    tokens: Iterable[tuple[Sequences, Sequences]],
    *,
    max_length: int | None = None,
    overflow: Literal["cut", "drop"] = "cut",
) -> PairRows:
    """Make rows of pairs whose `pair_tokens` are there already.

    Returns:
        As `pair_rows`.

    Raises:
        DataError: None is left.
    """
    rows, index = PairRows(), -1
    for index, whole in enumerate(tokens):
        longer = max_length is not None and any(len(ids) > max_length for ids, _ in whole)
        if longer and overflow == "drop":
            rows.dropped += 1
            continue
        chosen, rejected = [(ids[:max_length], labels[:max_length]) for ids, labels in whole]
        if chosen == rejected or not all(any(one != IGNORED for one in labels) for _, labels in (chosen, rejected)):
            rows.empty.append(index)
            continue
        rows.cut += longer
        rows.chosen.append(chosen)
        rows.rejected.append(rejected)
        rows.owners.append(index)
    if not rows.owners:
        raise DataError(
            f"None of the {index + 1} pairs has answers that differ within trainer.max_length = {max_length} tokens, "
            "prompt included; raise it."
        )
    return rows


def lost_pairs(rows: PairRows, pairs: Sequence[Pair], max_length: int) -> list[str]:
    """What did not fit, one sentence each."""
    said = []
    if rows.cut:
        said.append(f"{_pairs(rows.cut)} cut off at trainer.max_length = {max_length} tokens")
    if rows.dropped:
        said.append(f"{_pairs(rows.dropped)} left out, longer than trainer.max_length = {max_length} tokens")
    if rows.empty:
        first = pairs[rows.empty[0]].place
        where = f", the first at {first}" if first else ""
        said.append(
            f"{_pairs(len(rows.empty))} left out, whose prompt takes up trainer.max_length = {max_length} tokens or whose "
            f"answers differ only after them{where}"
        )
    return said


def _pairs(count: int) -> str:
    return f"{count} pair{'s' if count > 1 else ''}"


def as_pair_dataset(rows: PairRows) -> datasets.Dataset:
    """Columns `chosen_ids`, `chosen_labels`, `rejected_ids`, `rejected_labels`, and `length` to group by."""
    return datasets.Dataset.from_dict(
        {
            "chosen_ids": [ids for ids, _ in rows.chosen],
            "chosen_labels": [labels for _, labels in rows.chosen],
            "rejected_ids": [ids for ids, _ in rows.rejected],
            "rejected_labels": [labels for _, labels in rows.rejected],
            "length": [max(len(one), len(other)) for (one, _), (other, _) in zip(rows.chosen, rows.rejected)],
        }
    )


class PairCollator:
    """Rows as TRL's `DPOTrainer` takes them: the chosen sequences, then the rejected ones, in one batch."""

    def __init__(self, padding: int) -> None:
        """`padding` is the id that shorter sequences are filled up with."""
        self.padding = padding

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `completion_mask` (1 where the loss is), each (2 rows, longest)."""
        ids = [row[f"{kind}_ids"] for kind in ("chosen", "rejected") for row in rows]
        labels = [row[f"{kind}_labels"] for kind in ("chosen", "rejected") for row in rows]
        return {
            "input_ids": padded(ids, self.padding),
            "attention_mask": attended(ids),
            "completion_mask": (padded(labels, IGNORED) != IGNORED).long(),
        }
