"""Tasks that a causal language model answers in text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import peft
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer

from pica.errors import ConfigError
from pica.experiments.adapters import attach
from pica.experiments.encoding import encode
from pica.experiments.evaluate.evaluation import Evaluation, evaluate, held_out_loss
from pica.experiments.limits import fit_padding, longest, planned_limits
from pica.experiments.mixing import described_sources
from pica.experiments.models import load_adapter, load_model, load_tokenizer
from pica.experiments.pipelines.base import HeldOut, Pipeline
from pica.experiments.recipes.recipe import AdapterSection, Recipe
from pica.experiments.reporting import Reporter
from pica.experiments.train.trainers import Steps, generation_trainer
from pica.tasks import Example, GenerationTask
from pica.tasks.base import described_problems


class GenerationPipeline(Pipeline):
    """See `Pipeline`. Learning rates are chosen by the loss on gold answers: generating them would cost many times more."""

    def __init__(self, recipe: Recipe, task: GenerationTask) -> None:
        self._recipe, self._task = recipe, task
        self.tokenizer = load_tokenizer(recipe.model)
        self.limits = planned_limits(recipe.model, AutoModelForCausalLM)
        fit_padding(self.tokenizer, self.limits, recipe.model.path)
        self.max_new_tokens = recipe.task.max_new_tokens or task.default_max_new_tokens
        generates = recipe.task.scoring == "generation"
        if generates and self.limits.positions is not None and self.max_new_tokens >= self.limits.positions:
            raise ConfigError(
                f"task.max_new_tokens = {self.max_new_tokens}: the model has {self.limits.positions} positions for "
                "question and answer together; set it lower."
            )
        self.max_length = longest(recipe.trainer.max_length, self.limits)

    def load_base(self) -> PreTrainedModel:
        """See `Pipeline.load_base`."""
        return load_model(self._recipe.model)

    def adapt(self, section: AdapterSection, *, seed: int) -> peft.PeftModel:
        """See `Pipeline.adapt`."""
        return attach(self.load_base(), section, seed=seed)

    def read(self, folder: Path) -> peft.PeftModel:
        """See `Pipeline.read`; a tokenizer beside the adapter is used from now on."""
        self.tokenizer = load_tokenizer(self._recipe.model, beside=folder)
        return load_adapter(self.load_base(), folder)

    def encode(self, examples: Sequence[Example]) -> datasets.Dataset:
        """Columns `input_ids` and `labels`; the loss is on the completions."""
        return encode(examples, self.tokenizer, max_length=self.max_length, limits=self.limits)

    def readable(self, rows: datasets.Dataset, tokens: int) -> Any:
        """The rows as they are."""
        return rows

    def trainer(self, model: peft.PeftModel, rows: datasets.Dataset, steps: Steps) -> Trainer:
        """TRL's `SFTTrainer`."""
        return generation_trainer(
            model,
            self.tokenizer,
            rows,
            steps,
        )

    def evaluate(self, model: Any, examples: Sequence[Example], *, reporter: Reporter, label: str) -> Evaluation:
        """Greedy answers and the loss on the gold ones."""
        return evaluate(
            model,
            self.tokenizer,
            self._task,
            examples,
            batch_size=self._recipe.trainer.eval_batch_size,
            max_new_tokens=self.max_new_tokens,
            reporter=reporter,
            label=label,
            by_likelihood=self._recipe.task.scoring == "likelihood",
        )

    def describe(self, examples: Sequence[Example]) -> list[str]:
        """What each of several sources brings."""
        return described_sources(examples, described_problems)

    def held_out(self, model: Any, examples: Sequence[Example]) -> HeldOut:
        """The loss on the gold answers."""
        batch = self._recipe.trainer.eval_batch_size
        loss, _ = held_out_loss(model, self.tokenizer, examples, batch_size=batch)
        return HeldOut(loss)
