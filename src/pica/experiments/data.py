"""Examples of a recipe's three splits. Nothing here needs torch: what is wrong with a file shows before that is imported."""

import dataclasses
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pica.errors import DataError
from pica.experiments.mixing import mixed
from pica.experiments.recipes.recipe import Recipe, columns_of, places_of, weights_of, with_absolute_paths
from pica.tasks import AnyExample, ClassificationTask, Source, Split, Target, Task, get_task, has_split
from pica.tasks.base import TALKING, Bar, LeftOut
from pica.tasks.identity import same_problem
from pica.tasks.labelled import check_labels, checked_target, classes_of

logger = logging.getLogger(__name__)

_MOST_TAKEN_OUT = 1000


@dataclass(frozen=True)
class Splits:
    """Examples to learn from, to choose learning rates by, and to report on, of the task's own type; and what is unused."""

    train: list[Any]
    validation: list[Any]
    test: list[Any]
    left_out: list[LeftOut] = field(default_factory=list)


def source(
    recipe: Recipe,
    split: Split,
    *,
    limit: int | None,
    place: str | None = None,
    name: str | None = None,
    bar: Bar | None = None,
    left_out: Callable[[LeftOut], None] | None = None,
) -> Source:
    """Where one split of a recipe comes from; the training problems' first place where it has none of its own.

    Args:
        recipe: All settings.
        split: Whose problems.
        limit: How many of them at most.
        place: Which of several sources.
        name: What `data.columns` calls that source, if not by its place.
        bar: Shows how pictures are decoded.
        left_out: Is told of what is not used.
    Returns:
        What a task reads.
    """
    location = place or next(iter(places_of(recipe.data, split) or places_of(recipe.data, "train")))
    task = get_task(recipe.task.name)
    return Source(
        location,
        limit,
        recipe.data.seed,
        recipe.task.template,
        columns_of(recipe.data.columns, split, name or place),
        recipe.task.subset,
        target_of(recipe, task) if _has_classes(task) else None,  # pyright: ignore[reportArgumentType]
        recipe.data.skip_unreadable,
        bar,
        left_out,
    )


def _has_classes(task: Task) -> bool:
    return task.kind in ("text-classification", "image-classification")


def target_of(recipe: Recipe, task: ClassificationTask) -> Target:
    """Find out what a classification recipe predicts.

    Returns:
        The task's target with the recipe's classes and metric.
    Raises:
        ConfigError: The recipe's classes or metric do not fit the task.
    """
    return checked_target(task.target(recipe.task.subset), labels=recipe.task.labels, metric=recipe.task.metric)


def with_classes(recipe: Recipe, splits: Splits) -> Recipe:
    """Note the classes that the training examples have, where a recipe needs any.

    Returns:
        The recipe with them; others as they are.
    Raises:
        DataError: There is only one class, or another split has one that the training examples lack.
    """
    task = get_task(recipe.task.name)
    if not _has_classes(task):
        return recipe
    target = target_of(recipe, task)  # pyright: ignore[reportArgumentType] -- its kind says so
    if target.regression:
        return recipe
    labels = target.labels or classes_of(splits.train)
    for name in ("train", "validation", "test"):
        check_labels(getattr(splits, name), labels, name)
    return dataclasses.replace(recipe, task=dataclasses.replace(recipe.task, labels=list(labels)))


def needs_validation(recipe: Recipe) -> bool:
    """Whether a recipe chooses anything, watches or learns from validation problems, asks for them, or names them."""
    chooses = len(recipe.trainer.learning_rates) > 1 or recipe.trainer.eval_steps is not None
    chooses |= recipe.baseline.method is not None and len(recipe.baseline.learning_rates) > 1
    return chooses or recipe.data.hold_out or recipe.data.refit or recipe.data.validation is not None


