"""The eight GLUE tasks, from the hub or from the benchmark's own files, with the metrics that papers compare by."""

from dataclasses import dataclass

from pica.errors import ConfigError, DataError
from pica.tasks.base import Kind, LabelledText, Source, Split, Target
from pica.tasks.labelled import SECRET, Fields, read_labelled


@dataclass(frozen=True)
class _Set:
    """One data set: accepted field names (the hub's, then those of the benchmark's own files) and what is predicted."""

    fields: Fields
    labels: tuple[str, ...] | None
    metric: str = "accuracy"


_ENTAILMENT = ("entailment", "not_entailment")
_SETS = {
    "cola": _Set({"text": ("sentence", "4"), "label": ("label", "2")}, ("unacceptable", "acceptable"), "matthews"),
    "mnli": _Set(
        {"text": ("premise", "sentence1"), "pair": ("hypothesis", "sentence2"), "label": ("label", "gold_label")},
        ("entailment", "neutral", "contradiction"),
    ),
    "mrpc": _Set(
        {
            "text": ("sentence1", "#1 String"),
            "pair": ("sentence2", "#2 String"),
            "label": ("label", "Quality"),
        },
        ("not_equivalent", "equivalent"),
    ),
    "qnli": _Set({"text": ("question",), "pair": ("sentence",), "label": ("label",)}, _ENTAILMENT),
    "qqp": _Set(
        {"text": ("question1",), "pair": ("question2",), "label": ("label", "is_duplicate")},
        ("not_duplicate", "duplicate"),
    ),
    "rte": _Set({"text": ("sentence1",), "pair": ("sentence2",), "label": ("label",)}, _ENTAILMENT),
    "sst2": _Set({"text": ("sentence", "1"), "label": ("label", "2")}, ("negative", "positive")),
    "stsb": _Set({"text": ("sentence1",), "pair": ("sentence2",), "label": ("label", "score")}, None, metric="pearson"),
}


class GlueTask:
    """CoLA, MNLI, MRPC, QNLI, QQP, RTE, SST-2 and STS-B (WNLI is left out, as in the papers).

    The metric that comes first is Matthews correlation for CoLA, Pearson's for STS-B and accuracy for the rest (MNLI's
    is that of the file given, usually the matched one); the others are measured as well. Classes are named as in the
    benchmark, numbers in files are their indices. The benchmark's own test labels are secret: papers report on the
    validation rows, so those are the test here, and validation rows come out of the training ones.
    """

    name = "glue"
    kind: Kind = "text-classification"
    subsets = tuple(_SETS)
    has_embedded = False

    def target(self, subset: str | None) -> Target:
        """Classes and metric of one of the eight."""
        chosen = _chosen(subset)
        return Target(chosen.labels, chosen.metric)

    def load(self, split: Split, source: Source) -> list[LabelledText]:
        """Read one split; see `Task.load`."""
        if source.location == "embedded":
            raise DataError("Task glue has no embedded examples; set data.train and data.test to files or hub names.")
        chosen = _chosen(source.subset)
        numbers = {str(index): name for index, name in enumerate(chosen.labels or ())}
        paired = "pair" in chosen.fields
        target = source.target or Target(chosen.labels, chosen.metric)
        examples = read_labelled(split, source, chosen.fields, target, pair=paired, names=numbers)
        if target.regression and (secret := next((example for example in examples if example.label == -1), None)):
            raise DataError(f"{secret.place}: {SECRET}")
        return examples


def _chosen(subset: str | None) -> _Set:
    if subset not in _SETS:
        raise ConfigError(f"task.subset = {subset!r}: task glue is eight tasks; choose one of {', '.join(_SETS)}.")
    return _SETS[subset]
