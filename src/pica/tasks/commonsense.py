"""The eight commonsense sets in the instruction form of LLM-Adapters: choose one of the answers listed."""

import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from pica.errors import DataError
from pica.tasks.base import Example, Kind, Source, Split, make_example
from pica.tasks.columns import has_header, header_names, renamed
from pica.tasks.places import inner_splits, is_saved, split_files
from pica.tasks.records import Record, read_records
from pica.tasks.rows import read_file

SETS = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")
"""The paper's eight, by the names of LLM-Adapters' folders, in the paper's order."""

_FIELDS = {"question": ("instruction",), "context": ("input",), "solution": ("output",), "answer": ("answer",)}
_FORMAT = re.compile(r"answer format:\s*(\S+(?:/\S+)+)", flags=re.IGNORECASE)


class CommonsenseTask:
    """Instructions that end in `Answer format: answer1/answer2/...`, answered by `the correct answer is answer1`.

    A location is a file, or a folder with one folder for each set (`boolq/test.json`, ...): training then takes the
    mixture of all that are there, and the result is the mean of the sets' accuracies, as the paper reports it. As in
    LLM-Adapters, the answer of a generated text is the first of the listed answers in it. A limit leaves a sample.
    """

    name = "commonsense"
    kind: Kind = "generation"
    subsets = ()
    has_embedded = False
    default_template = "alpaca"
    default_max_new_tokens = 32
    other_scores: Mapping[str, Callable[[str, str], bool]] = {}

    def load(self, split: Split, source: Source) -> list[Example]:
        """Read one split; see `Task.load`."""
        if source.location == "embedded":
            raise DataError("Task commonsense has no embedded problems; set data.train and data.test.")
        fields = renamed(_FIELDS, source.columns)
        template = source.template or self.default_template
        records = [
            (group, record) for group, rows in _grouped(split, source.location, fields).items() for record in rows
        ]
        if source.limit is not None and source.limit < len(records):
            chosen = random.Random(source.seed).sample(range(len(records)), source.limit)
            records = [records[index] for index in sorted(chosen)]
        return [_example(record, group, fields, template, split) for group, record in records]

    def extract(self, text: str, example: Example | None = None) -> str | None:
        """The first of the example's choices that stands in the text, whatever the case."""
        choices = example.choices if example is not None else ()
        found = re.search("|".join(map(re.escape, sorted(choices, key=len, reverse=True))), text, flags=re.IGNORECASE)
        return found[0].lower() if choices and found else None

    def correct(self, prediction: str | None, gold: str) -> bool:
        """The same choice."""
        return prediction is not None and prediction == gold.lower()


def _grouped(split: Split, location: str, fields: Mapping[str, tuple[str, ...]]) -> dict[str, list[Record]]:
    """Rows by set; one group without a name for a single file."""
    known, headed = header_names(fields), has_header(fields)
    folder = Path(location).expanduser()
    if not folder.is_dir() or is_saved(folder) or split_files(folder, split):
        return {"": read_records(location, split, names=known, headed=headed)}
    files = inner_splits(folder, split)
    if not files:
        raise DataError(f"{location!r} has neither a {split} file nor folders with one, such as boolq/{split}.json.")
    order = {name: index for index, name in enumerate(SETS)}
    names = sorted(files, key=lambda name: (order.get(name, len(SETS)), name))
    groups = {}
    for name in names:
        rows = (row for file in files[name] for row in read_file(file, names=known, headed=headed))
        groups[name] = [Record(row.fields, row.place) for row in rows]
        if not groups[name]:
            raise DataError(f"{files[name][0]}: the file holds no rows.")
    return groups


def _example(record: Record, group: str, fields: Mapping[str, tuple[str, ...]], template: str, split: Split) -> Example:
    question = record.text(*fields["question"])
    answer = record.text(*fields["answer"]).strip()
    listed = _FORMAT.search(question)
    if listed is None:
        raise DataError(f"{record.place}: the instruction does not end in 'Answer format: ...' with the choices.")
    choices = tuple(listed[1].split("/"))
    if answer not in choices:
        raise DataError(f"{record.place}: answer {answer!r} is none of the choices {', '.join(choices)}.")
    solution = record.text(*fields["solution"], required=False, filled=False).strip()
    if split != "train" and not solution.endswith(answer):  # scoring by likelihood puts other choices in its place
        solution = f"the correct answer is {answer}"
    context = record.text(*fields["context"], required=False, filled=False)
    return make_example(
        template,
        question,
        solution,
        answer=answer,
        context=context,
        choices=choices,
        group=group,
        place=record.place,
    )