def load_splits(recipe: Recipe, task: Task, *, bar: Bar | None = None) -> Splits:
    """Read or generate all splits.

    Validation problems are the validation source's, else generated ones or those of the training folder, else taken out
    of the training problems by the data seed. Training problems that are test or validation problems too are left out
    with a warning, and so are validation problems that are test problems too; `Splits.left_out` lists them. `bar` shows how
    pictures are decoded.

    Returns:
        The examples of each split, and what was left out.
    Raises:
        DataError: A source is missing, empty or malformed, or holds too few problems.
    """
    if task.kind == "text-to-image":
        return _subject_splits(recipe, task, bar)
    data = recipe.data
    left_out: list[LeftOut] = []

    def load(split: Split, limit: int | None) -> list[Any]:
        return _read(recipe, task, split, limit=limit, bar=bar, left_out=left_out.append)

    validation: list[Any] = []
    own_source = data.validation is not None or data.train == "embedded" or _in_folder(recipe, task, "validation")
    if needs_validation(recipe) and own_source:
        validation = load("validation", data.validation_limit)
    if needs_validation(recipe) and not own_source:
        everything = load("train", None)
        count = data.validation_limit or max(1, min(len(everything) // 10, _MOST_TAKEN_OUT))
        train, validation = take_out(everything, count, seed=data.seed, left_out=left_out.append)
        if isinstance(data.train, str):
            train = _limited(train, data.train_limit, task, seed=data.seed)
    else:
        # Of several sources all: a part is still to be held out, of all alike, and weights are of what is left then.
        train = load("train", data.train_limit if isinstance(data.train, str) else None)
    if held_out(recipe, task):
        count = data.test_limit or max(1, min(len(train) // 10, _MOST_TAKEN_OUT))
        train, test = take_out(train, count, seed=data.seed + 1, split="test", left_out=left_out.append)
    else:
        test = load("test", data.test_limit)
    validation = _not_tested(validation, test, left_out.append)
    told = None if data.keep_test_problems else left_out.append
    kept = without(without(train, test, _of_another("test", told)), validation, _of_another("validation", told))
    if len(kept) < len(train):
        action = "kept, as data.keep_test_problems says" if data.keep_test_problems else "left out"
        shared = len(train) - len(kept)
        logger.warning("%d of %d training problems are test or validation problems too: %s", shared, len(train), action)
    if not data.keep_test_problems:
        train = kept
    if not isinstance(data.train, str):
        train = mixed(train, weights_of(data.train), seed=data.seed)[: data.train_limit]
    if not train or not test:
        raise DataError(f"data.{'test' if train else 'train'}: no problems are left to use.")
    return Splits(train, validation, test, left_out)


def load_texts(recipe: Recipe) -> Splits | None:
    """`load_splits` for what can be read before torch is imported, so that a missing column shows at once.

    Returns:
        The examples as a run has them, with absolute paths in their places; None for tasks on pictures.
    Raises:
        DataError: As `load_splits`.
    """
    task = get_task(recipe.task.name)
    return None if "image" in task.kind else load_splits(with_absolute_paths(recipe), task)


def held_out(recipe: Recipe, task: Task) -> bool:
    """Whether the test problems are taken out of the training ones, since there are no others."""
    own = recipe.data.test is not None or recipe.data.train == "embedded" or _in_folder(recipe, task, "test")
    return task.kind in TALKING and not own


def _in_folder(recipe: Recipe, task: Task, split: Split) -> bool:
    """Whether the training problems' own folder holds this split too; of several sources it is taken out of all."""
    return isinstance(recipe.data.train, str) and has_split(task, recipe.data.train, split)


def _not_tested(validation: list[Any], test: list[Any], told: Callable[[LeftOut], None]) -> list[Any]:
    """Leave out validation problems that are test problems: those must choose nothing, nor be learnt from by a refit.

    Returns:
        The others.
    Raises:
        DataError: None are left.
    """
    kept = without(validation, test, _of_another("test", told))
    if shared := len(validation) - len(kept):
        if not kept:
            raise DataError(
                "data.validation: all of its problems are test problems too, so that the test would choose the learning "
                "rate; name other problems."
            )
        logger.warning("%d of %d validation problems are test problems too: left out", shared, len(validation))
    return kept


def read_all(recipe: Recipe, split: Split, *, bar: Bar | None = None) -> list[Any]:
    """Read all that the sources of one split hold; nothing is held out. `bar` shows how pictures are decoded.

    Returns:
        The examples, each once.
    Raises:
        DataError: A source is missing, empty or malformed.
    """
    return _read(recipe, get_task(recipe.task.name), split, limit=getattr(recipe.data, f"{split}_limit"), bar=bar)


def _read(
    recipe: Recipe,
    task: Task,
    split: Split,
    *,
    limit: int | None,
    bar: Bar | None = None,
    left_out: Callable[[LeftOut], None] | None = None,
) -> list[Any]:
    """The examples of a split, of several sources one after the other, of each at most `limit`."""

    def load(place: str | None = None, name: str | None = None) -> list[Any]:
        return list(
            task.load(split, source(recipe, split, limit=limit, place=place, name=name, bar=bar, left_out=left_out))
        )

    if split == "train" and not isinstance(recipe.data.train, str):
        places = weights_of(recipe.data.train)
        return [dataclasses.replace(one, source=place) for place in places for one in load(place)]
    if split == "test" and isinstance(recipe.data.test, dict):
        return [_in_group(one, name) for name, place in recipe.data.test.items() for one in load(place, name)]
    return load()


def _in_group(example: Any, name: str) -> Any:
    """The example as one of the named test problems, which may have sets of their own."""
    return dataclasses.replace(example, group=f"{name}, {example.group}" if example.group else name)


def _subject_splits(recipe: Recipe, task: Task, bar: Bar | None) -> Splits:
    """Pictures of one subject. They are few: the ones learnt from are also measured on, unless others are named."""
    data = recipe.data
    train = list(task.load("train", source(recipe, "train", limit=data.train_limit, bar=bar)))
    validation: list[Any] = []
    if needs_validation(recipe) and data.validation is not None:
        validation = list(task.load("validation", source(recipe, "validation", limit=data.validation_limit, bar=bar)))
    elif needs_validation(recipe):
        train, validation = take_out(train, data.validation_limit or 1, seed=data.seed)
    test = (
        train if data.test is None else list(task.load("test", source(recipe, "test", limit=data.test_limit, bar=bar)))
    )
    return Splits(train, validation, test)


def _limited(examples: list[Any], limit: int | None, task: Task, *, seed: int) -> list[Any]:
    """As the tasks' own reading has it: a sample where files are often sorted (by class, by set), else the first ones."""
    if limit is None or limit >= len(examples):
        return examples
    if task.kind in ("generation", "reward") and task.name != "commonsense":
        return examples[:limit]
    return [examples[index] for index in sorted(random.Random(seed).sample(range(len(examples)), limit))]


def without(
    examples: Sequence[AnyExample],
    others: Sequence[AnyExample],
    told: Callable[[AnyExample, AnyExample], None] | None = None,
) -> list[Any]:
    """The examples that are none of the others (see `pica.tasks.identity`); `told` is given each double and its other."""
    taken = {same_problem(example.identity): example for example in reversed(others)}
    kept = []
    for example in examples:
        other = taken.get(same_problem(example.identity))
        if other is None:
            kept.append(example)
        elif told is not None:
            told(example, other)
    return kept


def _of_another(
    split: Split, told: Callable[[LeftOut], None] | None
) -> Callable[[AnyExample, AnyExample], None] | None:
    """What notes a problem as left out since it is one of another split too."""
    if told is None:
        return None

    def note(example: AnyExample, other: AnyExample) -> None:
        where = f" ({other.place})" if other.place else ""
        told(LeftOut(example.place, example.identity, f"is a {split} problem too{where}"))

    return note


def take_out(
    examples: Sequence[AnyExample],
    count: int,
    *,
    seed: int,
    split: Split = "validation",
    left_out: Callable[[LeftOut], None] | None = None,
) -> tuple[list[Any], list[Any]]:
    """Take some examples out, drawn with a generator of its own; doubles of them are left out.

    Returns:
        The examples that stay, and those taken out.
    Raises:
        DataError: Fewer than twice `count` examples are there.
    """
    if len(examples) < 2 * count:
        raise DataError(
            f"data.train holds {len(examples)} problems, too few to take {count} out for {split}; "
            f"set data.{split}_limit lower or name a file in data.{split}."
        )
    chosen = set(random.Random(seed).sample(range(len(examples)), count))
    taken = [example for index, example in enumerate(examples) if index in chosen]
    rest = [example for index, example in enumerate(examples) if index not in chosen]
    return without(rest, taken, _of_another(split, left_out)), taken
