"""Put what `pica compare` measured on real models and data into the results, and into docs/results.md.

    python -m benchmarks.comparisons OUTPUT_OF_PICA_COMPARE ...

Each folder's page and numbers are copied to benchmarks/results/comparisons/NAME, its table to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import copy_comparison, save, table
from benchmarks.run import RESULTS_PAGE, write_page
from pica.experiments.uncertainty import shown_interval
from pica.report.summary import Summary, shown_mean, summarise


def comparison_table(summary: Summary) -> str:
    """A Markdown table: one line a method that was run, in the comparison's order."""
    header = ["method", "trainable", "learning rate", summary.metric, "95% interval", "best", "test loss", "seconds"]
    header.append("seeds")
    seeds = len(summary.content["seeds"])
    shown: list[list[Any]] = []
    for row in summary.rows:
        if not row.done:
            if row.failures:
                shown.append([row.label, "", "", "failed", "", "", "", "", ""])
            continue
        rates = ", ".join(f"{candidate.learning_rate:g}" for candidate in row.candidates)
        rate = f"{row.rate:g} of {rates}" + (" (edge)" if row.edge else "")
        spread = "" if row.loss.deviation is None else f" ± {row.loss.deviation:.3f}"
        place = summary.standing.place(row.label) if summary.standing else ""
        measured = [shown_mean(summary.metric, row.score), shown_interval(summary.metric, row.interval), place]
        measured += [f"{row.loss.mean:.3f}{spread}", f"{row.seconds.mean:.0f}"]
        shown.append([row.label, f"{row.parameters:,}", rate, *measured, f"{len(row.done)} of {seeds}"])
    return table(header, shown)


def heading(summary: Summary) -> str:
    """What was trained on what, and what the spread is of."""
    record = next(row.done[0] for row in summary.rows if row.done)
    problems, machine = record.problems, record.machine
    seeds = summary.content["seeds"]
    spread = f"mean ± standard deviation over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else "one seed"
    where = ", ".join(machine.accelerators) or f"{machine.threads} CPU thread(s)"
    return (
        f"{problems.train:,} training problems, learning rates chosen with seed {seeds[0]} on "
        f"{problems.validation} others, tested on {problems.test:,}; {spread}, and 95% intervals of the test problems"
        f"{' and seeds' if len(seeds) > 1 else ''}. {where}.\n\n{verdict(summary)}"
    )


def verdict(summary: Summary) -> str:
    """Who is best and who ties with it, as a paragraph."""
    return f"{summary.standing.statement()}\n\n" if summary.standing else ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of pica compare")
    given = parser.parse_args(argv)
    for folder in given.folders:
        summary = summarise(folder)
        name = summary.content["name"]
        copy_comparison(folder, name)
        numbers = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        save(f"comparison_{name}", {"comparison": numbers}, heading(summary) + comparison_table(summary))
        print(comparison_table(summary))
    write_page(RESULTS_PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
