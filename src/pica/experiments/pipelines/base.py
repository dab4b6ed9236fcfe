"""What a kind of task needs of the machinery around a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import datasets
import peft
from transformers import PreTrainedModel, Trainer

from pica.errors import ConfigError
from pica.experiments.evaluate.evaluation import Evaluation
from pica.experiments.recipes.recipe import AdapterSection
from pica.experiments.reporting import Reporter
from pica.experiments.train.trainers import Steps


@dataclass(frozen=True)
class HeldOut:
    """What learning rates are chosen by, measured on examples that nothing was learnt from.

    Attributes:
        loss: As in `Evaluation`; lower is better.
        score: The task's metric, where it costs no more than the loss; higher is better, and it goes before the loss.
    """

    loss: float
    score: float | None = None


class Pipeline(Protocol):
    """From a recipe to a model with an adapter, its inputs, its trainer and its measurements.

    `Any` stands for the task's own kind of example. A pipeline is a subclass, for what it has no use for.
    """

    def load_base(self) -> PreTrainedModel:
        """The frozen base model, in evaluation mode on the CPU; the same values each time.

        Raises:
            ConfigError: The model is not to be had.
        """
        ...

    def adapt(self, section: AdapterSection, *, seed: int) -> peft.PeftModel:
        """A base model with a new adapter.

        Raises:
            ConfigError: The model is not to be had.
            TargetError: A target matches no layer, or the method refuses the model.
        """
        ...

    def read(self, folder: Path) -> peft.PeftModel:
        """A base model with a saved adapter, in evaluation mode on the CPU.

        Raises:
            AdapterFileError: The folder holds no adapter, or one that is damaged or belongs to another model.
        """
        ...

    def encode(self, examples: Sequence[Any]) -> datasets.Dataset:
        """What a trainer takes.

        Raises:
            DataError: Nothing is left to learn from.
        """
        ...

    def readable(self, rows: datasets.Dataset, tokens: int) -> Any:
        """What a model reads when a basis is made from `rows`; see `pica.calibration.texts.calibration`.

        Args:
            rows: The training problems as `encode` gave them.
            tokens: About how many are wanted.

        Returns:
            Rows with `input_ids`, or batches.

        Raises:
            ConfigError: A basis is not made for this kind of task.
        """
        raise ConfigError(
            "adapter.projection: a basis from training data is not made for this task; use principal, or name a basis in "
            "adapter.basis_from."
        )

    def trainer(self, model: peft.PeftModel, rows: datasets.Dataset, steps: Steps) -> Trainer:
        """A trainer that stops with a `TrainingError` at a loss that is no number, and leaves no broken checkpoint."""
        ...

    def evaluate(self, model: Any, examples: Sequence[Any], *, reporter: Reporter, label: str) -> Evaluation:
        """Measure a model, on whatever device it is, on one or more examples; shows a bar called `label`."""
        ...

    def held_out(self, model: Any, examples: Sequence[Any]) -> HeldOut:
        """Measure what learning rates are chosen by, on one or more examples."""
        ...

    # What follows is for those that have a use for it.

    measured: ClassVar[str] = "test problems, held-out"
    """What the loss of `evaluate` is of, in words."""

    def describe(self, examples: Sequence[Any]) -> list[str]:
        """What is to be learnt beyond the number of examples, in lines for whoever watches."""
        return []

    def prepare(self, model: Any, folder: Path, reporter: Reporter) -> None:
        """Make what training needs; `folder` is the run's, `model` None where no training is left.

        Raises:
            DataError, OutputError: Something cannot be read, or not be written.
        """

    def accompany(self, folder: Path) -> None:
        """Write what belongs beside an adapter into its folder."""

    def finish(self, folder: Path, examples: Sequence[Any], titles: Mapping[str, str]) -> Mapping[str, str]:
        """Complete a run's folder when all is measured.

        Args:
            folder: The run's.
            examples: Those that were learnt from.
            titles: What base, adapter and baseline are called, by the name of the folder that the pictures of each are in,
                if they draw.

        Returns:
            Why a score was not measured, by its name.
        """
        return {}


@runtime_checkable
class AnsweringPipeline(Pipeline, Protocol):
    """A pipeline whose models can be asked while they learn."""

    def samples(self, model: Any, examples: Sequence[Any]) -> list[tuple[str, str]]:
        """Questions out of a few of the examples, and the model's answers."""
        ...
