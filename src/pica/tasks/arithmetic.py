"""Arithmetic word problems: generated ones that need no file, and instruction files in the LLM-Adapters form."""

import logging
from collections.abc import Callable, Mapping
from fractions import Fraction

from pica.errors import DataError
from pica.tasks.base import Example, Kind, Source, Split, make_example
from pica.tasks.columns import has_header, header_names, renamed
from pica.tasks.numbers import answer_in, same_number, whole_number
from pica.tasks.records import read_records, shown
from pica.tasks.wordproblems import generate

logger = logging.getLogger(__name__)

_FIELDS = {"question": ("instruction",), "context": ("input",), "solution": ("output",), "answer": ("answer",)}
_TOLERANCE = Fraction(1, 1000)
_EMBEDDED_COUNTS = {"train": 2000, "validation": 200, "test": 400}  # where the source sets no limit


class ArithmeticTask:
    """Word problems whose worked solution ends in `The answer is N.`, scored by the value of N.

    Files are JSON or JSON lines with `instruction`, `input` (may be empty or missing), `output` and `answer`. The
    answer of a generated text is the first number after "the answer is", or its last number where it never says so.
    Training rows whose answer is not a number (multiple choice) are learnt from, those without a worked solution are
    left out with a warning; test rows need a number and no solution.
    """

    name = "arithmetic"
    kind: Kind = "generation"
    subsets = ()
    has_embedded = True
    default_template = "question"
    default_max_new_tokens = 96
    other_scores: Mapping[str, Callable[[str, str], bool]] = {}
    markers = ("the answer is",)

    def load(self, split: Split, source: Source) -> list[Example]:
        """Generate or read one split; see `Task.load`."""
        template = source.template or self.default_template
        if source.location == "embedded":
            count = source.limit or _EMBEDDED_COUNTS[split]
            problems = generate(split, count, seed=source.seed)
            return [make_example(template, p.question, p.solution, answer=str(p.answer)) for p in problems]
        fields = renamed(_FIELDS, source.columns)
        examples: list[Example] = []
        unsolved: list[str] = []
        known, headed = header_names(fields), has_header(fields)
        for record in read_records(source.location, split, names=known, headed=headed)[: source.limit]:
            written = record.text(*fields["answer"])
            answer = whole_number(written)
            if answer is None and split != "train":
                raise DataError(f"{record.place}: field {fields['answer'][0]!r} is not a number: {shown(written)}.")
            question = record.text(*fields["question"])
            context = record.text(*fields["context"], required=False, filled=False)
            solution = record.text(*fields["solution"], required=split == "train", filled=False).strip()
            if not solution and split == "train":
                unsolved.append(record.place)
                source.leave_out(record.place, question, "no worked solution to learn from")
                continue
            example = make_example(
                template, question, solution, answer=answer or "", context=context, place=record.place
            )
            examples.append(example)
        if unsolved:
            logger.warning(
                "%d of the rows have no worked solution to learn from and are left out, the first at %s",
                len(unsolved),
                unsolved[0],
            )
        return examples

    def extract(self, text: str, example: Example | None = None) -> str | None:
        """The number that a generated solution ends in."""
        return answer_in(text, self.markers)

    def correct(self, prediction: str | None, gold: str) -> bool:
        """Equality of values within 0.001, the tolerance that LLM-Adapters scores these sets with."""
        return same_number(prediction, gold, tolerance=_TOLERANCE)
