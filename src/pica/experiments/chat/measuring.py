"""How likely a model finds what the assistant says, on conversations that it did not learn from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pica.experiments.chat.rendering import Rows
from pica.experiments.data import IGNORED
from pica.experiments.evaluate.evaluation import length_batches
from pica.experiments.reporting import Advance


@dataclass(frozen=True)
class Measured:
    """Sums over the learnt tokens of one conversation: negative log-likelihood in nats, right guesses, tokens."""

    loss: float
    right: int
    tokens: int


@dataclass(frozen=True)
class HeldOutWords:
    """The mean over all tokens, with standard errors that let the tokens of a conversation depend on each other.

    Attributes:
        loss, loss_stderr: Nats a token.
        accuracy, accuracy_stderr: Share of tokens that the model finds the likeliest.
        tokens: How many.
    """

    loss: float
    loss_stderr: float
    accuracy: float
    accuracy_stderr: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


@torch.inference_mode()
def measure_rows(
    model: Any, rows: Rows, padding: int, *, batch_size: int, advance: Advance | None = None
) -> dict[int, Measured]:
    """What the model makes of each conversation's learnt tokens, by the conversation's index.

    Args:
        model: Causal language model, on the device to use.
        rows: Of `Renderer.rows`; several of one conversation are added up.
        padding: Id that shorter rows are filled up with.
        batch_size: Rows in one forward pass.
        advance: Is told the rows that are done.
    """
    model.eval()
    lengths = [len(ids) for ids in rows.input_ids]
    found: dict[int, Measured] = {}
    for indices in length_batches(lengths, batch_size):
        width = max(lengths[index] for index in indices)
        ids = torch.full((len(indices), width), padding)
        target = torch.full((len(indices), width), IGNORED)
        mask = torch.zeros((len(indices), width), dtype=torch.long)
        for at, index in enumerate(indices):
            ids[at, : lengths[index]] = torch.tensor(rows.input_ids[index])
            target[at, : lengths[index]] = torch.tensor(rows.labels[index])
            mask[at, : lengths[index]] = 1
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
        target = target[:, 1:].to(logits.device)
        counted = target != IGNORED  # (rows, width - 1)
        scores = logits[:, :-1][counted].float()  # (tokens, vocabulary): only what counts is upcast
        losses = torch.nn.functional.cross_entropy(scores, target[counted], reduction="none").double().cpu()
        right = (scores.argmax(dim=1) == target[counted]).cpu()
        counts = counted.sum(1).tolist()
        for index, some, hits in zip(indices, losses.split(counts), right.split(counts)):
            before = found.get(rows.owners[index], Measured(0.0, 0, 0))
            found[rows.owners[index]] = Measured(
                before.loss + some.sum().item(), before.right + int(hits.sum()), before.tokens + len(some)
            )
        if advance is not None:
            advance(len(indices))
    return found


def summed_up(measured: Sequence[Measured]) -> HeldOutWords:
    """The mean over all tokens of one or more conversations."""
    tokens = [one.tokens for one in measured]
    loss, loss_stderr = _ratio([one.loss for one in measured], tokens)
    accuracy, accuracy_stderr = _ratio([float(one.right) for one in measured], tokens)
    return HeldOutWords(loss, loss_stderr, accuracy, accuracy_stderr, sum(tokens))


def _ratio(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """sum(sums) / sum(counts), and its standard error over independent conversations (of one: 0)."""
    total, number = sum(counts), len(counts)
    mean = sum(sums) / total
    if number < 2:
        return mean, 0.0
    spread = sum((value - mean * count) ** 2 for value, count in zip(sums, counts))
    return mean, math.sqrt(spread * number / (number - 1)) / total
