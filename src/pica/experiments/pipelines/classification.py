"""Tasks that a model with a classification head solves: one output a class, or one number."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import datasets
import peft
import torch
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
)

from pica.errors import ConfigError
from pica.experiments.adapters import attach, head_parameters
from pica.experiments.batches import length_batches
from pica.experiments.data import target_of
from pica.experiments.evaluate.evaluation import Evaluation
from pica.experiments.limits import check_tokens, fit_padding, limits_of, longest, planned_limits
from pica.experiments.models import load_adapter, load_classifier, load_config, load_tokenizer
from pica.experiments.pipelines.base import HeldOut, Pipeline
from pica.experiments.recipes.recipe import AdapterSection, Recipe
from pica.experiments.reporting import Reporter, Silent
from pica.experiments.train.trainers import Steps, classification_trainer
from pica.tasks import ClassificationTask, LabelledText, Target
from pica.tasks.metrics import class_metrics, class_stderr, regression_metrics, regression_stderr

logger = logging.getLogger(__name__)

# Of pictures that are read for a basis: how many at a time, and about how many patches each has.
_PICTURES, _PATCHES = 16, 64


class Inputs(Protocol):
    """What becomes a classifier's input: texts here, other things (images) in files of their own.

    Attributes:
        auto_class: transformers' class of models for it.
        task_type: PEFT's name for such a task; None where it has none.
    """

    auto_class: Any
    task_type: str | None

    def take_from(self, adapter: Path) -> None:
        """Use what lies beside an adapter to make inputs, if anything does."""
        ...

    def configure(self, model: PreTrainedModel) -> None:
        """Put into the model's configuration what its inputs need, such as the padding token."""
        ...

    def encode(self, examples: Sequence[Any], model: Any = None) -> datasets.Dataset:
        """One row an example, without its label; for `model`, or for the base model.

        Raises:
            DataError: One is nothing that the model can take.
        """
        ...

    def lengths(self, rows: datasets.Dataset) -> list[int]:
        """A size for each row; rows of similar size are measured together."""
        ...

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """One batch of rows, without labels."""
        ...

    def describe(self, example: Any) -> dict[str, Any]:
        """The example as it stands in a predictions file."""
        ...


class TextInputs:
    """One text or two, cut off at `max_length` tokens (the longer one first)."""

    auto_class = AutoModelForSequenceClassification
    task_type: str | None = "SEQ_CLS"

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._limits = planned_limits(recipe.model, self.auto_class)
        self._use(load_tokenizer(recipe.model, generates=False))

    def take_from(self, adapter: Path) -> None:
        """The adapter's own tokenizer, if it has one."""
        self._use(load_tokenizer(self._recipe.model, generates=False, beside=adapter))

    def _use(self, tokenizer: PreTrainedTokenizerBase) -> None:
        model = self._recipe.model
        self.tokenizer = tokenizer
        # Padded on the right, positions are those of the text alone, whatever it is batched with. XLNet's are relative, and
        # its head reads the last position of all.
        reads_last = getattr(load_config(model), "summary_type", None) == "last"
        tokenizer.padding_side = "left" if reads_last else "right"
        fit_padding(tokenizer, self._limits, model.path)
        self._max_length = min(longest(self._recipe.trainer.max_length, self._limits), tokenizer.model_max_length)

    def configure(self, model: PreTrainedModel) -> None:
        """A decoder with a head looks for the last token that is no padding."""
        model.config.pad_token_id = self.tokenizer.pad_token_id

    def encode(self, examples: Sequence[LabelledText], model: Any = None) -> datasets.Dataset:
        """The tokenizer's columns: `input_ids`, `attention_mask`, and `token_type_ids` where the model has them."""
        encoded = self._encode(examples)
        limits = self._limits if model is None else limits_of(model)
        check_tokens(encoded["input_ids"], [example.place for example in examples], self.tokenizer, limits)
        full = [example for example, ids in zip(examples, encoded["input_ids"]) if len(ids) >= self._max_length]
        if cut := self._longer(full):
            logger.warning("%d of %d texts are cut off at %d tokens", cut, len(examples), self._max_length)
        return encoded

    def _longer(self, examples: Sequence[LabelledText]) -> int:
        """How many texts have more tokens than are used."""
        texts = [(example.text,) if example.pair is None else (example.text, example.pair) for example in examples]
        return sum(len(self.tokenizer(*each, verbose=False)["input_ids"]) > self._max_length for each in texts)  # pyright: ignore

    def _encode(self, examples: Sequence[LabelledText]) -> datasets.Dataset:
        options: Any = {"truncation": True, "max_length": self._max_length}
        texts: Any = [example.text for example in examples]
        pairs: Any = [example.pair for example in examples]
        if None in pairs and any(pairs):  # an empty second text is not the same as none: it has a separator of its own
            rows = [
                self.tokenizer(text, **options) if pair is None else self.tokenizer(text, pair, **options)
                for text, pair in zip(texts, pairs)
            ]
            return datasets.Dataset.from_list([dict(row) for row in rows])
        encoded = self.tokenizer(texts, None if None in pairs else pairs, **options)
        return datasets.Dataset.from_dict(dict(encoded))

    def lengths(self, rows: datasets.Dataset) -> list[int]:
        """Tokens of each row."""
        return [len(ids) for ids in rows["input_ids"]]

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """All rows padded to the longest, (rows, longest) each."""
        return dict(self.tokenizer.pad([dict(row) for row in rows], return_tensors="pt"))

    def describe(self, example: LabelledText) -> dict[str, Any]:
        """Its texts."""
        return {"text": example.text} if example.pair is None else {"text": example.text, "pair": example.pair}


