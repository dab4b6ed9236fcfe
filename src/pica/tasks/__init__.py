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
    LabelledText,
    Source,
    Split,
    Target,
    Task,
    Template,
)
from pica.tasks.commonsense import CommonsenseTask
from pica.tasks.glue import GlueTask
from pica.tasks.math import MathTask
from pica.tasks.sentiment import SentimentTask

TASKS: dict[str, Task] = {
    task.name: task for task in (ArithmeticTask(), CommonsenseTask(), GlueTask(), MathTask(), SentimentTask())
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


__all__ = [
    "TASKS",
    "TEMPLATES",
    "AnyExample",
    "ClassificationTask",
    "Example",
    "GenerationTask",
    "LabelledText",
    "Source",
    "Split",
    "Target",
    "Task",
    "Template",
    "get_task",
]
