"""Text classification from a single file a split: sentiment, topics, or any other classes or numbers."""

from pica.errors import DataError
from pica.tasks.base import Kind, LabelledText, Source, Split, Target
from pica.tasks.labelled import read_labelled

# The numbers are those of a table without a header.
_FIELDS = {
    "text": ("text", "sentence", "content", "review", "1"),
    "label": ("label", "labels", "class", "target", "sentiment", "2"),
    "pair": ("pair", "text2", "sentence2"),
}


class SentimentTask:
    """Rows of a text (or two) and a label, in any of the file forms.

    A table without a header has the text in its first column and the label in its second; other orders are mapped with
    `data.columns`, by name or by number. Classes are those of the training data unless the recipe lists them. With
    `task.metric` pearson or spearman labels are numbers.
    """

    name = "sentiment"
    kind: Kind = "text-classification"
    subsets = ()
    has_embedded = False

    def target(self, subset: str | None) -> Target:
        """Classes found in the training data, by accuracy."""
        return Target()

    def load(self, split: Split, source: Source) -> list[LabelledText]:
        """Read one split; see `Task.load`."""
        if source.location == "embedded":
            raise DataError("Task sentiment has no embedded examples; set data.train and data.test to files.")
        return read_labelled(split, source, _FIELDS, source.target or Target(), pair=None)
