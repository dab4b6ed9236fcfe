"""Training examples of several sources: how often each is learnt from, and what each brings."""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def mixed(examples: Sequence[Any], weights: Mapping[str, float], *, seed: int) -> list[Any]:
    """Mix the examples of several sources.

    Args:
        examples: Each with the `source` that it is of.
        weights: By source. With 2.5, each example is there twice, and a random half of them a third time; at least one of
            each source is taken.
        seed: Decides which ones, and their order.
    Returns:
        Examples in random order, each as often as its source's weight says.
    """
    generator, taken = random.Random(seed), list[Any]()
    for source, weight in weights.items():
        found = [example for example in examples if example.source == source]
        whole, part = divmod(weight, 1)
        count = round(part * len(found)) if whole else max(1, round(part * len(found)))
        taken += int(whole) * found + generator.sample(found, min(count, len(found)))
    generator.shuffle(taken)
    return taken


def described_sources(examples: Sequence[Any], described: Callable[[Sequence[Any]], str]) -> list[str]:
    """Say what each of several sources brings.

    An example that is there twice counts twice, so that the shares are those of what is learnt from.

    Args:
        examples: Each with the `source` that it is of.
        described: Says in a line what the examples of one source are.
    Returns:
        A line each; none where there is one source only.
    """
    by_source: dict[str, list[Any]] = {}
    for one in examples:
        by_source.setdefault(one.source, []).append(one)
    if len(by_source) < 2:
        return []
    lines = []
    for source, found in by_source.items():
        name = source if source.startswith("hub:") else Path(source).name
        single = {id(one): one for one in found}
        again = "" if len(single) == len(found) else f"; {len(found):,} in one pass"
        lines.append(f"{name}: {described([*single.values()])}{again}, {len(found) / len(examples):.0%} of them all")
    return lines
