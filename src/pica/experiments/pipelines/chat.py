"""Conversations: what the assistant says is learnt, and measured on conversations that were held out."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import peft
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from pica.experiments.adapters import attach
from pica.experiments.chat.measuring import measure_rows, summed_up
from pica.experiments.chat.packing import as_dataset, packed, packing_collator
from pica.experiments.chat.rendering import Renderer, Rows
from pica.experiments.chat.talking import Speaker
from pica.experiments.chat.templates import FILE, set_template
from pica.experiments.encoding import IGNORED, special_ids
from pica.experiments.evaluate.evaluation import Evaluation
from pica.experiments.limits import check_tokens, fit_padding, longest, planned_limits
from pica.experiments.mixing import described_sources
from pica.experiments.models import load_adapter, load_model, load_tokenizer
from pica.experiments.pipelines.base import HeldOut, Pipeline
from pica.experiments.recipes.recipe import AdapterSection, Recipe
from pica.experiments.reporting import Reporter, Silent
from pica.experiments.train.trainers import Steps, generation_trainer
from pica.files.output import write_text
from pica.tasks.chat import Conversation, described, with_system

logger = logging.getLogger(__name__)

_SAMPLE = 1000  # conversations that the shares are worked out from
DEFAULT_ANSWER = 128
"""Longest answer, in tokens, where the recipe sets none."""


class ChatPipeline(Pipeline):
    """See `Pipeline`. The metric is the share of the assistant's tokens that the model finds the likeliest."""

    def __init__(self, recipe: Recipe, task: Any) -> None:
        """`recipe` is checked; the tokenizer is read, and given the chat template that is to be used.

        Raises:
            ConfigError: There is no tokenizer or no chat template, or it does not do.
        """
        self._recipe = recipe
        self.limits = planned_limits(recipe.model, AutoModelForCausalLM)
        self.max_length = longest(recipe.trainer.max_length, self.limits)
        self._speak(load_tokenizer(recipe.model))

    def _speak(self, tokenizer: PreTrainedTokenizerBase, folder: Path | None = None) -> None:
        """Use this tokenizer, with the chat template that the recipe names or that lies in an adapter's folder."""
        fit_padding(tokenizer, self.limits, self._recipe.model.path)
        self.tokenizer = tokenizer
        self.template = set_template(tokenizer, self._recipe.task.chat_template, folder)
        self.renderer = Renderer(tokenizer, self._recipe.task.loss)

    def load_base(self) -> PreTrainedModel:
        """See `Pipeline.load_base`."""
        return load_model(self._recipe.model)

    def adapt(self, section: AdapterSection, *, seed: int) -> peft.PeftModel:
        """See `Pipeline.adapt`."""
        return attach(self.load_base(), section, seed=seed)

    def read(self, folder: Path) -> peft.PeftModel:
        """See `Pipeline.read`; a tokenizer and a chat template beside the adapter are used from now on."""
        self._speak(load_tokenizer(self._recipe.model, beside=folder), folder)
        return load_adapter(self.load_base(), folder)

    def rows(self, examples: Sequence[Conversation]) -> Rows:
        """The conversations' tokens, each row at most `trainer.max_length` of them, or what the model has positions for."""
        given = [with_system(example, self._recipe.task.system) for example in examples]
        rows = self.renderer.rows(given, max_length=self.max_length, overflow=self._recipe.trainer.overflow)
        places = [given[owner].place for owner in rows.owners]
        check_tokens(rows.input_ids, places, self.tokenizer, self.limits)
        return rows

    def encode(self, examples: Sequence[Conversation]) -> datasets.Dataset:
        """Columns `input_ids` and `labels`, and `seq_lengths` where rows are packed."""
        rows = self.rows(examples)
        for sentence in lost(rows, self.max_length):
            logger.warning("%s", sentence)
        return packed(as_dataset(rows), self.max_length) if self._recipe.trainer.packing else as_dataset(rows)

    def readable(self, rows: datasets.Dataset, tokens: int) -> Any:
        """The rows as they are."""
        return rows

    def trainer(self, model: peft.PeftModel, rows: datasets.Dataset, steps: Steps) -> Trainer:
        """TRL's `SFTTrainer`."""
        _, padding = special_ids(self.tokenizer)
        collate = packing_collator(model, padding) if steps.section.packing else None
        return generation_trainer(model, self.tokenizer, rows, steps, collate=collate)

    def evaluate(self, model: Any, examples: Sequence[Conversation], *, reporter: Reporter, label: str) -> Evaluation:
        """Loss, perplexity and accuracy on the assistant's words, and answers to the last question of a few."""
        given = [with_system(example, self._recipe.task.system) for example in examples]
        section, rows = self._recipe.trainer, self.rows(examples)
        _, padding = special_ids(self.tokenizer)
        with reporter.bar(label, len(rows.input_ids)) as advance:
            found = measure_rows(model, rows, padding, batch_size=section.eval_batch_size, advance=advance)
        total = summed_up(list(found.values()))
        said = self.answers(model, given, sorted(found), reporter, label)
        predictions = [
            {
                "messages": [dict(message) for message in given[index].messages] or given[index].text,
                "loss": one.loss / one.tokens,
                "token_accuracy": one.right / one.tokens,
                "tokens": one.tokens,
                **({"answer": said[index]} if index in said else {}),
            }
            for index, one in sorted(found.items())
        ]
        return Evaluation(
            metric="token_accuracy",
            score=total.accuracy,
            stderr=total.accuracy_stderr,
            metrics={
                "token_accuracy": total.accuracy,
                "perplexity": total.perplexity,
                "loss_stderr": total.loss_stderr,
            },
            loss=total.loss,
            examples=len(found),
            tokens=total.tokens,
            predictions=predictions,
        )

    def held_out(self, model: Any, examples: Sequence[Conversation]) -> HeldOut:
        """The loss on what the assistant says."""
        _, padding = special_ids(self.tokenizer)
        found = measure_rows(model, self.rows(examples), padding, batch_size=self._recipe.trainer.eval_batch_size)
        return HeldOut(summed_up(list(found.values())).loss)

    def samples(self, model: Any, examples: Sequence[Conversation]) -> list[tuple[str, str]]:
        """The last questions of the first `task.answers` conversations that have one, and what the model answers."""
        given = [with_system(example, self._recipe.task.system) for example in examples]
        said = self.answers(model, given, range(len(given)), Silent(), "")
        return [(given[index].messages[-2]["content"], text) for index, text in said.items()]

    def describe(self, examples: Sequence[Conversation]) -> list[str]:
        """What the conversations are like, and how much of them is learnt."""
        tokens = [
            self.renderer.tokens(with_system(example, self._recipe.task.system)) for example in examples[:_SAMPLE]
        ]
        total = sum(len(ids) for ids, _ in tokens)
        learnt = sum(label != IGNORED for _, labels in tokens for label in labels)
        share = f"{learnt / total:.0%} of their tokens are learnt"
        return [
            f"Training data: {described(examples)}, {total / len(tokens):,.0f} tokens on average; {share}",
            *described_sources(examples, described),
        ]

    def accompany(self, folder: Path) -> None:
        """Put the chat template beside an adapter, so that it is spoken to as it was trained."""
        write_text(folder / FILE, self.template)

    def answers(
        self, model: Any, examples: Sequence[Conversation], measured: Sequence[int], reporter: Reporter, label: str
    ) -> dict[int, str]:
        """Answers to the last question of the first few conversations that were measured, by the conversation's index."""
        chosen = [index for index in measured if len(examples[index].messages) > 1][: self._recipe.task.answers]
        if not chosen:
            return {}
        speaker = Speaker(model, self.tokenizer, self.renderer)
        longest = self._recipe.task.max_new_tokens or DEFAULT_ANSWER
        with reporter.bar(f"{label} questions", len(chosen)) as advance:
            asked = [(examples[index].messages[:-1], examples[index].tools) for index in chosen]
            batch = min(self._recipe.trainer.eval_batch_size, 8)
            texts = speaker.answer_all(asked, max_new_tokens=longest, batch_size=batch, advance=advance)
        return dict(zip(chosen, texts))


def lost(rows: Rows, max_length: int) -> list[str]:
    """What did not fit, one sentence each."""
    said = []
    for count, what in ((rows.cut, "cut off at"), (rows.split, "split at"), (rows.dropped, "left out, longer than")):
        if count:
            said.append(
                f"{count} conversation{'s' if count > 1 else ''} {what} trainer.max_length = {max_length} tokens"
            )
    if rows.empty:
        said.append(f"{rows.empty} without anything to learn within trainer.max_length = {max_length} tokens: left out")
    return said
