"""Rows with one or two texts and a label, from any file, as examples of a classification task."""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence

from pica.errors import ConfigError, DataError
from pica.tasks.base import Labelled, LabelledText, Source, Split, Target
from pica.tasks.columns import header_names, renamed
from pica.tasks.records import Record, class_name, read_records, shown

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
    Returns:
        The examples, in the order of the file.
    Raises:
        DataError: A row lacks a field, its label is no class of the target, or the file has no right header.
        ConfigError: The source's columns name a field that the task does not have.
    """
    accepted = renamed(fields, source.columns)
    records = read_records(source.location, split, names=header_names(accepted))
    bare = "1" in records[0].fields and records[0].place.endswith(", line 1")  # of a table without a header
    column = next((name for name in accepted["label"] if name in records[0].fields), None)
    if bare and column and split == "train" and target.labels is None and not target.regression:
        # Before any row is sampled, or left out as a test problem too: the header of a test file is the same.
        _check_first([class_name(record.fields.get(column)) for record in records], records[0].place)
    if source.limit is not None and source.limit < len(records):
        chosen = random.Random(source.seed).sample(range(len(records)), source.limit)
        records = [records[index] for index in sorted(chosen)]
    examples = []
    for record in records:
        text = record.text(*accepted["text"], filled=False)
        second = record.text(*accepted["pair"], required=bool(pair), filled=False) if pair is not False else None
        label = label_of(record, accepted["label"], target, names)
        examples.append(LabelledText(text, label, second if pair else second or None, record.place, bare))
    if target.labels is not None:
        check_labels(examples, target.labels, split)
    return examples


def label_of(record: Record, accepted: Sequence[str], target: Target, names: Mapping[str, str]) -> str | float:
    """Read a row's label; labels are compared by value, see `pica.tasks.records.class_name`.

    Args:
        record: The row.
        accepted: Names of the field, the preferred one first.
        target: Says whether labels are classes or numbers.
        names: As for `read_labelled`.
    Returns:
        The name of a class, or a number.
    Raises:
        DataError: It is missing or NaN, or is no (finite) number where the target is one.
    """
    written = record.label(*accepted)
    if not target.regression:
        return names.get(written, written)
    try:
        number = float(written)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"{record.place}: label {shown(written)} is not a number, which task.metric = {target.metric} needs."
        )
    return number


SECRET = (
    "label -1 marks rows whose label is kept secret; use the validation rows for the test, and leave data.validation "
    "unset."
)


def classes_of(train: Sequence[Labelled]) -> tuple[str, ...]:
    """Collect the classes that training examples have.

    Returns:
        Their names, numbers by value and others by alphabet.
    Raises:
        DataError: There are fewer than two, or the first row is a header that was not recognised.
    """
    counts: dict[str, int] = {}
    for example in train:
        counts[str(example.label)] = counts.get(str(example.label), 0) + 1
    first = str(train[0].label)
    if isinstance(train[0], LabelledText) and train[0].bare:
        _check_first([str(example.label) for example in train], train[0].place)
    if len(counts) < 2:
        raise DataError(f"All training examples have the label {first!r}; a classifier needs two classes or more.")
    if len(counts) > _MOST_CLASSES:
        raise DataError(
            f"The training data has {len(counts)} different labels, which can hardly be classes ({first!r}, ...). For "
            "numbers set task.metric to pearson or spearman; for classes set task.labels."
        )
    if all(map(_is_number, counts)):
        return tuple(sorted(counts, key=lambda name: (float(name), name)))
    return tuple(sorted(counts))


_MOST_CLASSES = 1000


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False


def _check_first(labels: Sequence[str], place: str) -> None:
    """Raise `DataError` if a table's first row looks like a header: its label is the only one of its kind."""
    counts = Counter(labels)
    first = counts.pop(labels[0]) if labels else 0
    if first == 1 and len(labels) > 3 and all(count > 1 for count in counts.values()):
        raise DataError(
            f"{place}: label {shown(labels[0])} is the only one of its kind in the training data. If that row is a header, "
            "name its columns with data.columns, for instance {text: review, label: stars}; if it is not, set task.labels."
        )


def check_labels(examples: Sequence[Labelled], labels: Sequence[str], what: str) -> None:
    """Check that every label is one of the classes.

    Raises:
        DataError: One is not; the message names the row and the classes.
    """
    known = set(labels)
    for example in examples:
        if example.label not in known:
            listed = ", ".join(map(repr, labels[:10])) + (", ..." if len(labels) > 10 else "")
            hint = ""
            if example.label == "-1":
                hint = f" In published sets {SECRET}"
            elif isinstance(example, LabelledText) and example.bare and example.place.endswith(", line 1"):
                hint = " If that row is a header, name its columns with data.columns."
            raise DataError(f"{example.place}: label {example.label!r} of the {what} data is none of {listed}.{hint}")


def checked_target(target: Target, *, labels: Sequence[str] | None, metric: str | None) -> Target:
    """Put the user's own classes and metric into a task's target.

    Args:
        target: The task's.
        labels: The user's classes; None leaves the task's.
        metric: The user's metric; None leaves the task's.
    Returns:
        The target of the run.
    Raises:
        ConfigError: The task's classes are fixed, or the metric does not fit them.
    """
    named = tuple(class_name(label) for label in labels or ())
    if labels is not None and target.labels is not None and named != target.labels:
        raise ConfigError(f"task.labels: this task's classes are {', '.join(target.labels)}; leave it out.")
    chosen = Target(target.labels if labels is None else named, metric or target.metric)
    if chosen.regression and chosen.labels is not None:
        raise ConfigError(f"task.metric = {chosen.metric} is for numbers, and this task has classes.")
    if target.regression and not chosen.regression:
        raise ConfigError(f"task.metric = {chosen.metric} is for classes, and this task predicts a number.")
    return chosen
