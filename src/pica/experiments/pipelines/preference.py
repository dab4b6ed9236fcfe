"""Preferences: of two answers to a prompt the chosen one is made likelier, and measured on pairs that were held out."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import peft
from transformers import PreTrainedModel, Trainer

from pica.experiments.encoding import special_ids
from pica.experiments.evaluate.evaluation import Evaluation
from pica.experiments.limits import check_tokens
from pica.experiments.mixing import described_sources
from pica.experiments.pipelines.base import HeldOut, Pipeline
from pica.experiments.pipelines.chat import ChatPipeline
from pica.experiments.preference.encoding import PairRows, as_pair_dataset, lost_pairs, pair_rows
from pica.experiments.preference.measuring import Judge, Judged, mean_and_error
from pica.experiments.recipes.recipe import AdapterSection, Recipe
from pica.experiments.reporting import Reporter
from pica.experiments.train.trainers import Steps
from pica.tasks.chat import with_system
from pica.tasks.preference import Pair, described_pairs

logger = logging.getLogger(__name__)


class PreferencePipeline(Pipeline):
    """See `Pipeline`. The metric is the share of pairs whose chosen answer has the higher reward (`Judged.right`)."""

    measured = "test pairs, held-out"

    def __init__(self, recipe: Recipe, task: Any) -> None:
        """As `ChatPipeline`, whose tokens and templates these are."""
        self._recipe, self._chat = recipe, ChatPipeline(recipe, task)
        self._judge = Judge(beta=recipe.preference.beta, batch_size=recipe.trainer.eval_batch_size)

    def load_base(self) -> PreTrainedModel:
        """See `Pipeline.load_base`."""
        return self._chat.load_base()

    def adapt(self, section: AdapterSection, *, seed: int) -> peft.PeftModel:
        """See `Pipeline.adapt`."""
        from pica.experiments.train.policies import check_reference

        check_reference(section)
        return self._chat.adapt(section, seed=seed)

    def read(self, folder: Path) -> peft.PeftModel:
        """See `Pipeline.read`; a tokenizer and a chat template beside the adapter are used from now on."""
        return self._chat.read(folder)

    def encode(self, examples: Sequence[Pair]) -> datasets.Dataset:
        """See `as_pair_dataset`."""
        rows = self._rows(examples)
        for sentence in lost_pairs(rows, examples, self._chat.max_length):
            logger.warning("%s", sentence)
        return as_pair_dataset(rows)

    def trainer(self, model: peft.PeftModel, rows: datasets.Dataset, steps: Steps) -> Trainer:
        """TRL's `DPOTrainer`; the reference is the model with its adapter switched off."""
        from pica.experiments.train.policies import preference_trainer

        return preference_trainer(
            model,
            self._chat.tokenizer,
            rows,
            steps,
            self._recipe.preference,
        )

    def evaluate(self, model: Any, examples: Sequence[Pair], *, reporter: Reporter, label: str) -> Evaluation:
        """Reward accuracy, margin and loss of all pairs, and answers to the prompts of a few."""
        rows = self._rows(examples)
        said = self._chat.answers(model, self._asked(examples), rows.owners, reporter, label)
        with reporter.bar(label, self._judge.sequences(model, rows)) as advance:
            judged = self._judge(model, rows, self._padding, advance)
        accuracy, stderr = mean_and_error([one.right for one in judged])
        margin, margin_stderr = mean_and_error([one.margin for one in judged])
        loss, loss_stderr = mean_and_error([one.loss for one in judged])
        likelier, likelier_stderr = mean_and_error([one.likelier for one in judged])
        return Evaluation(
            metric="reward_accuracy",
            score=accuracy,
            stderr=stderr,
            metrics={
                "reward_accuracy": accuracy,
                "reward_margin": margin,
                "reward_margin_stderr": margin_stderr,
                "chosen_likelier": likelier,
                "chosen_likelier_stderr": likelier_stderr,
                "loss_stderr": loss_stderr,
            },
            loss=loss,
            examples=len(judged),
            tokens=None,
            predictions=[_prediction(examples[index], one, said.get(index)) for index, one in zip(rows.owners, judged)],
        )

    def held_out(self, model: Any, examples: Sequence[Pair]) -> HeldOut:
        """The loss that is trained on."""
        judged = self._judge(model, self._rows(examples), self._padding)
        return HeldOut(mean_and_error([one.loss for one in judged])[0])

    def samples(self, model: Any, examples: Sequence[Pair]) -> list[tuple[str, str]]:
        """The last questions of the first `task.answers` pairs, and what the model answers."""
        return self._chat.samples(model, self._asked(examples))

    def describe(self, examples: Sequence[Pair]) -> list[str]:
        """What the pairs are like."""
        return [f"Training data: {described_pairs(examples)}", *described_sources(examples, described_pairs)]

    def accompany(self, folder: Path) -> None:
        """Put the chat template beside an adapter, so that it is spoken to as it was trained."""
        self._chat.accompany(folder)

    def _asked(self, examples: Sequence[Pair]) -> list[Any]:
        return [with_system(pair.conversations[0], self._recipe.task.system) for pair in examples]

    def _rows(self, examples: Sequence[Pair]) -> PairRows:
        overflow = "drop" if self._recipe.trainer.overflow == "drop" else "cut"
        rows = pair_rows(
            self._chat.renderer,
            examples,
            system=self._recipe.task.system,
            max_length=self._chat.max_length,
            overflow=overflow,
        )
        places = [examples[owner].place for owner in rows.owners]
        for sequences in (rows.chosen, rows.rejected):
            check_tokens([ids for ids, _ in sequences], places, self._chat.tokenizer, self._chat.limits)
        return rows

    @property
    def _padding(self) -> int:
        return special_ids(self._chat.tokenizer)[1]


def _prediction(pair: Pair, judged: Judged, answer: str | None) -> dict[str, Any]:
    said = {
        name: value if isinstance(value, str) else [dict(message) for message in value]
        for name, value in (("prompt", pair.prompt), ("chosen", pair.chosen), ("rejected", pair.rejected))
    }
    return {
        **said,
        "chosen_logp": judged.chosen,
        "rejected_logp": judged.rejected,
        "chosen_reward": judged.chosen_reward,
        "rejected_reward": judged.rejected_reward,
        "margin": judged.margin,
        "loss": judged.loss,
        "correct": None if judged.right == 0.5 else bool(judged.right),
        **({} if answer is None else {"answer": answer}),
    }
