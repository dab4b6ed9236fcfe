"""What every benchmark needs: interleaved timing, the machine, versions, results on disk."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pica.experiments.measuring import machine, versions
from pica.files.output import write_json, write_text

RESULTS = Path(__file__).parent / "results"


def describe_machine() -> dict[str, Any]:
    """Cores, threads, accelerators and versions; no host names."""
    return {"machine": {**vars(machine()), "load_before": round(os.getloadavg()[0], 2)}, "versions": versions()}


def interleaved(
    cases: Mapping[str, Callable[[], None]], *, repetitions: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call, the cases taking turns, so that whatever else the machine does falls on all of them.

    The order rotates from round to round: nobody always runs with the cache that another one left.
    """
    names = list(cases)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(warmup + repetitions):
        shift = round_ % len(names)
        for name in names[shift:] + names[:shift]:
            begun = time.perf_counter()
            cases[name]()
            if round_ >= warmup:
                taken[name].append(time.perf_counter() - begun)
    return taken


def ratios(taken: Mapping[str, list[float]], reference: str) -> dict[str, dict[str, float]]:
    """Median, and middle half, of each round's time over the reference's in the same round.

    A round's ratio is spared what slows the machine for longer than a round; a ratio of two medians is not.
    """
    found = {}
    for name, times in taken.items():
        paired = sorted(t / r for t, r in zip(times, taken[reference]))
        found[name] = {
            "ratio": round(statistics.median(paired), 4),
            "lower": round(paired[len(paired) // 4], 4),
            "upper": round(paired[(3 * len(paired)) // 4 - (len(paired) % 4 == 0)], 4),
        }
    return found


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table; numbers to the right."""
    cells = [[str(c) for c in row] for row in rows]
    numeric = [all(c[:1] in "-+0123456789" or c in ("", "–") for c in column) for column in zip(*cells)]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join("---:" if n else "---" for n in numeric) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells]) + "\n"


COPIED = ("report.html", "results.csv", "results.json", "comparison.yaml")
"""What is kept of an output folder of pica compare."""


def copy_comparison(folder: Path, name: str) -> None:
    """Keep the page and the numbers of a comparison in the results folder, under comparisons/NAME."""
    place = RESULTS / "comparisons" / name
    place.mkdir(parents=True, exist_ok=True)
    for file in COPIED:
        shutil.copyfile(folder / file, place / file)


def save(name: str, result: Mapping[str, Any], markdown: str, folder: Path | None = None) -> None:
    """Write NAME.json and NAME.md, into the results folder unless another is given."""
    folder = folder or RESULTS
    write_json(folder / f"{name}.json", json.loads(json.dumps(result)))
    write_text(folder / f"{name}.md", markdown)
