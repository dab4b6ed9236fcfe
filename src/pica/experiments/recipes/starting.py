"""A first recipe for one's own model, data and goal, with comments that say what each field is for."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pica.errors import DataError
from pica.experiments.recipes.checks import REQUIRED
from pica.experiments.recipes.parsing import field_help

GOALS = {
    "chat": "to answer as the conversations or instructions in a file do",
    "preference": "to prefer one of two answers, as the pairs in a file do",
    "reward": "to find right answers by itself; those of the data are only what it is held against",
    "math": "to solve mathematics problems; answers are compared by value",
    "arithmetic": "to solve word problems whose answer is a number",
    "commonsense": "to choose among several answers",
    "sentiment": "to put texts into classes, or to give them a number",
    "images": "to put pictures into classes",
    "dreambooth": "to draw one subject in new scenes (Stable Diffusion)",
}
"""What a recipe can be begun for, each a task's name, and what it means."""

_FIELDS: dict[str, dict[str, Any]] = {
    "chat": {"trainer.epochs": 3.0, "trainer.batch_size": 4, "trainer.max_length": 1024},
    "preference": {"preference.beta": 0.1, "trainer.batch_size": 4, "trainer.max_length": 1024},
    "reward": {
        "task.subset": "arithmetic",
        "reward.num_generations": 8,
        "trainer.max_steps": 100,
        "trainer.accumulation": 8,
        "trainer.learning_rate": 2e-4,
    },
    "images": {"trainer.epochs": 10.0},
    "dreambooth": {
        "dreambooth.instance_prompt": "a photo of sks dog",
        "trainer.max_steps": 400,
        "trainer.batch_size": 1,
    },
}
_USUAL: dict[str, Any] = {"trainer.epochs": 1.0, "trainer.batch_size": 8, "trainer.learning_rate": 1e-3}
_WIDTH = 100


def talking_task(location: str, columns: Mapping[str, str]) -> str | None:
    """Task chat or preference, whichever the first row of a local source is for, with its columns under our names.

    Returns:
        The task's name; None where the row is for another task, and where there is none to look at.
    Raises:
        DataError: The source cannot be read, or its first row has none of such a column.
    """
    from pica.tasks.places import check_location, is_hub

    if location == "embedded" or is_hub(location) or check_location(location):
        return None
    return task_of_first_row(location, columns)


def task_of_first_row(location: str, columns: Mapping[str, str]) -> str | None:
    """`talking_task` of any source; one on the hub is loaded."""
    from pica.tasks import chat, preference
    from pica.tasks.messages import under_our_names
    from pica.tasks.records import Record
    from pica.tasks.rows import read_rows

    names = {*chat.field_names(), *preference.field_names(), *columns.values()}
    first = next(iter(read_rows(location, "train", names=names)), None)
    if first is None:
        return None
    fields = under_our_names(Record(first.fields, first.place), columns).fields
    if preference.looks_like_preferences(fields):
        return "preference"
    return "chat" if chat.looks_like_chat(fields) else None


def likely_goal(location: str) -> str:
    """The goal that a source of data suggests."""
    try:
        return talking_task(location, {}) or "arithmetic"
    except DataError:  # said where the recipe is used
        return "arithmetic"


def starting_recipe(model: str, data: str, goal: str) -> str:
    """A recipe as YAML, with each field's help beside it.

    Args:
        model: Folder or hub name.
        data: Where the training problems come from.
        goal: One of `GOALS`.

    Returns:
        Text that `load_recipe` reads. Where the goal needs test problems from a place of their own, their field says so.
    """
    values: dict[str, Any] = {"model.path": model, "data.train": data}
    if goal not in ("chat", "preference", "dreambooth") and data != "embedded" and not Path(data).expanduser().is_dir():
        values["data.test"] = REQUIRED
    values |= {"task.name": goal, "adapter.method": "pica", "adapter.r": 32}
    values |= _USUAL | _FIELDS.get(goal, {})
    if "trainer.max_steps" in values:
        del values["trainer.epochs"]
    texts = field_help()
    lines = ["# All fields: pica train --help-all", "", f"name: {goal}"]
    for section in dict.fromkeys(name.partition(".")[0] for name in values):
        lines += ["", f"{section}:"]
        for name, value in values.items():
            if name.startswith(f"{section}."):
                lines += _commented(name.partition(".")[2], value, texts[name])
    return "\n".join(lines) + "\n"


def _commented(name: str, value: Any, text: str) -> list[str]:
    """A field with its help above it."""
    comment = textwrap.wrap(text, _WIDTH, initial_indent="  # ", subsequent_indent="  # ", break_on_hyphens=False)
    return [*comment, f"  {name}: {yaml.safe_dump(value, allow_unicode=True).partition(chr(10))[0]}"]
