"""The text that the embedded tiny model is pre-trained on, generated from a seed.

It teaches what the default run's word problems build on, never the problems themselves: arithmetic in several
notations, number sequences, little stories in which quantities change and the narrator says what they become,
stories with their calculation noted beside them, questions that only look up what was just said, and plain
descriptions without numbers. What the word problems ask for beyond that: to answer a question in an instruction
format, with the final "The answer is", to find the steps in other words and, for prices and multiples, to combine steps that
stand alone here.
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
_HOLDERS = (("bag", "bags"), ("box", "boxes"), ("pile", "piles"), ("basket", "baskets"), ("drawer", "drawers"))


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
    holder, plural = rng.choice(_HOLDERS)
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


def _ledger(rng: random.Random) -> str:
    """Gains and losses with their calculation beside or below the story, as in somebody's notes."""
    (name, pronoun), (other, _) = rng.sample(PEOPLE, 2)
    things = rng.choice(THINGS)
    count = rng.randint(2, 70)
    he = pronoun.capitalize()
    text = rng.choice(
        (f"{name} has {count} {things}.", f"{name} had {count} {things}.", f"{count} {things} in the box.")
    )
    beside = rng.random() < 0.3
    sums = []
    for _ in range(rng.randint(1, 3)):
        gains = count < 3 or (count < 79 and rng.random() < 0.5)
        by = rng.randint(1, 20) if gains else rng.randint(1, min(20, count - 1))
        after = count + by if gains else count - by
        if gains:
            event = rng.choice((f"{he} {rng.choice(_GAIN)} {by} more", f"{other} gives {name} {by}", f"Then {by} come"))
        else:
            event = rng.choice((f"{he} {rng.choice(_LOSE)} {by}", f"{he} gives {by} to {other}", f"Then {by} go"))
        sums.append(f"{count} {'+' if gains else '-'} {by} = {after}")
        text += f" {event} ({sums[-1]})." if beside else f" {event}."
        count = after
    if beside:
        return text
    separator = rng.choice((", ", "; ", ". "))
    return (
        text
        + rng.choice(("\n", " Notes: ", " Count: ", " So "))
        + separator.join(sums)
        + rng.choice((".", "", " now."))
    )


def _mixed(rng: random.Random) -> str:
    """Two different steps in one note: a comparison or a group, and what comes of it."""
    (name, _), (other, _) = rng.sample(PEOPLE, 2)
    things = rng.choice(THINGS)
    holder, plural = rng.choice(_HOLDERS)
    kind = rng.randrange(4)
    if kind == 0:
        count = rng.randint(2, 40)
        by = rng.randint(1, min(30, 99 - 2 * count))
        total = 2 * count + by
        told = f"{name}: {count} {things}. {other}: {by} more than {name}. Both"
        sums = f"{count} + {by} = {count + by}", f"{count} + {count + by} = {total}"
    elif kind == 1:
        count = rng.randint(3, 50)
        by = rng.randint(1, count - 1)
        told = f"{name}: {count} {things}. {other}: {by} fewer than {name}. Both"
        sums = f"{count} - {by} = {count - by}", f"{count} + {count - by} = {2 * count - by}"
    elif kind == 2:
        groups, each = rng.randint(2, 9), rng.randint(2, 9)
        rest = rng.randint(1, min(18, 99 - groups * each))
        told = f"{groups} {plural} with {each} {things} in each {holder}, and {rest} on the table"
        sums = f"{groups} * {each} = {groups * each}", f"{groups * each} + {rest} = {groups * each + rest}"
    else:
        friends, each = rng.randint(2, 9), rng.randint(1, 9)
        total = friends * each
        first = rng.randint(1, total - 1)
        told = f"{first} {things} and {total - first} more, shared by {friends}"
        sums = f"{first} + {total - first} = {total}", f"{total} / {friends} = {each}"
    return told + rng.choice((": ", "\n")) + rng.choice((", ", "; ", ". ")).join(sums)


def _described(rng: random.Random) -> str:
    """One step of any kind, told beside its calculation."""
    (name, _), (other, _) = rng.sample(PEOPLE, 2)
    things = rng.choice(THINGS)
    left, operator, right, result = _equation(rng)
    if operator == "+":
        told = (
            f"{name} has {left} {things} and gets {right} more",
            f"{name} has {left} {things}. {other} has {right} more than {name}",
            f"{name} has {left} {things} and {other} has {right}. Together",
        )
    elif operator == "-":
        told = (
            f"{name} has {left} {things} and gives {right} to {other}",
            f"{name} has {left} {things}. {other} has {right} fewer than {name}",
            f"{name} pays {right} of {left} dollars for {things}",
        )
    elif operator == "*":
        holder, plural = rng.choice(_HOLDERS)
        told = (
            f"{name} has {left} {plural} with {right} {things} in each {holder}",
            f"{name} has {left} {things}. {other} has {right} times as many",
            f"Each of the {things} costs {left} dollars and {name} buys {right}",
        )
    else:
        told = (
            f"{name} shares {left} {things} equally among {right} friends",
            f"{left} {things} in {right} equal piles",
            f"{name} pays {left} dollars for {right} {things}",
        )
    return rng.choice(told) + rng.choice((": ", ", so ", ".\n", ". ")) + f"{left} {operator} {right} = {result}"


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
                    f"{name} puts {article} {thing} into a {rng.choice(_HOLDERS)[0]} and takes it back later.",
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
    _facts: 6,
    _running: 3,
    _sequence: 1,
    _story: 4,
    _compare: 2.5,
    _groups: 2.5,
    _ledger: 4,
    _mixed: 3,
    _described: 4,
    _scene: 1.5,
}
