"""The text that the embedded tiny model is pre-trained on, generated from a seed.

It teaches what the default run's word problems build on, never the problems themselves: arithmetic in several
notations, number sequences, little stories in which quantities change and the narrator says what they become,
questions that only look up what was just said, and plain descriptions without numbers. Nothing here asks for a
calculation in an instruction format, writes a chain of equations under a story, or says "The answer is".
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from pica.tasks.wordproblems import PEOPLE, THINGS

_COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey")
_ANIMALS = ("dog", "cat", "horse", "cow", "bird", "duck", "pig", "goat")
_PLACES = ("house", "garden", "school", "shop", "park", "kitchen", "river", "market", "station", "library")
_SINGULAR = ("apple", "pear", "plum", "egg", "book", "card", "coin", "stamp", "shell", "ball", "cup", "toy")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_HOLDERS = ("bag", "box", "pile", "basket", "drawer")


def corpus(seed: int, documents: int) -> Iterator[str]:
    """Yield `documents` short texts, each one to six lines or sentences; the same for the same seed."""
    rng = random.Random(f"tiny-corpus/{seed}")
    for kind in rng.choices(list(_KINDS), list(_KINDS.values()), k=documents):
        yield kind(rng)


def _equation(rng: random.Random) -> tuple[int, str, int, int]:
    """A true (left, operator, right, result) with numbers from 0 to 99."""
    operator = rng.choices("+-*/", (4, 4, 2, 1))[0]
    if operator in "+-":
        # Half of the sums stay small, as in everyday text; the other half covers all two-digit numbers.
        top = 99 if rng.random() < 0.6 else 20
        total = rng.randint(0, top)
        part = rng.randint(0, total)
        return (part, "+", total - part, total) if operator == "+" else (total, "-", part, total - part)
    left, right = rng.randint(1, 12), rng.randint(1, 9)
    if rng.random() < 0.3:
        left, right = rng.randint(1, 49), rng.randint(2, 4)
    while left * right > 99:
        left = rng.randint(1, 12)
    if operator == "*":
        return (left, "*", right, left * right) if rng.random() < 0.5 else (right, "*", left, left * right)
    return left * right, "/", right, left


_SPOKEN = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}


def _facts(rng: random.Random) -> str:
    """Separate equations in one notation."""
    style = rng.randrange(4)
    separator = rng.choice(("\n", ". ", ", ")) if style else " "
    lines = []
    for _ in range(rng.randint(3, 8)):
        left, operator, right, result = _equation(rng)
        if style == 0:
            lines.append(f"{left} {_SPOKEN[operator]} {right} is {result}.")
        elif style == 1:
            lines.append(f"{result} = {left} {operator} {right}")
        else:
            lines.append(f"{left} {operator} {right} = {result}")
    return separator.join(lines)


def _running(rng: random.Random) -> str:
    """One number carried through several operations: "start with 12, add 5: 17, take away 9: 8"."""
    value = rng.randint(1, 60)
    terse = rng.random() < 0.5
    parts = [str(value)] if terse else [f"start with {value}"]
    for _ in range(rng.randint(2, 5)):
        options = ["+", "+"] if value < 1 else ["-", "-"] if value > 90 else ["+", "+", "-", "-"]
        if value * 2 <= 99:
            options.append("*")
        divisors = [number for number in range(2, 10) if value % number == 0]
        if divisors:
            options.append("/")
        operator = rng.choice(options)
        if operator == "+":
            by = rng.randint(1, max(1, min(40, 99 - value)))
            value += by
        elif operator == "-":
            by = rng.randint(1, min(40, value))
            value -= by
        elif operator == "*":
            by = rng.randint(2, max(2, min(9, 99 // max(value, 1))))
            value *= by
        else:
            by = rng.choice(divisors)
            value //= by
        spoken = {"+": "add", "-": "take away", "*": "multiply by", "/": "divide by"}[operator]
        parts.append(f"{operator} {by} -> {value}" if terse else f"{spoken} {by} to get {value}")
    return (" " if terse else ", ").join(parts) + ("" if terse else ".")


def _sequence(rng: random.Random) -> str:
    """Counting up or down in equal steps."""
    step = rng.randint(1, 10)
    length = rng.randint(4, 9)
    start = rng.randint(0, max(0, 99 - step * length))
    numbers = [start + step * index for index in range(length)]
    if rng.random() < 0.4:
        numbers.reverse()
    return rng.choice((", ", " ")).join(map(str, numbers))


_GAIN = ("buys", "finds", "gets", "picks up", "is given", "wins")
_LOSE = ("loses", "sells", "gives away", "drops", "breaks", "uses")


def _story(rng: random.Random) -> str:
    """A person's possessions over time; the narrator says each new count, or only the last one."""
    (name, pronoun), (other, _) = rng.sample(PEOPLE, 2)
    things = rng.choice(THINGS)
    count = rng.randint(1, 70)
    he = pronoun.capitalize()
    sentences = [rng.choice((f"{name} has {count} {things}.", f"{name} had {count} {things}."))]
    events = rng.randint(1, 3)
    tell_each = rng.random() < 0.85
    for index in range(events):
        if count == 0 or (count < 99 and rng.random() < 0.5):
            by = rng.randint(1, min(30, 99 - count))
            count += by
            event = rng.choice((f"{he} {rng.choice(_GAIN)} {by} more", f"{other} gives {name} {by} {things}"))
        else:
            by = rng.randint(1, min(30, count))
            count -= by
            event = rng.choice((f"{he} {rng.choice(_LOSE)} {by}", f"{he} gives {by} to {other}"))
        if tell_each or index == events - 1:
            tails = (
                f", so now {pronoun} has {count}.",
                f". Now {name} has {count} {things}.",
                f". That leaves {count}.",
            )
            sentences.append(event + rng.choice(tails))
        else:
            sentences.append(event + ".")
    if rng.random() < 0.3:
        sentences.append(f"How many {things} does {name} have? {name} has {count} {things}.")
    return " ".join(sentences)


