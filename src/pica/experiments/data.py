"""Examples of a recipe's three splits, and their token sequences."""

import dataclasses
import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from pica.errors import DataError
from pica.experiments.recipe import Recipe
from pica.tasks import AnyExample, ClassificationTask, Example, Source, Split, Target, Task, get_task, has_split
from pica.tasks.base import Bar
from pica.tasks.labelled import check_labels, checked_target, classes_of

logger = logging.getLogger(__name__)

IGNORED = -100  # label of tokens without loss, as torch's cross entropy has it
_MOST_TAKEN_OUT = 1000


@dataclass(frozen=True)
class Splits:
    """Examples to learn from, to choose learning rates by, and to report on, of the task's own type."""

    train: list[Any]
    validation: list[Any]
    test: list[Any]


def source(recipe: Recipe, split: Split, *, limit: int | None, bar: Bar | None = None) -> Source:
    """Where one split of a recipe comes from; `location` is that of training problems where the split has no own."""
    location = getattr(recipe.data, split) or recipe.data.train
    task = get_task(recipe.task.name)
    return Source(
        location,
        limit,
        recipe.data.seed,
        recipe.task.template,
        recipe.data.columns,
        recipe.task.subset,
        target_of(recipe, task) if _has_classes(task) else None,  # pyright: ignore[reportArgumentType]
        recipe.data.skip_unreadable,
        bar,
    )


def _has_classes(task: Task) -> bool:
    return task.kind in ("text-classification", "image-classification")


def target_of(recipe: Recipe, task: ClassificationTask) -> Target:
    """What a classification recipe predicts.

    Raises:
        ConfigError: The recipe's classes or metric do not fit the task.
    """
    return checked_target(task.target(recipe.task.subset), labels=recipe.task.labels, metric=recipe.task.metric)


def with_classes(recipe: Recipe, splits: Splits) -> Recipe:
    """The recipe with the classes that its training examples have, if it needs any; others are returned as they are.

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
    """Whether a recipe chooses anything, learns from validation problems in the end, asks for them, or names them."""
    chooses = len(recipe.trainer.learning_rates) > 1
    chooses |= recipe.baseline.method is not None and len(recipe.baseline.learning_rates) > 1
    return chooses or recipe.data.hold_out or recipe.data.refit or recipe.data.validation is not None


def load_splits(recipe: Recipe, task: Task, *, bar: Bar | None = None) -> Splits:
    """Read or generate all splits.

    Validation problems are the validation source's, else generated ones or those of the training folder, else taken out
    of the training problems by the data seed. Training problems that are test or validation problems too are left out
    with a warning, and so are validation problems that are test problems too. `bar` shows how pictures are decoded.

    Raises:
        DataError: A source is missing, empty or malformed, or holds too few problems.
    """
    if task.kind == "text-to-image":
        return _subject_splits(recipe, task, bar)
    data = recipe.data
    validation: list[Any] = []
    own_source = data.validation is not None or data.train == "embedded" or has_split(task, data.train, "validation")
    if needs_validation(recipe) and own_source:
        validation = list(task.load("validation", source(recipe, "validation", limit=data.validation_limit, bar=bar)))
    if needs_validation(recipe) and not own_source:
        everything = task.load("train", source(recipe, "train", limit=None, bar=bar))
        count = data.validation_limit or max(1, min(len(everything) // 10, _MOST_TAKEN_OUT))
        train, validation = take_out(everything, count, seed=data.seed)
        train = _limited(train, data.train_limit, task, seed=data.seed)
    else:
        train = list(task.load("train", source(recipe, "train", limit=data.train_limit, bar=bar)))
    if task.kind == "chat" and data.test is None and not has_split(task, data.train, "test"):
        count = data.test_limit or max(1, min(len(train) // 10, _MOST_TAKEN_OUT))
        train, test = take_out(train, count, seed=data.seed + 1, what="the test")
    else:
        test = list(task.load("test", source(recipe, "test", limit=data.test_limit, bar=bar)))
    validation = _not_tested(validation, test)
    kept = without(train, [*test, *validation])
    if len(kept) < len(train):
        action = "kept, as data.keep_test_problems says" if data.keep_test_problems else "left out"
        shared = len(train) - len(kept)
        logger.warning("%d of %d training problems are test or validation problems too: %s", shared, len(train), action)
    if not data.keep_test_problems:
        train = kept
    if not train or not test:
        raise DataError(f"data.{'test' if train else 'train'}: no problems are left to use.")
    return Splits(train, validation, test)


def _not_tested(validation: list[Any], test: list[Any]) -> list[Any]:
    """The validation problems that are no test problems: those must choose nothing, nor be learnt from by a refit.

    Raises:
        DataError: None are left.
    """
    kept = without(validation, test)
    if shared := len(validation) - len(kept):
        if not kept:
            raise DataError(
                "data.validation: all of its problems are test problems too, so that the test would choose the learning "
                "rate; name other problems."
            )
        logger.warning("%d of %d validation problems are test problems too: left out", shared, len(validation))
    return kept


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
    if task.kind == "generation" and task.name != "commonsense":
        return examples[:limit]
    return [examples[index] for index in sorted(random.Random(seed).sample(range(len(examples)), limit))]


def without(examples: Sequence[AnyExample], others: Sequence[AnyExample]) -> list[Any]:
    """The examples that are none of the others, whatever the case, spacing and punctuation."""
    taken = {_words(example.identity) for example in others}
    return [example for example in examples if _words(example.identity) not in taken]


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def take_out(
    examples: Sequence[AnyExample], count: int, *, seed: int, what: str = "validation"
) -> tuple[list[Any], list[Any]]:
    """Split examples into (kept, taken out), the latter drawn with a generator of its own.

    Raises:
        DataError: Fewer than twice `count` examples are there.
    """
    if len(examples) < 2 * count:
        raise DataError(
            f"data.train holds {len(examples)} problems, too few to take {count} out for {what}; "
            f"set data.{what.split()[-1]}_limit lower or name a file in data.{what.split()[-1]}."
        )
    chosen = set(random.Random(seed).sample(range(len(examples)), count))
    taken = [example for index, example in enumerate(examples) if index in chosen]
    return without(examples, taken), taken


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Ids of the end-of-text and the padding token, both of which `load_tokenizer` has made sure of."""
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert isinstance(end, int)
    assert isinstance(padding, int)
    return end, padding


