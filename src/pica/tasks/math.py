"""Mathematics: GSM8K, MATH and MetaMathQA files, scored by the value of the final answer."""

import re
from collections.abc import Callable, Mapping

from pica.errors import DataError
from pica.tasks.base import Example, Kind, Source, Split, make_example
from pica.tasks.columns import has_header, header_names, renamed
from pica.tasks.formulas import same_text, same_value
from pica.tasks.numbers import after_marker, answer_in, find_numbers, last_boxed, same_number, whole_number
from pica.tasks.records import read_records

# MATH-500 has the bare answer beside the solution; where there is a solution, it is what is learnt.
_FIELDS = {
    "question": ("question", "query", "problem", "instruction"),
    "solution": ("solution", "response", "output", "answer"),
}
_MARKERS = ("####", "the answer is:")
_LATE_MARKERS = ("the answer is",)
# What is more than a number with words around it: LaTeX, powers, equations, tuples and intervals, 3x.
_FORMULA = re.compile(r"[\\^_={}]|^\s*\$?[(\[]|\d[a-zA-Z]|[a-zA-Z]\d|\d\s*[*+/-]\s*[\dA-Za-z]")


class MathTask:
    r"""Worked solutions that end in `#### N` (GSM8K), `The answer is: ...` (MetaMathQA) or have a `\boxed{...}` (MATH).

    The final answer stands after the first marker, else in the last box; a text with neither is read by its last number.
    Numbers are compared exactly by value, so 72, 72.0 and $72 are equal; formulas by math-verify, so \frac{1}{2} and 0.5
    are. `exact_match` is the simpler way of the papers: the same number, or the same text but for spaces and mark-up.
    """

    name = "math"
    kind: Kind = "generation"
    subsets = ()
    has_embedded = False
    default_template = "alpaca"
    default_max_new_tokens = 256

    @property
    def other_scores(self) -> Mapping[str, Callable[[str, str], bool]]:
        """The papers' comparison."""
        return {"exact_match": self._exact_match}

    def load(self, split: Split, source: Source) -> list[Example]:
        """Read one split; see `Task.load`."""
        if source.location == "embedded":
            raise DataError("Task math has no embedded problems; set data.train and data.test to GSM8K-style files.")
        fields = renamed(_FIELDS, source.columns)
        examples = []
        known, headed = header_names(fields), has_header(fields)
        for record in read_records(source.location, split, names=known, headed=headed)[: source.limit]:
            solution = record.text(*fields["solution"])
            answer = _final(solution) or whole_number(solution)  # a column of bare answers is fine
            if answer is None and split != "train":
                raise DataError(
                    f"{record.place}: the solution gives no final answer after '####' or 'The answer is:', nor in \\boxed."
                )
            question = record.text(*fields["question"])
            template = source.template or self.default_template
            examples.append(make_example(template, question, solution, answer=answer or "", place=record.place))
        return examples

    def extract(self, text: str, example: Example | None = None) -> str | None:
        """The final number or formula of a generated solution; its last number where it announces none."""
        return _final(text) or answer_in(text, ())

    def correct(self, prediction: str | None, gold: str) -> bool:
        """Equality of values."""
        if prediction is not None and whole_number(prediction) and whole_number(gold):
            return same_number(whole_number(prediction), whole_number(gold))
        return same_value(prediction, gold)

    def _exact_match(self, text: str, gold: str) -> bool:
        line = after_marker(text, (*_MARKERS, *_LATE_MARKERS)) or last_boxed(text)
        if whole_number(gold):
            return same_number(answer_in(text, (*_MARKERS, *_LATE_MARKERS)), whole_number(gold))
        return same_text(line, gold)


def _final(text: str) -> str | None:
    """The answer that a text announces: a number where that is all it says apart from words, else the formula."""
    found = after_marker(text, _MARKERS) or last_boxed(text) or after_marker(text, _LATE_MARKERS)
    if found is None:
        return None
    found = (last_boxed(found) or found).strip().strip("$").strip()
    if not _FORMULA.search(found) and (numbers := find_numbers(found)):
        return numbers[0]
    return found.rstrip(".").strip("$").strip() or None