def _compare(rng: random.Random) -> str:
    """Two people's counts and how they relate."""
    (name, pronoun), (other, _) = rng.sample(PEOPLE, 2)
    things = rng.choice(THINGS)
    kind = rng.randrange(4)
    if kind == 0:
        count = rng.randint(1, 60)
        by = rng.randint(1, 99 - count)
        relation, second = f"{by} more {things} than {name}", count + by
    elif kind == 1:
        count = rng.randint(2, 90)
        by = rng.randint(1, count)
        relation, second = f"{by} fewer {things} than {name}", count - by
    elif kind == 2:
        count = rng.randint(1, 24)
        by = rng.randint(2, min(9, 99 // count))
        relation, second = f"{by} times as many {things} as {name}", count * by
    else:
        count = rng.randint(1, 50)
        second = rng.randint(1, 49)
        total = f"Together they have {count + second} {things}."
        return f"{name} has {count} {things}. {other} has {second} {things}. {total}"
    text = f"{name} has {count} {things}. {other} has {relation}, so {other} has {second}."
    if count + second <= 99 and rng.random() < 0.4:
        text += f" Together they have {count + second}."
    return text


def _groups(rng: random.Random) -> str:
    """Equal groups, put together or taken apart, and prices."""
    (name, pronoun), _ = rng.sample(PEOPLE, 2)
    things = rng.choice(THINGS)
    left, right = rng.randint(1, 12), rng.randint(1, 9)
    while left * right > 99:
        left = rng.randint(1, 12)
    total = left * right
    holder = rng.choice(_HOLDERS)
    plural = holder + ("es" if holder.endswith("x") else "s")
    return rng.choice(
        (
            f"{left} {plural} with {right} {things} in each {holder} hold {total} {things}.",
            f"{name} fills {left} {plural} with {right} {things} each. {pronoun.capitalize()} uses {total} {things}.",
            f"{name} shares {total} {things} equally among {left} friends. Each friend gets {right}.",
            f"{total} {things} in {left} equal piles are {right} in each pile.",
            f"Each of the {things} costs {left} dollars. {name} buys {right} and pays {total} dollars.",
            f"{name} pays with {total} dollars for {left} {things}. Each costs {right} dollars.",
        )
    )


def _described(rng: random.Random) -> str:
    """A story told beside its calculation, one step only."""
    (name, _), (other, _) = rng.sample(PEOPLE, 2)
    things = rng.choice(THINGS)
    left, operator, right, result = _equation(rng)
    event = {
        "+": rng.choice((f"gets {right} more", f"buys {right}", f"finds {right}")),
        "-": rng.choice((f"loses {right}", f"gives {right} to {other}", f"sells {right}")),
        "*": f"has {right} times as many in the evening",
        "/": f"makes {right} equal piles",
    }[operator]
    return f"{name} has {left} {things} and {event}: {left} {operator} {right} = {result}"


def _scene(rng: random.Random) -> str:
    """Plain sentences without numbers, some with a question about what was said."""
    sentences = []
    for _ in range(rng.randint(1, 4)):
        (name, pronoun), (other, _) = rng.sample(PEOPLE, 2)
        colour, animal, place, thing = map(rng.choice, (_COLOURS, _ANIMALS, _PLACES, _SINGULAR))
        article = "an" if thing[0] in "aeiou" else "a"
        sentences.append(
            rng.choice(
                (
                    f"The {colour} {thing} is in the {place}.",
                    f"{name} sees a {colour} {animal} near the {place}. The {animal} is {colour}.",
                    f"{name} goes to the {place} with {other} on {rng.choice(_DAYS)}. They are friends.",
                    f"{name} puts {article} {thing} into a {rng.choice(_HOLDERS)} and takes it back later.",
                    f"What colour is the {thing}? The {thing} is {colour}.",
                    f"Where is {name}? {name} is in the {place}, and {pronoun} has {article} {thing}.",
                    f"Who has the {colour} {thing}? {other} has it, because {name} gave it away.",
                    f"There is {article} {thing} left over, and there were others before.",
                    f"{name} asks {other} a question about the {animal}. {other} knows the answer.",
                    f"Question by question, {name} learns how much the {thing} costs and how many there are.",
                    f"Answer me, says {name}, and {other} tells {'her' if pronoun == 'she' else 'him'} all.",
                    f"How much does the {thing} cost? It costs more than the {colour} one.",
                    f"One of the {animal}s took the {thing}. The others were then in the {place}.",
                )
            )
        )
    return " ".join(sentences)


_KINDS: dict[Callable[[random.Random], str], float] = {
    _facts: 7,
    _running: 3,
    _sequence: 1,
    _story: 4,
    _compare: 2.5,
    _groups: 2.5,
    _described: 2.5,
    _scene: 1.5,
}