def text_classification(recipe: Recipe, task: ClassificationTask) -> "ClassificationPipeline":
    """The pipeline of a task on texts."""
    return ClassificationPipeline(recipe, target_of(recipe, task), TextInputs(recipe))


class ClassificationPipeline(Pipeline):
    """See `Pipeline`. Learning rates are chosen by the task's metric, equal ones by the loss.

    Whatever layers the model's files do not have (head, often a pooler) are trained in full and stored with the adapter:
    made anew on each load they would be others. The base model is measured with them untrained, which is chance.
    """

    def __init__(self, recipe: Recipe, target: Target, inputs: Inputs) -> None:
        self._recipe, self._target, self._inputs = recipe, target, inputs
        if not target.regression and target.labels is None:
            raise ConfigError("task.labels is not set, and there are no training examples to find the classes in.")
        self._labels = None if target.regression else target.labels

    def load_base(self) -> PreTrainedModel:
        """See `Pipeline.load_base`; the head is made by the trainer's seed."""
        return self._load()[0]

    def load_trained(self) -> PreTrainedModel:
        """Load the model of a folder that has a trained head of its own.

        Returns:
            The model, with that head.
        Raises:
            ConfigError: It has none, or one for another number of classes.
        """
        model, new = self._load()
        if new:
            raise ConfigError(
                f"Model {self._recipe.model.path!r} has no trained head for {model.config.num_labels} outputs "
                f"(it lacks {', '.join(new)}); train one with `pica train`, or give the adapter."
            )
        return model

    def adapt(self, section: AdapterSection, *, seed: int) -> peft.PeftModel:
        """See `Pipeline.adapt`; new layers are trained in full."""
        model, new = self._load()
        return attach(model, section, seed=seed, task_type=self._inputs.task_type, modules_to_save=new)

    def read(self, folder: Path) -> peft.PeftModel:
        """See `Pipeline.read`; a tokenizer or image processor beside the adapter is used from now on."""
        self._inputs.take_from(folder)
        return load_adapter(self.load_base(), folder)

    def encode(self, examples: Sequence[Any]) -> datasets.Dataset:
        """The inputs' columns and `label`, a class index or a number."""
        return self._inputs.encode(examples).add_column("label", self._gold(examples))  # pyright: ignore[reportCallIssue]

    @property
    def tokenizer(self) -> Any:
        """That of texts; None where the inputs are others."""
        return getattr(self._inputs, "tokenizer", None)

    def readable(self, rows: datasets.Dataset, tokens: int) -> Any:
        """The rows of texts as they are; of pictures so many batches that each token could be a patch of them."""
        if "input_ids" in rows.column_names:
            return rows
        count = min(len(rows), max(_PICTURES, tokens // _PATCHES))
        batches = range(0, count, _PICTURES)
        return [self._inputs.collate([rows[i] for i in range(at, min(at + _PICTURES, count))]) for at in batches]

    def trainer(self, model: peft.PeftModel, rows: datasets.Dataset, steps: Steps) -> Trainer:
        """transformers' `Trainer` with the model's own loss."""
        return classification_trainer(
            model,
            rows,
            steps,
            collate=self._collate,
            head=head_parameters(model),
        )

    def evaluate(self, model: Any, examples: Sequence[Any], *, reporter: Reporter, label: str) -> Evaluation:
        """The task's metrics, the loss, and every prediction."""
        outputs = self._outputs(model, examples, reporter, label)
        gold = self._gold(examples)
        metrics, loss = self._measured(outputs, gold)
        metric = self._target.metric
        described = [self._inputs.describe(example) for example in examples]
        if self._labels is None:
            predicted = outputs[:, 0].tolist()
            stderr = regression_stderr(metric, predicted, gold)
            rows = [
                {**shown, "predicted": value, "gold": right} for shown, value, right in zip(described, predicted, gold)
            ]
        else:
            predicted = outputs.argmax(-1).tolist()
            stderr = class_stderr(metric, predicted, gold, len(self._labels))
            shared = outputs.softmax(-1).tolist()
            losses = functional.cross_entropy(outputs, torch.tensor(gold), reduction="none").tolist()
            rows = [
                {
                    **shown,
                    "predicted": self._labels[index],
                    "gold": self._labels[right],
                    "correct": index == right,
                    "probabilities": dict(zip(self._labels, map(_rounded, shares))),
                    "loss": lost,
                }
                for shown, index, right, shares, lost in zip(described, predicted, gold, shared, losses)
            ]
        return Evaluation(metric, metrics[metric], stderr, metrics, loss, len(examples), None, rows)

    def held_out(self, model: Any, examples: Sequence[Any]) -> HeldOut:
        """The metric and the loss."""
        metrics, loss = self._measured(self._outputs(model, examples, Silent(), ""), self._gold(examples))
        return HeldOut(loss, metrics[self._target.metric])

    def _load(self) -> tuple[PreTrainedModel, list[str]]:
        recipe, inputs = self._recipe, self._inputs
        model, new = load_classifier(recipe.model, inputs.auto_class, labels=self._labels, seed=recipe.trainer.seed)
        inputs.configure(model)
        return model, new

    def _gold(self, examples: Sequence[Any]) -> list[Any]:
        if self._labels is None:
            return [float(example.label) for example in examples]
        index = {name: number for number, name in enumerate(self._labels)}
        return [index[str(example.label)] for example in examples]

    def _collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self._inputs.collate([{name: value for name, value in row.items() if name != "label"} for row in rows])
        dtype = torch.float32 if self._labels is None else torch.long
        return {**batch, "labels": torch.tensor([row["label"] for row in rows], dtype=dtype)}

    @torch.inference_mode()
    def _outputs(self, model: Any, examples: Sequence[Any], reporter: Reporter, label: str) -> torch.Tensor:
        """The head's outputs in the examples' order, (examples, outputs), float32 on the CPU."""
        model.eval()
        rows = self._inputs.encode(examples, model)
        found = torch.empty(len(examples), 1 if self._labels is None else len(self._labels))
        with reporter.bar(label, len(examples)) as advance:
            for indices in length_batches(self._inputs.lengths(rows), self._recipe.trainer.eval_batch_size):
                batch = self._inputs.collate([rows[index] for index in indices])
                logits = model(**{name: value.to(model.device) for name, value in batch.items()}).logits
                found[indices] = logits.float().cpu()
                advance(len(indices))
        return found

    def _measured(self, outputs: torch.Tensor, gold: list[Any]) -> tuple[dict[str, float], float]:
        if self._labels is None:
            loss = functional.mse_loss(outputs[:, 0], torch.tensor(gold))
            return regression_metrics(outputs[:, 0].tolist(), gold), loss.item()
        loss = functional.cross_entropy(outputs, torch.tensor(gold))
        return class_metrics(outputs.argmax(-1).tolist(), gold, len(self._labels)), loss.item()


def _rounded(share: float) -> float:
    return round(share, 6)
