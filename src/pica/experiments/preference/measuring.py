"""Which of two answers a model prefers, beyond what its reference does: the measures of direct preference optimisation.

With log-probabilities of whole answers, the reward of an answer y to a prompt x is beta (log p(y|x) - log p_ref(y|x)), the
margin of a pair the chosen answer's reward less the rejected one's, and the loss -log sigmoid(margin) (Rafailov et al.,
2023, arXiv:2305.18290, equation 7). The reference is the model without its adapter, for which every margin is 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from peft import PeftModel

from pica.experiments.batches import guesses
from pica.experiments.preference.encoding import PairRows, Sequences
from pica.experiments.reporting import Advance

_ROUNDING = 1e-4  # nats: a margin below it is none


@dataclass(frozen=True)
class Judged:
    """One pair.

    Attributes:
        chosen, rejected: Log-probabilities of the answers in nats, end of turn included.
        reference_chosen, reference_rejected: Those of the model without its adapter.
        beta: What rewards are scaled by.
    """

    chosen: float
    rejected: float
    reference_chosen: float
    reference_rejected: float
    beta: float

    @property
    def chosen_reward(self) -> float:
        """Of the chosen answer."""
        return self.beta * (self.chosen - self.reference_chosen)

    @property
    def rejected_reward(self) -> float:
        """Of the rejected answer."""
        return self.beta * (self.rejected - self.reference_rejected)

    @property
    def margin(self) -> float:
        """The chosen answer's reward less the rejected one's."""
        return self.chosen_reward - self.rejected_reward

    @property
    def right(self) -> float:
        """1 if the chosen answer has the higher reward, 0 if the rejected one has, 0.5 if they are equal."""
        if abs(self.margin) <= _ROUNDING * self.beta:
            return 0.5
        return float(self.margin > 0)

    @property
    def loss(self) -> float:
        """-log sigmoid(margin)."""
        return math.log1p(math.exp(-abs(self.margin))) + max(0.0, -self.margin)

    @property
    def likelier(self) -> float:
        """1 if the chosen answer is the likelier one, whatever the reference makes of it, else 0."""
        return float(self.chosen > self.rejected)


def judge(
    model: Any, rows: PairRows, padding: int, *, beta: float, batch_size: int, advance: Advance | None = None
) -> list[Judged]:
    """Hold the two answers of each row against each other.

    Args:
        model: Causal language model, on the device to use. Its reference is itself without its adapter; that of a model
            without one is the model.
        rows: Of `pair_rows`.
        padding: Id that shorter sequences are filled up with.
        beta: What rewards are scaled by.
        batch_size: Sequences in one forward pass.
        advance: Is told the sequences that are done, `sequences_of` in all.

    Returns:
        One for each row.
    """
    both: list[Sequences] = [*rows.chosen, *rows.rejected]
    own = reference = _log_probs(model, both, padding, batch_size, advance)
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            reference = _log_probs(model, both, padding, batch_size, advance)
    count = len(rows.owners)
    return [Judged(own[at], own[at + count], reference[at], reference[at + count], beta) for at in range(count)]


def sequences_of(model: Any, rows: PairRows) -> int:
    """How many sequences `judge` runs through the model."""
    return 2 * len(rows.owners) * (2 if isinstance(model, PeftModel) else 1)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean of one or more independent values, and its standard error (of one: 0)."""
    middle = fmean(values)
    return middle, math.sqrt(fmean((value - middle) ** 2 for value in values) / len(values))


def _log_probs(
    model: Any, sequences: Sequence[Sequences], padding: int, batch_size: int, advance: Advance | None
) -> list[float]:
    """Of the labelled tokens of each sequence, in nats."""
    ids, labels = [ids for ids, _ in sequences], [labels for _, labels in sequences]
    found = [0.0] * len(ids)
    for batch in guesses(model, ids, labels, padding, batch_size=batch_size, advance=advance):
        for index, losses in zip(batch.indices, batch.losses().split(batch.counts)):
            found[index] = -losses.sum().item()
    return found
