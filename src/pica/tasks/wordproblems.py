"""Arithmetic word problems from a seed: the data of the default run, which needs no download.

A problem is a template ("a person has a things, buys b more, gives c away") filled with numbers, names and a
thing. Its identity is the template and the numbers alone, and a stable hash of that identity decides its split, so
no wording, name or seed can carry a problem from one split into another. The worked solution is a chain of at most
three equations and ends in "The answer is N."; scoring compares N alone.

Everything here is plain Python: no tensor library is imported.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from pica.errors import DataError

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

PROMPT = "Question: {question}\nAnswer:"
"""What the model reads; the reference response is a space and `WordProblem.solution`."""

_WOMEN = ("Ann", "Mia", "Eva", "Zoe", "Lucy", "Nora", "Ruth", "Jane", "Sara", "Emma", "Rosa", "Kate")
_MEN = ("Tom", "Ben", "Max", "Leo", "Sam", "Jack", "Paul", "Adam", "Noah", "Carl", "Hugo", "Dan")

PEOPLE: tuple[tuple[str, str], ...] = (*((name, "she") for name in _WOMEN), *((name, "he") for name in _MEN))
"""First names with their pronoun."""

THINGS = ("apples", "pears", "plums", "eggs", "books", "cards", "coins", "stamps", "shells", "balls", "cups", "toys")
"""Countable things, in the plural (no template needs the singular)."""

_LARGEST = 99
_MISTAKEN = {"+": "-", "-": "+", "*": "+", "/": "-"}
_ANSWER = re.compile(r"[Tt]he answer is\s*:?\s*(-?\d+)")

Numbers = tuple[int, ...]
Step = tuple[int, str, int]


@dataclass(frozen=True)
class WordProblem:
    """One problem of the default task.

    Attributes:
        question: The story and what is asked, without any prompt around it.
        solution: The equations that lead to the answer, ending in "The answer is N."
        answer: N, never negative.
        template: Name of the story pattern.
        numbers: What the pattern was filled with; (template, numbers) is the problem's identity.
    """

    question: str
    solution: str
    answer: int
    template: str
    numbers: Numbers


@dataclass(frozen=True)
class _Template:
    """A story pattern: its wordings, the numbers it admits, and the calculation it asks for."""

    name: str
    wordings: tuple[str, ...]
    ranges: tuple[range, ...]
    steps: Callable[..., tuple[Step, ...]]

    def fillings(self) -> Iterator[Numbers]:
        """All numbers for which every intermediate result is a whole number between 1 and 99."""
        for numbers in itertools.product(*self.ranges):
            results = [_evaluate(step) for step in self.steps(*numbers)]
            if all(result is not None and 1 <= result <= _LARGEST for result in results):
                yield numbers


def _evaluate(step: Step) -> int | None:
    """Value of one step, or None for a division that leaves a remainder."""
    left, operator, right = step
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    if operator == "*":
        return left * right
    return left // right if left % right == 0 else None


_START, _CHANGE, _FEW, _GROUP = range(3, 61), range(2, 21), range(2, 10), range(2, 10)

# {A} and {B} are two people, {he} the pronoun of {A} ({He} begins a sentence), {x} the things, {a} to {d} the numbers.
TEMPLATES: tuple[_Template, ...] = (
    _Template(
        "gain_gain",
        (
            "{A} has {a} {x}. {He} buys {b} more and finds {c} more. How many {x} does {A} have now?",
            "{A} had {a} {x}. {B} gave {A} {b} more, and then {he} bought {c}. How many {x} does {A} have?",
        ),
        (_START, _CHANGE, _CHANGE),
        lambda a, b, c: ((a, "+", b), (a + b, "+", c)),
    ),
    _Template(
        "gain_loss",
        (
            "{A} has {a} {x}. {He} buys {b} more and gives {c} to {B}. How many {x} does {A} have now?",
            "There were {a} {x} in a box. {A} put in {b} and {B} took out {c}. How many {x} are in the box?",
        ),
        (_START, _CHANGE, _CHANGE),
        lambda a, b, c: ((a, "+", b), (a + b, "-", c)),
    ),
    _Template(
        "loss_gain",
        (
            "{A} had {a} {x}. {He} lost {b} of them and later found {c}. How many {x} does {A} have now?",
            "{A} has {a} {x}. {He} gives {b} to {B} and gets {c} back. How many {x} does {A} have?",
        ),
        (_START, _CHANGE, _CHANGE),
        lambda a, b, c: ((a, "-", b), (a - b, "+", c)),
    ),
    _Template(
        "loss_loss",
        (
            "{A} has {a} {x}. {He} gives {b} to {B} and loses {c}. How many {x} are left?",
            "There were {a} {x} in a bag. {A} took {b} and {B} took {c}. How many {x} are left in the bag?",
        ),
        (_START, _CHANGE, _CHANGE),
        lambda a, b, c: ((a, "-", b), (a - b, "-", c)),
    ),
    _Template(
        "more_total",
        (
            "{A} has {a} {x}. {B} has {b} more than {A}. How many {x} do they have together?",
            "{A} has {a} {x}, and {B} has {b} more {x} than {A}. How many {x} is that in all?",
        ),
        (range(2, 41), range(2, 31)),
        lambda a, b: ((a, "+", b), (a, "+", a + b)),
    ),
    _Template(
        "fewer_total",
        (
            "{A} has {a} {x}. {B} has {b} fewer than {A}. How many {x} do they have together?",
            "{A} has {a} {x}, and {B} has {b} fewer {x} than {A}. How many {x} is that in all?",
        ),
        (range(4, 51), range(2, 31)),
        lambda a, b: ((a, "-", b), (a, "+", a - b)),
    ),
    _Template(
        "groups_gain",
        (
            "{A} has {a} bags with {b} {x} in each bag. {He} finds {c} more. How many {x} does {A} have?",
            "{A} fills {a} boxes with {b} {x} each and has {c} {x} left over. How many {x} is that in all?",
        ),
        (_GROUP, _FEW, _CHANGE),
        lambda a, b, c: ((a, "*", b), (a * b, "+", c)),
    ),
    _Template(
        "groups_loss",
        (
            "{A} has {a} bags with {b} {x} in each bag. {He} gives {c} to {B}. How many {x} are left?",
            "{A} buys {a} boxes with {b} {x} each and loses {c} of the {x}. How many {x} does {A} have now?",
        ),
        (_GROUP, _FEW, _CHANGE),
        lambda a, b, c: ((a, "*", b), (a * b, "-", c)),
    ),
    _Template(
        "times_gain",
        (
            "{A} has {a} {x}. {B} has {b} times as many and buys {c} more. How many {x} does {B} have?",
            "{B} has {b} times as many {x} as {A}. {A} has {a}. Then {B} finds {c}. How many {x} does {B} have now?",
        ),
        (range(2, 13), range(2, 6), _CHANGE),
        lambda a, b, c: ((a, "*", b), (a * b, "+", c)),
    ),
    _Template(
        "gain_share",
        (
            "{A} has {a} {x} and buys {b} more. {He} shares them equally among {c} friends. "
            "How many {x} does each friend get?",
            "{A} puts {a} {x} and {b} more {x} into {c} equal piles. How many {x} are in each pile?",
        ),
        (_START, _CHANGE, _GROUP),
        lambda a, b, c: ((a, "+", b), (a + b, "/", c)),
    ),
    _Template(
        "change",
        (
            "One of the {x} costs {a} dollars. {A} buys {b} and pays with {c} dollars. How much does {he} get back?",
            "{A} has {c} dollars. {He} buys {b} {x} for {a} dollars each. How many dollars are left?",
        ),
        (_FEW, _GROUP, range(10, 91, 5)),
        lambda a, b, c: ((a, "*", b), (c, "-", a * b)),
    ),
    _Template(
        "three_steps",
        (
            "{A} has {a} {x}. {He} buys {b}, loses {c} and gives {d} to {B}. How many {x} does {A} have now?",
            "{A} had {a} {x}. {He} found {b} more, gave {c} away and sold {d}. How many {x} are left?",
        ),
        (range(10, 41), _FEW, _FEW, _FEW),
        lambda a, b, c, d: ((a, "+", b), (a + b, "-", c), (a + b - c, "-", d)),
    ),
)


def generate(split: Split, count: int, seed: int = 0) -> list[WordProblem]:
    """Draw `count` different problems of one split.

    The same arguments always give the same list, and a smaller `count` gives the beginning of it. All templates are
    equally likely until the small ones run out.

    Args:
        split: "train" (80% of all problems), "validation" (10%) or "test" (10%).
        count: Number of problems, from 0 to `available(split)`.
        seed: Decides which problems are drawn, their order, wording, names and things.
    Returns:
        The problems.
    Raises:
        ValueError: Unknown split.
        DataError: A `count` outside the range above.
    """
    pools = {name: list(numbers) for name, numbers in _keys()[_known(split)].items()}
    total = sum(map(len, pools.values()))
    if not 0 <= count <= total:
        raise DataError(f"count={count} word problems were asked for, but the {split!r} split holds 0 to {total}.")
    rng = random.Random(f"wordproblems/{split}/{seed}")
    for pool in pools.values():
        rng.shuffle(pool)
    problems = []
    for _ in range(count):
        template = rng.choice([template for template in TEMPLATES if pools[template.name]])
        problems.append(_render(template, pools[template.name].pop(), rng))
    return problems


def available(split: Split) -> int:
    """Number of different problems in `split`. Raises ValueError for an unknown split."""
    return sum(map(len, _keys()[_known(split)].values()))


def split_of(template: str, numbers: Numbers) -> Split:
    """The split a problem belongs to: a function of its identity alone, the same on every machine and Python."""
    key = f"{template}:{','.join(map(str, numbers))}".encode()
    bucket = int.from_bytes(hashlib.sha256(key).digest()[:4], "big") % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def prompt(problem: WordProblem) -> str:
    """The text a model is asked to continue."""
    return PROMPT.format(question=problem.question)


def with_a_mistake(problem: WordProblem, rng: random.Random) -> str:
    """Solve a problem wrongly: one step, which `rng` chooses, does another calculation than it should.

    Returns:
        A solution that goes on from there; it ends in another answer than the problem's, a whole number above 0.
    """
    template = next(template for template in TEMPLATES if template.name == problem.template)
    steps = template.steps(*problem.numbers)
    slips = [(at, _MISTAKEN[step[1]]) for at, step in enumerate(steps)]
    rng.shuffle(slips)
    last = [(at, "*") for at, step in enumerate(steps) if step[1] != "*"]  # where a difference would be below 1
    worked = (_worked(steps, at, operator) for at, operator in [*slips, *last])
    return next(text for text in worked if text is not None and extract_answer(text) != problem.answer)


def _worked(steps: tuple[Step, ...], at: int, operator: str) -> str | None:
    """The steps in words, step `at` with another operator; None if a result is then no whole number above 0."""
    sentences = []
    right = found = 0
    for index, (left, own, other) in enumerate(steps):
        truth = _evaluate((left, own, other))
        if index > at:  # goes on with the number that was found
            left, other = (found, other) if left == right else (left, found if other == right else other)
        chosen = operator if index == at else own
        result = _evaluate((left, chosen, other))
        if truth is None or result is None or result < 1:
            return None
        right, found = truth, result
        sentences.append(f"{left} {chosen} {other} = {found}.")
    return " ".join([*sentences, f"The answer is {found}."])


def extract_answer(response: str) -> int | None:
    """The number of the first "The answer is N" in a model's response, or None if it never says so."""
    # the first, not the last: a model that does not stop after its answer goes on to invent further problems
    match = _ANSWER.search(response)
    return int(match.group(1)) if match else None


