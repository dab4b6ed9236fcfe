"""Grade-school mathematics: GSM8K and MetaMathQA files, scored by exact match on the final number."""

from pica.errors import DataError
from pica.tasks.base import Example, Kind, Source, Split, make_example
from pica.tasks.columns import renamed
from pica.tasks.numbers import after_marker, answer_in, same_number, whole_number
from pica.tasks.records import read_records

_FIELDS = {"question": ("question", "query"), "solution": ("answer", "response")}


class MathTask:
    """Worked solutions that end in `#### N` (GSM8K) or `The answer is: N` (MetaMathQA).

    Rows are `question`/`answer` or `query`/`response`. The final answer is the first number after the first marker,
    or, where a text has no marker, its last number; values are compared exactly, so 72, 72.0 and $72 are equal.
    Training rows whose answer is not a number (formulas from the MATH part of MetaMathQA) are learnt from but cannot
    be scored, so a test file must not hold any.
    """

    name = "math"
    kind: Kind = "generation"
    subsets = ()
    has_embedded = False
    default_template = "alpaca"
    default_max_new_tokens = 256
    markers = ("####", "the answer is:", "the answer is")

    def load(self, split: Split, source: Source) -> list[Example]:
        """Read one split; see `Task.load`."""
        if source.location == "embedded":
            raise DataError("Task math has no embedded problems; set data.train and data.test to GSM8K-style files.")
        fields = renamed(_FIELDS, source.columns)
        examples = []
        for record in read_records(source.location, split)[: source.limit]:
            solution = record.text(*fields["solution"])
            answer = whole_number(after_marker(solution, self.markers) or "")
            if answer is None and split != "train":
                raise DataError(f"{record.place}: the solution gives no final number after '####' or 'The answer is:'.")
            question = record.text(*fields["question"])
            template = source.template or self.default_template
            examples.append(make_example(template, question, solution, answer=answer or ""))
        return examples

    def extract(self, text: str) -> str | None:
        """The final number of a generated solution."""
        return answer_in(text, self.markers)

    def correct(self, prediction: str | None, gold: str) -> bool:
        """Exact equality of values."""
        return same_number(prediction, gold)
