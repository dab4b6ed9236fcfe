"""How likely a model finds what the assistant says, on conversations that it did not learn from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pica.experiments.batches import guesses
from pica.experiments.chat.rendering import Rows
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


def measure_rows(
    model: Any, rows: Rows, padding: int, *, batch_size: int, advance: Advance | None = None
) -> dict[int, Measured]:
    """Measure what the model makes of each conversation's learnt tokens.

    Args:
        model: Causal language model, on the device to use.
        rows: Of `Renderer.rows`; several of one conversation are added up.
        padding: Id that shorter rows are filled up with.
        batch_size: Rows in one forward pass.
        advance: Is told the rows that are done.
    Returns:
        The measurements, by the conversation's index.
    """
    found: dict[int, Measured] = {}
    for batch in guesses(model, rows.input_ids, rows.labels, padding, batch_size=batch_size, advance=advance):
        right = (batch.scores.argmax(dim=1) == batch.gold).cpu()
        for index, losses, hits in zip(batch.indices, batch.losses().split(batch.counts), right.split(batch.counts)):
            before = found.get(rows.owners[index], Measured(0.0, 0, 0))
            found[rows.owners[index]] = Measured(
                before.loss + losses.sum().item(), before.right + int(hits.sum()), before.tokens + len(losses)
            )
    return found


def summed_up(measured: Sequence[Measured]) -> HeldOutWords:
    """The mean over all tokens of one or more conversations."""
    tokens = [one.tokens for one in measured]
    loss, loss_stderr = pooled_mean([one.loss for one in measured], tokens)
    accuracy, accuracy_stderr = pooled_mean([float(one.right) for one in measured], tokens)
    return HeldOutWords(loss, loss_stderr, accuracy, accuracy_stderr, sum(tokens))


def pooled_mean(sums: Sequence[float], counts: Sequence[int]) -> tuple[float, float]:
    """sum(sums) / sum(counts), and its standard error over independent conversations (of one: unknown, NaN)."""
    total, number = sum(counts), len(counts)
    mean = sum(sums) / total
    if number < 2:
        return mean, math.nan
    spread = sum((value - mean * count) ** 2 for value, count in zip(sums, counts))
    return mean, math.sqrt(spread * number / (number - 1)) / total
