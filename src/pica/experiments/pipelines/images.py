"""Pictures as a classifier's input."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForImageClassification, PreTrainedModel

from pica.errors import DataError
from pica.experiments.data import target_of
from pica.experiments.models import load_image_processor
from pica.experiments.pipelines.classification import ClassificationPipeline
from pica.experiments.recipes.recipe import Recipe
from pica.tasks import ClassificationTask, LabelledPicture
from pica.tasks.decoding import decode


class ImageInputs:
    """One picture, made as large and as bright as the model's own image processor says; no augmentation.

    Pictures are read and decoded when a batch is made: a test set need not fit into memory.
    """

    auto_class = AutoModelForImageClassification
    task_type: str | None = None  # PEFT has no name for it

    def __init__(self, recipe: Recipe) -> None:
        self._section = recipe.model
        self.processor = load_image_processor(recipe.model)
        self._pictures: list[LabelledPicture] = []
        self._dtype = torch.float32

    def take_from(self, adapter: Path) -> None:
        """The adapter's own image processor, if it has one."""
        self.processor = load_image_processor(self._section, beside=adapter)

    def configure(self, model: PreTrainedModel) -> None:
        """Nothing is changed; pictures will have the precision of the model's weights."""
        self._dtype = model.dtype

    def encode(self, examples: Sequence[LabelledPicture], model: Any = None) -> datasets.Dataset:
        """The number under which `collate` finds each picture."""
        begin = len(self._pictures)
        self._pictures.extend(examples)
        return datasets.Dataset.from_dict({"picture": list(range(begin, len(self._pictures)))})

    def lengths(self, rows: datasets.Dataset) -> list[int]:
        """All pictures are the same size to the model."""
        return [1] * len(rows)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch of pictures.

        Returns:
            `pixel_values`, (rows, channels, height, width), in the model's precision.
        Raises:
            DataError: A picture that could be read when the run began cannot be any more.
        """
        pictures = [self._picture(row["picture"]) for row in rows]
        values = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        return {"pixel_values": values.to(self._dtype)}

    def describe(self, example: LabelledPicture) -> dict[str, Any]:
        """Where the picture is."""
        return {"picture": example.place}

    def _picture(self, number: int) -> Any:
        example = self._pictures[number]
        try:
            return decode(example.read())
        except OSError as error:
            raise DataError(f"{example.place}: the picture can no longer be read ({error}).") from error


def image_classification(recipe: Recipe, task: ClassificationTask) -> ClassificationPipeline:
    """The pipeline of a task on pictures."""
    return ClassificationPipeline(recipe, target_of(recipe, task), ImageInputs(recipe))
