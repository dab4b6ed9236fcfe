"""Answers that are rewarded when they are right: the problems and the scoring of the tasks whose answers can be checked."""

import dataclasses
import logging

from pica.errors import ConfigError, DataError
from pica.tasks.arithmetic import ArithmeticTask
from pica.tasks.base import Example, GenerationTask, Kind, Source, Split
from pica.tasks.commonsense import CommonsenseTask
from pica.tasks.math import MathTask

logger = logging.getLogger(__name__)

SCORED: dict[str, GenerationTask] = {task.name: task for task in (ArithmeticTask(), CommonsenseTask(), MathTask())}
"""The tasks whose answers can be checked, by the name that `task.subset` takes."""


class RewardTask:
    """Problems of another task, to be answered by the model itself; what is learnt from is whether its answers are right."""

    name = "reward"
    kind: Kind = "reward"
    subsets = tuple(SCORED)
    has_embedded = True

    def load(self, split: Split, source: Source) -> list[Example]:
        """Read one split of the task that `source.subset` names; problems without an answer to check by are left out."""
        task = scored_task(source.subset)
        examples = task.load(split, dataclasses.replace(source, subset=None))
        kept = [example for example in examples if example.answer]
        for example in examples:
            if not example.answer:
                source.leave_out(example.place, example.prompt, "has no answer that can be checked")
        if not kept:
            raise DataError(
                f"{source.location}: none of the {len(examples)} problems has an answer that task {task.name} can check, so "
                "nothing could be rewarded."
            )
        if len(kept) < len(examples):
            logger.warning(
                "%d of %d problems have no answer that can be checked and are left out",
                len(examples) - len(kept),
                len(examples),
            )
        return kept


def scored_task(name: str | None) -> GenerationTask:
    """Find the task that scores answers, by the name that `task.subset` takes.

    Returns:
        One of `SCORED`.

    Raises:
        ConfigError: There is none of that name, or it cannot score answers.
    """
    if name not in SCORED:
        raise ConfigError(unscored(name))
    return SCORED[name]


def unscored(name: str | None) -> str:
    """That a task is not one of `SCORED`, in a sentence."""
    return (
        f"task.subset = {name!r}: task reward needs a task that can tell right answers from wrong ones; choose one of "
        f"{', '.join(SCORED)}."
    )
