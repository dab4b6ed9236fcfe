"""Rewards: the model's own answers to problems are held against each other, those that are right being rewarded."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
from transformers import PreTrainedModel, Trainer

from pica.errors import DataError
from pica.experiments.encoding import prompt_ids
from pica.experiments.evaluate.evaluation import Evaluation, answers
from pica.experiments.pipelines.base import HeldOut, Pipeline
from pica.experiments.pipelines.generation import GenerationPipeline
from pica.experiments.preference.measuring import mean_and_error
from pica.experiments.recipes.recipe import AdapterSection, Recipe
from pica.experiments.reporting import Reporter, Silent
from pica.experiments.train.trainers import Steps
from pica.tasks import Example, GenerationTask
from pica.tasks.reward import scored_task

logger = logging.getLogger(__name__)


class RewardPipeline(Pipeline):
    """See `Pipeline`. A right answer has the reward 1, any other 0; learning rates are chosen by the mean reward.

    The metric is the accuracy of the likeliest answers, as it is for the task whose problems these are. Beside it stands the
    mean reward of answers that are sampled as in training, which is what training raises.
    """

    def __init__(self, recipe: Recipe, task: Any) -> None:
        """As `GenerationPipeline` of the task that scores the answers."""
        self._recipe = recipe
        self._scored: GenerationTask = scored_task(recipe.task.subset)
        self._plain = GenerationPipeline(recipe, self._scored)

    def load_base(self) -> PreTrainedModel:
        """See `Pipeline.load_base`."""
        return self._plain.load_base()

    def adapt(self, section: AdapterSection, *, seed: int) -> peft.PeftModel:
        """See `Pipeline.adapt`."""
        from pica.experiments.train.policies import check_reference

        if self._recipe.reward.beta:
            check_reference(section)
        return self._plain.adapt(section, seed=seed)

    def read(self, folder: Path) -> peft.PeftModel:
        """See `Pipeline.read`; a tokenizer beside the adapter is used from now on."""
        return self._plain.read(folder)

    @property
    def room(self) -> int:
        """The longest prompt, in tokens, that leaves room for an answer."""
        return self._plain.max_length - self._plain.max_new_tokens

    def prompt_lengths(self, examples: Sequence[Example]) -> list[int]:
        """Tokens of each prompt."""
        return [len(ids) for ids in prompt_ids(examples, self._plain.tokenizer, self._plain.limits)]

    def encode(self, examples: Sequence[Example]) -> datasets.Dataset:
        """Columns `prompt`, and `answer` and `choices` to score by; prompts without room for an answer are left out."""
        kept = [example for example, length in zip(examples, self.prompt_lengths(examples)) if length <= self.room]
        limit = (
            f"trainer.max_length = {self._plain.max_length} tokens, task.max_new_tokens = {self._plain.max_new_tokens} of "
            "them for the answer"
        )
        if not kept:
            raise DataError(f"All {len(examples)} prompts are longer than {limit}, so nothing can be learnt.")
        if len(kept) < len(examples):
            logger.warning(
                "%d of %d prompts are left out, longer than %s", len(examples) - len(kept), len(examples), limit
            )
        return datasets.Dataset.from_dict(
            {
                "prompt": [example.prompt for example in kept],
                "answer": [example.answer for example in kept],
                "choices": [list(example.choices) for example in kept],
            }
        )

    def trainer(self, model: peft.PeftModel, rows: datasets.Dataset, steps: Steps) -> Trainer:
        """TRL's `GRPOTrainer`."""
        from pica.experiments.train.policies import reward_trainer

        return reward_trainer(
            model,
            self._plain.tokenizer,
            rows,
            steps,
            self._recipe.reward,
            rewards=self._rewards,
            max_new_tokens=self._plain.max_new_tokens,
        )

    def _rewards(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        """TRL's form of a reward: one number for each completion."""
        found = []
        for prompt, text, answer, choices in zip(prompts, completions, columns["answer"], columns["choices"]):
            example = Example(prompt, "", answer, tuple(choices))
            found.append(float(self._scored.correct(self._scored.extract(text, example), answer)))
        return found

    def evaluate(self, model: Any, examples: Sequence[Example], *, reporter: Reporter, label: str) -> Evaluation:
        """As the scoring task does, and the mean reward of `reward.test_generations` sampled answers to each problem."""
        found = self._plain.evaluate(model, examples, reporter=reporter, label=label)
        count = self._recipe.reward.test_generations
        if not count:
            return found
        with torch.random.fork_rng():
            torch.manual_seed(self._recipe.trainer.seed)
            right = self._answered(
                model, [each for each in examples for _ in range(count)], reporter, f"{label} by chance"
            )
        each = [sum(right[at : at + count]) / count for at in range(0, len(right), count)]
        mean, error = mean_and_error(each)
        rows = [{**row, "mean_reward": reward} for row, reward in zip(found.rows(), each)]
        metrics = {**found.metrics, "mean_reward": mean, "mean_reward_stderr": error}
        return dataclasses.replace(found, metrics=metrics, predictions=rows)

    def held_out(self, model: Any, examples: Sequence[Example]) -> HeldOut:
        """1 less the mean reward of the likeliest answers, as a loss, and that mean reward."""
        right = self._answered(model, examples, Silent(), "", greedy=True)
        reward = sum(right) / len(right)
        return HeldOut(1 - reward, reward)

    def samples(self, model: Any, examples: Sequence[Example]) -> list[tuple[str, str]]:
        """The first `task.answers` problems, and the likeliest answers."""
        asked = list(examples[: self._recipe.task.answers])
        texts = self._texts(model, asked, Silent(), "", greedy=True)
        return [(example.prompt.strip(), text.strip()) for example, text in zip(asked, texts)]

    def describe(self, examples: Sequence[Example]) -> list[str]:
        """How a problem is learnt from."""
        section = self._recipe.reward
        return [
            f"Each problem is answered {section.num_generations} times at temperature {section.temperature:g}; task "
            f"{self._scored.name} says which answers are right",
            *self._plain.describe(examples),
        ]

    def _texts(
        self, model: Any, examples: Sequence[Example], reporter: Reporter, label: str, *, greedy: bool
    ) -> list[str]:
        section = self._recipe.reward
        return answers(
            model,
            self._plain.tokenizer,
            self._scored,
            examples,
            self._recipe.trainer.eval_batch_size,
            self._plain.max_new_tokens,
            reporter,
            label,
            sampling=None if greedy else (section.temperature, section.top_p),
        )

    def _answered(
        self, model: Any, examples: Sequence[Example], reporter: Reporter, label: str, *, greedy: bool = False
    ) -> list[bool]:
        """Whether the answer to each example is right."""
        texts = self._texts(model, examples, reporter, label, greedy=greedy)
        return [
            self._scored.correct(self._scored.extract(text, example), example.answer)
            for text, example in zip(texts, examples)
        ]
