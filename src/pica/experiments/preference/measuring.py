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

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper

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


class Judge:
    """Holds the two answers of pairs against each other.

    What the reference makes of them is the same at every measurement of a run, and is found out once for each set of rows.
    """

    def __init__(self, *, beta: float, batch_size: int) -> None:
        """Args: beta: what rewards are scaled by; batch_size: sequences in one forward pass."""
        self._beta, self._batch_size = beta, batch_size
        self._references: dict[bytes, list[float]] = {}

    def sequences(self, model: Any, rows: PairRows) -> int:
        """How many sequences the next call with these runs through the model."""
        passes = 1 if not _adapted(model) or rows.digest in self._references else 2
        return 2 * len(rows.owners) * passes

    def __call__(self, model: Any, rows: PairRows, padding: int, advance: Advance | None = None) -> list[Judged]:
        """Judge each row.

        Args:
            model: Causal language model, on the device to use. The reference is this model without its adapter; all models
                that one object judges have the same.
            rows: Of `pair_rows`.
            padding: Id that shorter sequences are filled up with.
            advance: Is told the sequences that are done, `sequences` in all.

        Returns:
            One for each row.
        """
        both: list[Sequences] = [*rows.chosen, *rows.rejected]
        own, digest = _log_probs(model, both, padding, self._batch_size, advance), rows.digest
        if not _adapted(model):
            self._references[digest] = own
        elif digest not in self._references:
            with model.disable_adapter():
                self._references[digest] = _log_probs(model, both, padding, self._batch_size, advance)
        reference, count = self._references[digest], len(rows.owners)
        return [
            Judged(own[at], own[at + count], reference[at], reference[at + count], self._beta) for at in range(count)
        ]


def _adapted(model: Any) -> bool:
    """Whether the model has an adapter that is switched on."""
    layers = [layer for layer in model.modules() if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    return not all(layer.disable_adapters for layer in layers)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean of one or more independent values, and its standard error (of one: unknown, NaN)."""
    middle = fmean(values)
    if len(values) < 2:
        return middle, math.nan
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
