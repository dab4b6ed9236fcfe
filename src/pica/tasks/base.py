"""What a task is: where its examples come from, and when a model's answer to one is right.

A task is one class that satisfies `GenerationTask` (the model writes an answer) or `ClassificationTask` (the model has a
head with one output a class, or one number); `pica.tasks.TASKS` names them. Nothing here needs torch.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pica.errors import ConfigError
from pica.tasks.identity import joined

Bar = Callable[[str, int], AbstractContextManager[Callable[..., None]]]
Split = Literal["train", "validation", "test"]
Kind = Literal[
    "generation", "chat", "preference", "reward", "text-classification", "image-classification", "text-to-image"
]
"""What a model does for a task; `pica.experiments.pipelines` holds how, one file each."""
WRITING: tuple[Kind, ...] = ("generation", "chat", "preference", "reward")
"""Kinds for which a causal language model writes."""
TALKING: tuple[Kind, ...] = ("chat", "preference")
"""Kinds whose examples are conversations, in the model's chat template; where no test is named, some are held out."""


@dataclass(frozen=True)
class Example:
    """One problem of a generation task as the model sees it.

    Attributes:
        prompt: Everything the model is given; no loss is taken on it.
        completion: What it should continue with, without an end-of-text token.
        answer: The gold answer in the form `Task.correct` compares. Empty where a training row has none that can be
            checked; test rows always have one.
        choices: The answers to choose from, where there is a list of them; the completion then ends in the gold one.
        group: Which of several data sets it belongs to; results are then given for each, and the mean of them counts.
        place: Where it stands ("train.jsonl, line 7"), for messages.
        source: The data location that it is of, where there are several.
    """

    prompt: str
    completion: str
    answer: str
    choices: tuple[str, ...] = ()
    group: str = ""
    place: str = field(default="", compare=False)
    source: str = field(default="", compare=False)

    @property
    def identity(self) -> str:
        """What makes two examples the same problem."""
        return self.prompt


def described_problems(examples: Sequence[Example]) -> str:
    """How many there are, in words."""
    return f"{len(examples):,} problem{'s' if len(examples) != 1 else ''}"


@dataclass(frozen=True)
class LabelledText:
    """One example of a text classification task.

    Attributes:
        text: The text, or the first of two.
        label: Name of its class; a number where the task is a regression.
        pair: The second text, for tasks on two.
        place: Where it stands ("train.tsv, line 7"), for messages.
        bare: Whether it is of a table without a header, whose first row may be one that was not known for it.
    """

    text: str
    label: str | float
    pair: str | None = None
    place: str = field(default="", compare=False)
    bare: bool = field(default=False, compare=False)

    @property
    def identity(self) -> str:
        """What makes two examples the same problem."""
        return self.text if self.pair is None else joined(self.text, self.pair)


@dataclass(frozen=True)
class LeftOut:
    """A problem of the data that is not used.

    Attributes:
        place: Where it stands ("train.jsonl, line 7"); empty for generated ones.
        problem: Its text.
        reason: Why, and of which other problem where it is one's double.
    """

    place: str
    problem: str
    reason: str


@dataclass(frozen=True)
class Source:
    """Where the examples of one split come from, and how they are turned into prompts.

    Attributes:
        location: "embedded", a file (see `pica.tasks.records`), a folder, or `hub:OWNER/NAME[/CONFIG][:SPLIT]`.
        limit: Use at most this many examples; None uses all.
        seed: Decides which problems a generator produces, and which of a classification file's a limit leaves.
        template: A name in `TEMPLATES`; None takes the task's own.
        columns: Field of the task to field of the file, for files that use other names.
        subset: Which data set of a task that has several.
        target: What is predicted, for classification tasks.
        skip_unreadable: Leave pictures out that cannot be decoded, with a warning, instead of refusing the data.
        left_out: Is told of each row that is not used: which, where and why.
        bar: Opens a progress bar, from its label and its total to a function that is called for each item done.
    """

    location: str
    limit: int | None = None
    seed: int = 0
    template: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    subset: str | None = None
    target: "Target | None" = None
    skip_unreadable: bool = False
    bar: "Bar | None" = field(default=None, compare=False)
    left_out: "Callable[[LeftOut], None] | None" = field(default=None, compare=False)

    def leave_out(self, place: str, problem: str, reason: str) -> None:
        """Tell of a row that is not used."""
        if self.left_out is not None:
            self.left_out(LeftOut(place, problem, reason))


@dataclass(frozen=True)
class Target:
    """What a classification task predicts.

    Attributes:
        labels: Names of the classes in the order of the model's outputs; None: found in the training data.
        metric: The metric that is reported first and chosen by, one of `METRICS`; it also says
            whether the task is a regression.
    """

    labels: tuple[str, ...] | None = None
    metric: str = "accuracy"

    @property
    def regression(self) -> bool:
        """Whether a number is predicted, not a class."""
        return self.metric in REGRESSION_METRICS


