"""Rows with one or two texts and a label, from any file, as examples of a classification task."""

import random
from collections.abc import Mapping, Sequence

from pica.errors import ConfigError, DataError
from pica.tasks.base import Labelled, LabelledText, Source, Split, Target
from pica.tasks.columns import header_names, renamed
from pica.tasks.records import Record, read_records

Fields = Mapping[str, tuple[str, ...]]
"""Accepted names of the fields `text`, `label` and, for tasks on two texts, `pair`."""


def read_labelled(
    split: Split, source: Source, fields: Fields, target: Target, *, pair: bool | None, names: Mapping[str, str] = {}
) -> list[LabelledText]:
    """Read one split.

    A limit leaves a sample drawn by the source's seed, in the file's order, since files are often sorted by class.

    Args:
        split: Which file of a folder is meant.
        source: Where the rows are; its columns rename `fields`.
        fields: Accepted names of each field.
        target: What the labels are.
        pair: Whether rows have two texts; None: those that have the field.
        names: Spellings of labels in files to names of classes, for instance class numbers.

    Raises:
        DataError: A row lacks a field, its label is no class of the target, or the file has no right header.
        ConfigError: The source's columns name a field that the task does not have.
    """
    accepted = renamed(fields, source.columns)
    records = read_records(source.location, split, names=header_names(accepted))
    if source.limit is not None and source.limit < len(records):
        chosen = random.Random(source.seed).sample(range(len(records)), source.limit)
        records = [records[index] for index in sorted(chosen)]
    examples = []
    for record in records:
        text = record.text(*accepted["text"], filled=False)
        second = record.text(*accepted["pair"], required=bool(pair), filled=False) if pair is not False else None
        label = label_of(record, accepted["label"], target, names)
        examples.append(LabelledText(text, label, second if pair else second or None, record.place))
    if target.labels is not None:
        check_labels(examples, target.labels, split)
    return examples


def label_of(record: Record, accepted: Sequence[str], target: Target, names: Mapping[str, str]) -> str | float:
    """A row's label, as a class or as a number.

    Raises:
        DataError: It is missing, or is no number where the target is one, or is GLUE's mark of a secret one.
    """
    written = record.text(*accepted).strip()
    label = names.get(written, written)
    if target.regression:
        try:
            return float(label)
        except ValueError:
            raise DataError(
                f"{record.place}: label {written!r} is not a number, which task.metric = {target.metric} needs."
            ) from None
    if label == "-1":
        raise DataError(
            f"{record.place}: label -1 marks rows whose label is kept secret; use the validation rows for the test, and "
            "leave data.validation unset."
        )
    return label


def classes_of(train: Sequence[Labelled]) -> tuple[str, ...]:
    """The classes that training examples have, numbers by value and names by alphabet.

    Raises:
        DataError: There are fewer than two, or the first row is a header that was not recognised.
    """
    counts: dict[str, int] = {}
    for example in train:
        counts[str(example.label)] = counts.get(str(example.label), 0) + 1
    first = str(train[0].label)
    alone = counts[first] == 1 and len(train) > 3 and isinstance(train[0], LabelledText)
    if alone and all(count > 1 for name, count in counts.items() if name != first):
        raise DataError(
            f"{train[0].place}: label {first!r} is the only one of its kind in the training data. If that row is a header, "
            "name its columns with data.columns, for instance {text: review, label: stars}; if it is not, set task.labels."
        )
    if len(counts) < 2:
        raise DataError(f"All training examples have the label {first!r}; a classifier needs two classes or more.")
    if len(counts) > _MOST_CLASSES:
        raise DataError(
            f"The training data has {len(counts)} different labels, which can hardly be classes ({first!r}, ...). For "
            "numbers set task.metric to pearson or spearman; for classes set task.labels."
        )
    if all(name.isdecimal() for name in counts):
        return tuple(sorted(counts, key=int))
    return tuple(sorted(counts))


_MOST_CLASSES = 1000


def check_labels(examples: Sequence[Labelled], labels: Sequence[str], what: str) -> None:
    """Check that every label is one of the classes.

    Raises:
        DataError: One is not; the message names the row and the classes.
    """
    known = set(labels)
    for example in examples:
        if example.label not in known:
            shown = ", ".join(map(repr, labels[:10])) + (", ..." if len(labels) > 10 else "")
            raise DataError(f"{example.place}: label {example.label!r} of the {what} data is none of {shown}.")


def checked_target(target: Target, *, labels: Sequence[str] | None, metric: str | None) -> Target:
    """A task's target with the user's own classes and metric.

    Raises:
        ConfigError: The task's classes are fixed, or the metric does not fit them.
    """
    if labels is not None and target.labels is not None and tuple(labels) != target.labels:
        raise ConfigError(f"task.labels: this task's classes are {', '.join(target.labels)}; leave it out.")
    chosen = Target(target.labels if labels is None else tuple(labels), metric or target.metric)
    if chosen.regression and chosen.labels is not None:
        raise ConfigError(f"task.metric = {chosen.metric} is for numbers, and this task has classes.")
    if target.regression and not chosen.regression:
        raise ConfigError(f"task.metric = {chosen.metric} is for classes, and this task predicts a number.")
    return chosen
