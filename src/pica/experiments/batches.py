"""Rows of token ids as batches: similar lengths together, filled up at one end, and what a model makes of labelled ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence

from pica.experiments.encoding import IGNORED
from pica.experiments.reporting import Advance


def length_batches(lengths: Sequence[int], size: int, *, alike: bool = False) -> Iterator[list[int]]:
    """Indices in batches of similar length (if `alike` the same), longest first: memory runs out at once or never."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    groups = [list(group) for _, group in groupby(order, key=lengths.__getitem__)] if alike else [order]
    for group in groups:
        for start in range(0, len(group), size):
            yield group[start : start + size]


def padded(rows: Sequence[Sequence[int]], filler: int, side: Literal["left", "right"] = "right") -> torch.Tensor:
    """Rows of whole numbers as one tensor, (rows, longest), the shorter ones filled up at one side."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=filler, padding_side=side)


def attended(rows: Sequence[Sequence[int]], side: Literal["left", "right"] = "right") -> torch.Tensor:
    """The attention mask of `padded` rows, (rows, longest): 1 where a row's own tokens are."""
    return padded([[1] * len(row) for row in rows], 0, side)


def left_padded(rows: Sequence[list[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (rows, longest); generation continues at the right edge."""
    return padded(rows, padding, "left"), attended(rows, "left")


@dataclass(frozen=True)
class Guesses:
    """What a model makes of a batch's labelled tokens, row by row in the batch's order.

    Attributes:
        indices: The rows of the batch.
        counts: Labelled tokens of each.
        scores: float32 logits, (sum of counts, vocabulary), on the model's device.
        gold: The labels, (sum of counts).
    """

    indices: list[int]
    counts: list[int]
    scores: torch.Tensor
    gold: torch.Tensor

    def losses(self) -> torch.Tensor:
        """Negative log-likelihoods in nats, float64 (sum of counts), on the CPU."""
        return torch.nn.functional.cross_entropy(self.scores, self.gold, reduction="none").double().cpu()


@torch.inference_mode()
def guesses(
    model: Any,
    input_ids: Sequence[list[int]],
    labels: Sequence[list[int]],
    padding: int,
    *,
    batch_size: int,
    advance: Advance | None = None,
) -> Iterator[Guesses]:
    """Run a causal language model over all rows, and keep what it makes of the labelled tokens.

    Args:
        model: On the device to use; is put into evaluation mode.
        input_ids: Of each row.
        labels: Of each row, of the same length; -100 where nothing is asked.
        padding: Id that shorter rows are filled up with.
        batch_size: Rows in one forward pass.
        advance: Is told the rows that are done.
    Yields:
        Of each batch, what the model makes of it.
    """
    model.eval()
    lengths = [len(row) for row in input_ids]
    for indices in length_batches(lengths, batch_size):
        rows = [input_ids[index] for index in indices]
        batch, mask = padded(rows, padding), attended(rows)
        logits = model(input_ids=batch.to(model.device), attention_mask=mask.to(model.device)).logits
        target = padded([labels[index] for index in indices], IGNORED)[:, 1:].to(logits.device)
        counted = target != IGNORED  # (batch, width - 1)
        # Only labelled positions are upcast: all of them in float32 are the largest tensor of the whole run.
        yield Guesses(indices, counted.sum(1).tolist(), logits[:, :-1][counted].float(), target[counted])
        if advance is not None:
            advance(len(indices))