def _known(split: str) -> Split:
    for known in SPLITS:
        if split == known:
            return known
    raise ValueError(f"unknown split {split!r}; choose one of {', '.join(map(repr, SPLITS))}.")


@functools.cache
def _keys() -> dict[Split, dict[str, list[Numbers]]]:
    """Split -> template name -> every filling of it that belongs there, in a fixed order."""
    keys: dict[Split, dict[str, list[Numbers]]] = {split: {t.name: [] for t in TEMPLATES} for split in SPLITS}
    for template in TEMPLATES:
        for numbers in template.fillings():
            keys[split_of(template.name, numbers)][template.name].append(numbers)
    return keys


def _render(template: _Template, numbers: Numbers, rng: random.Random) -> WordProblem:
    """Clothe `numbers` in words; consumes the same amount of randomness for every template."""
    (first, pronoun), (second, _) = rng.sample(PEOPLE, 2)
    wording = rng.choice(template.wordings)
    words: dict[str, object] = {"A": first, "B": second, "he": pronoun, "He": pronoun.capitalize()}
    question = wording.format(x=rng.choice(THINGS), **words, **dict(zip("abcd", numbers)))
    sentences, answer = [], 0
    for step in template.steps(*numbers):
        result = _evaluate(step)
        assert result is not None, f"{template.name}{numbers} is not a filling of its template"
        answer = result
        sentences.append("{} {} {} = {}.".format(*step, answer))
    sentences.append(f"The answer is {answer}.")
    return WordProblem(question, " ".join(sentences), answer, template.name, numbers)