CLASS_METRICS = ("accuracy", "f1", "matthews")
REGRESSION_METRICS = ("pearson", "spearman")
ANSWER_METRICS = ("accuracy", "reward_accuracy")
"""Metrics that are the share of what is right."""
METRICS = (*CLASS_METRICS, *REGRESSION_METRICS)
"""Names that `task.metric` takes."""


class AnyExample(Protocol):
    """What every example has, whatever its task."""

    @property
    def identity(self) -> str:
        """What makes two examples the same problem; see `pica.tasks.identity`."""
        ...

    @property
    def place(self) -> str:
        """Where it stands, for messages; empty for generated ones."""
        ...


class Task(Protocol):
    """A family of problems. `kind` says how a model deals with them, and which of the protocols below the task satisfies.

    Attributes:
        name: What recipes call it.
        kind: How a model deals with its problems.
        subsets: Data sets to choose from by `Source.subset`; empty where there is nothing to choose.
        has_embedded: Whether it has problems that need no file.
    """

    name: str
    kind: Kind
    subsets: tuple[str, ...]
    has_embedded: bool

    def load(self, split: Split, source: Source) -> Sequence[AnyExample]:
        """Return the split's examples in a fixed order.

        Raises:
            DataError: The source is missing, empty or malformed.
            ConfigError: The source's template or columns are unknown to this task.
        """
        ...


class GenerationTask(Task, Protocol):
    """Problems that a causal language model answers in text; the metric is the share of answers that are right.

    Attributes:
        default_template: Prompt where the recipe names none.
        default_max_new_tokens: Longest answer where the recipe sets none.
    """

    default_template: str
    default_max_new_tokens: int

    @property
    def other_scores(self) -> Mapping[str, Callable[[str, str], bool]]:
        """Further ways to score, by name: from a generated text and the gold answer to whether it is right."""
        ...

    def load(self, split: Split, source: Source) -> list[Example]:
        """See `Task.load`."""
        ...

    def extract(self, text: str, example: Example | None = None) -> str | None:
        """Return the answer that a generated text gives to an example, or None when it gives none."""
        ...

    def correct(self, prediction: str | None, gold: str) -> bool:
        """Whether an extracted answer equals the gold one."""
        ...


class Labelled(AnyExample, Protocol):
    """What every example of a classification task has."""

    @property
    def label(self) -> str | float:
        """Name of its class; a number where the task is a regression."""
        ...


class ClassificationTask(Task, Protocol):
    """Examples that each have one label: a class, or a number."""

    def target(self, subset: str | None) -> Target:
        """What is predicted, as far as the task itself decides it.

        Raises:
            ConfigError: The task needs a subset and this is none.
        """
        ...

    def load(self, split: Split, source: Source) -> Sequence[Labelled]:
        """See `Task.load`; labels are checked against `source.target` where that names the classes."""
        ...


@dataclass(frozen=True)
class Template:
    """How a question becomes a prompt.

    Attributes:
        text: Format string with `{question}`.
        with_context: The same with `{context}` as well, for rows that carry an extra input.
        lead: What stands between prompt and answer. It belongs to the completion, so that the prompt ends on a
            token boundary and training sees the very tokens that generation starts from.
    """

    text: str
    with_context: str
    lead: str = ""


TEMPLATES: dict[str, Template] = {
    "alpaca": Template(
        text="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{question}\n\n### Response:\n",
        with_context="Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{question}\n\n### Input:\n{context}\n\n### Response:\n",
    ),
    "question": Template(
        text="Question: {question}\nAnswer:",
        with_context="{context}\nQuestion: {question}\nAnswer:",
        lead=" ",
    ),
    "plain": Template(text="{question}\n", with_context="{question}\n{context}\n"),
}


def make_example(
    template: str,
    question: str,
    solution: str,
    *,
    answer: str,
    context: str = "",
    choices: tuple[str, ...] = (),
    group: str = "",
    place: str = "",
) -> Example:
    """Render one problem; surrounding white space of question and solution is dropped.

    Args:
        template: One of `TEMPLATES`.
        question: What is asked.
        solution: What a trained model should write.
        answer: The gold answer, as it is compared.
        context: What is given beside the question, for a template that has a place for it.
        choices: The possible answers, where they are given.
        group: What the example is counted under, for instance its data set.
        place: Where the row is, for messages.
    Returns:
        The prompt and the completion.
    Raises:
        ConfigError: `template` is not one of `TEMPLATES`.
    """
    if template not in TEMPLATES:
        raise ConfigError(f"prompt template {template!r} is unknown; use one of {', '.join(sorted(TEMPLATES))}.")
    chosen = TEMPLATES[template]
    question, context = question.strip(), context.strip()
    # Not str.format on the whole: questions may hold braces, and only the template's own fields are to be filled in.
    pattern = chosen.with_context if context else chosen.text
    prompt = pattern.format(question=question, context=context)
    return Example(prompt, chosen.lead + solution.strip(), answer, choices, group, place)