def prompt_ids(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the prompts, with the tokenizer's start token if it has one and never with an end token."""
    encoded = tokenizer([example.prompt for example in examples])["input_ids"]
    end, _ = special_ids(tokenizer)
    return [list(ids[:-1] if ids and ids[-1] == end else ids) for ids in encoded]  # pyright: ignore[reportArgumentType]


def encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
) -> datasets.Dataset:
    """Token sequences for training or for measuring a loss.

    Prompt and completion are tokenized apart and joined, so that the loss begins exactly where generation would; an
    end-of-text token closes the completion.

    Args:
        examples: What to encode.
        tokenizer: Tokenizer with an end-of-text token.
        max_length: Sequences are cut off here at the end; those with no completion left are dropped.

    Returns:
        Columns `input_ids` and `labels`, both lists of the sequence's length; labels are -100 on the prompt.

    Raises:
        DataError: No sequence is left.
    """
    prompts = prompt_ids(examples, tokenizer)
    completions = tokenizer([example.completion for example in examples], add_special_tokens=False)["input_ids"]
    end, _ = special_ids(tokenizer)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    cut = 0
    for prompt, completion in zip(prompts, completions):  # pyright: ignore[reportArgumentType]
        ids: list[int] = (prompt + list(completion) + [end])[:max_length]
        cut += max_length is not None and len(prompt) + len(completion) + 1 > max_length
        if len(ids) > len(prompt):
            rows["input_ids"].append(ids)
            rows["labels"].append([IGNORED] * len(prompt) + ids[len(prompt) :])
    if not rows["input_ids"]:
        raise DataError(f"All prompts are longer than trainer.max_length = {max_length}, so nothing can be learnt.")
    if cut:
        logger.warning("%d of %d sequences are cut off at trainer.max_length = %d", cut, len(examples), max_length)
    if dropped := len(examples) - len(rows["input_ids"]):
        logger.warning("%d sequences are dropped: nothing but their prompt was left", dropped)
    return datasets.Dataset.from_dict(rows)
