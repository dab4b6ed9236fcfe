"""Tasks: where problems come from, how they are put to a model, and when an answer is right."""

from difflib import get_close_matches

from pica.errors import ConfigError
from pica.tasks.arithmetic import ArithmeticTask
from pica.tasks.base import (
    TEMPLATES,
    AnyExample,
    ClassificationTask,
    Example,
    GenerationTask,
    Labelled,
    LabelledText,
    Source,
    Split,
    Target,
    Task,
    Template,
)
from pica.tasks.chat import ChatTask, Conversation
from pica.tasks.commonsense import CommonsenseTask
from pica.tasks.decoding import LabelledPicture
from pica.tasks.dreambooth import DreamBoothTask, folder_problem
from pica.tasks.glue import GlueTask
from pica.tasks.math import MathTask
from pica.tasks.pictures import has_pictures
from pica.tasks.pictures import location_problem as picture_location_problem
from pica.tasks.places import check_location
from pica.tasks.places import has_split as has_records
from pica.tasks.preference import Pair, PreferenceTask
from pica.tasks.reward import RewardTask
from pica.tasks.sentiment import SentimentTask
from pica.tasks.vtab import ImagesTask, VtabTask

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        ArithmeticTask(),
        ChatTask(),
        CommonsenseTask(),
        DreamBoothTask(),
        GlueTask(),
        ImagesTask(),
        MathTask(),
        PreferenceTask(),
        RewardTask(),
        SentimentTask(),
        VtabTask(),
    )
}


def get_task(name: str) -> Task:
    """Return the task of that name.

    Raises:
        ConfigError: There is none; the message lists them and the nearest name.
    """
    if name not in TASKS:
        near = get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"Unknown task {name!r}: {hint}the tasks are {', '.join(sorted(TASKS))}.")
    return TASKS[name]


def location_problem(task: Task | None, location: str) -> str | None:
    """What is wrong with a data location for a task, as far as can be told without reading it; None if nothing is."""
    if task is not None and task.kind == "text-to-image":
        return folder_problem(location)
    pictures = task is not None and task.kind == "image-classification"
    return picture_location_problem(location) if pictures else check_location(location)


def has_split(task: Task | None, location: str, split: Split) -> bool:
    """Whether a location is a folder that holds this split."""
    if task is not None and task.kind == "text-to-image":
        return False  # its folder is all of one split
    pictures = task is not None and task.kind == "image-classification"
    return has_pictures(location, split) if pictures else has_records(location, split)


__all__ = [
    "TASKS",
    "TEMPLATES",
    "AnyExample",
    "ClassificationTask",
    "Conversation",
    "Example",
    "GenerationTask",
    "Labelled",
    "LabelledPicture",
    "LabelledText",
    "Pair",
    "Source",
    "Split",
    "Target",
    "Task",
    "Template",
    "get_task",
    "has_split",
    "location_problem",
]
