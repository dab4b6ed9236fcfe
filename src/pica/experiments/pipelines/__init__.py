"""How each kind of task meets a model. The rest of the package only knows `Pipeline`, and so works for all of them.

A new kind is one file here with a subclass of `Pipeline`, a line in `_MAKERS`, and its name in `pica.tasks.base.Kind`. What
has a classification head shares `classification.py` and brings only its `Inputs`.
"""

from collections.abc import Callable
from typing import Any

from pica.errors import ConfigError
from pica.experiments.pipelines.base import AnsweringPipeline, HeldOut, Pipeline
from pica.experiments.pipelines.chat import ChatPipeline
from pica.experiments.pipelines.classification import text_classification
from pica.experiments.pipelines.generation import GenerationPipeline
from pica.experiments.pipelines.images import image_classification
from pica.experiments.pipelines.preference import PreferencePipeline
from pica.experiments.pipelines.reward import RewardPipeline
from pica.experiments.recipes.recipe import Recipe
from pica.tasks import get_task


def _text_to_image(recipe: Recipe, task: Any) -> Pipeline:
    """Imported on use: diffusers is an extra, and takes its seconds."""
    try:
        import diffusers  # noqa: F401 -- only whether it is there

        from pica.experiments.pipelines.dreambooth import DreamBoothPipeline
    except ImportError as error:
        raise ConfigError(
            f"Task {task.name} needs diffusers and Pillow ({error}): pip install 'pica-peft[diffusion]'."
        ) from error
    return DreamBoothPipeline(recipe)


_MAKERS: dict[str, Callable[..., Any]] = {
    "chat": ChatPipeline,
    "generation": GenerationPipeline,
    "preference": PreferencePipeline,
    "reward": RewardPipeline,
    "text-classification": text_classification,
    "image-classification": image_classification,
    "text-to-image": _text_to_image,
}


def make_pipeline(recipe: Recipe) -> Pipeline:
    """Make the pipeline for a recipe's task.

    Args:
        recipe: A checked recipe; for a classification task with its classes, see `pica.experiments.data.with_classes`.
    Returns:
        The pipeline, with its tokenizer or image processor, and without a model.
    Raises:
        ConfigError: The model's folder is incomplete, or the hub has no such model or cannot be reached.
    """
    task = get_task(recipe.task.name)
    return _MAKERS[task.kind](recipe, task)


__all__ = ["AnsweringPipeline", "HeldOut", "Pipeline", "make_pipeline"]
