"""What a task is: prompts with target answers, how to read an answer out of generated text, and when it is right.

A task is one class that satisfies `Task`; `pica.tasks.TASKS` names them. Nothing here needs torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pica.errors import ConfigError

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Example:
    """One problem as the model sees it.

    Attributes:
        prompt: Everything the model is given; no loss is taken on it.
        completion: What it should continue with, without an end-of-text token.
        answer: The gold answer in the form `Task.correct` compares. Empty where a training row has none that can be
            checked; test rows always have one.
    """

    prompt: str
    completion: str
    answer: str


@dataclass(frozen=True)
class Source:
    """Where the examples of one split come from, and how they are turned into prompts.

    Attributes:
        location: "embedded", a `.json` or `.jsonl` file, or `hub:OWNER/NAME[/CONFIG][:SPLIT]`.
        limit: Use at most this many examples; None uses all.
        seed: Decides which problems a generator produces; files ignore it.
        template: A name in `TEMPLATES`; None takes the task's own.
        columns: Field of the task to field of the file, for files that use other names.
    """

    location: str
    limit: int | None = None
    seed: int = 0
    template: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


class Task(Protocol):
    """A family of problems with one metric: the share of answers that are right."""

    name: str
    default_template: str
    default_max_new_tokens: int

    def load(self, split: Split, source: Source) -> list[Example]:
        """Return the split's examples in a fixed order.

        Raises:
            DataError: The source is missing, empty or malformed.
            ConfigError: The source's template or columns are unknown to this task.
        """
        ...

    def extract(self, text: str) -> str | None:
        """Return the answer that a generated text gives, or None when it gives none."""
        ...

    def correct(self, prediction: str | None, gold: str) -> bool:
        """Whether an extracted answer equals the gold one."""
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


def make_example(template: str, question: str, solution: str, *, answer: str, context: str = "") -> Example:
    """Render one problem; surrounding white space of question and solution is dropped.

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
    return Example(prompt=prompt, completion=chosen.lead + solution.strip(), answer=answer)
