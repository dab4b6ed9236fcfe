"""The command; see the package."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

import benchmarks.paper as package
import pica.cli
from benchmarks.harness import table as markdown_table
from benchmarks.paper import board
from benchmarks.paper.checks import hours_table, needs, needs_table, work_of
from benchmarks.paper.miniature import miniature, smaller
from benchmarks.paper.tables import TABLES, Table
from pica._devices import accelerator
from pica.errors import PicaError
from pica.files.output import write_text
from pica.report.summary import Stat, shown_mean, summarise


def check(table: Table, shared: dict[str, Any], methods: Sequence[dict[str, Any]], given: argparse.Namespace) -> bool:
    """Print what the rows would take; whether there is enough of all."""
    device = accelerator() or torch.device("cpu")
    targets = shared["adapter"]["target_modules"]
    rows = {row["label"]: {"target_modules": targets, **row["adapter"]} for row in methods}
    counts = (60, 12) if given.miniature else (table.train_examples, table.test_examples)
    work = work_of(shared, *counts, given.tokens or table.tokens)
    print(f"{table.title}: {len(rows)} rows, {len(given.seeds)} seed(s), on {_named(device)}\n", flush=True)
    found = needs(
        shared["model"]["path"],
        list(rows.values()),
        work,
        length=shared["trainer"]["max_length"],
        work_folder=given.work,
        device=device,
    )
    print(needs_table(found), flush=True)
    enough = not any(need.lacking for need in found)
    if not (enough or given.check):
        return False
    grids = {row["label"]: len(row["learning_rates"]) for row in methods}
    print(hours_table(shared["model"]["path"], rows, grids, work, len(given.seeds), device))
    print(
        f"As if each batch were padded to {work.tokens} tokens and each batch of answers went on to {work.answer_tokens}. "
        "Other methods' memory is not planned: a row that does not fit fails, with the reason, and the others go on.\n",
        flush=True,
    )
    return enough


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def results(table: Table, folder: Path) -> str:
    """The rows beside the paper's, as Markdown."""
    summary = summarise(folder)
    measured = {row.label: row for row in summary.rows if row.done}
    shown_sets = list(table.tests) or ["mean"]
    lines = []
    for row in table.rows:
        own = measured.get(row.label)
        stats: dict[str, Stat] = {**own.sets, "mean": own.score} if own else {}
        cells = []
        for name in shown_sets:
            cells += [shown_mean("accuracy", stats[name]) if name in stats else "–"]
            cells += [f"{row.published[name]:.2f}%" if name in row.published else "–"]
        size, rate = (f"{own.parameters:,}", f"{own.rate:g}{'*' if own.edge else ''}") if own else ("–", "–")
        lines.append([row.label, size, rate, *cells, str(len(own.done)) if own else "–"])
    header = [
        "row",
        "parameters",
        "rate",
        *(f"{name}{what}" for name in shown_sets for what in ("", ", paper")),
        "seeds",
    ]
    standing = f"{summary.standing.statement()}\n\n" if summary.standing else ""
    parts = "\nmath is MATH-500, a tenth of what the paper reports.\n" if "math" in table.tests else ""
    note = "\n* the best rate is at the edge of its grid.\n" if any(row.edge for row in measured.values()) else ""
    return f"# {table.title}\n\n{standing}{markdown_table(header, lines)}{parts}{note}"


def run_table(table: Table, given: argparse.Namespace) -> int:
    """Check, run what is left, and write the page."""
    folder = given.work / (f"{table.name}-miniature" if given.miniature else table.name)
    shared: Any = table.fields()
    for name in ("model", "train", "test"):
        if value := getattr(given, name):
            section, field = ("model", "path") if name == "model" else ("data", name)
            shared[section][field] = value
    if given.miniature:
        shared = miniature(table, shared, folder)
        table = replace(table, rows=tuple(map(smaller, table.rows)), title=f"{table.title}, in miniature")
    content = table.comparison(shared, tuple(given.seeds), one_rate=given.one_rate)
    if not given.no_check and not check(table, shared, content["methods"], given):
        print("There is too little of something, see above; --no-check goes on all the same.", file=sys.stderr)
        return 2
    if given.check:
        return 0
    file = folder / "comparison-asked.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, yaml.safe_dump(content, sort_keys=False))
    output = folder / "runs"
    status = pica.cli.main(["compare", str(file), "--output", str(output), *given.compare])
    if status:
        return status
    text = results(table, output)
    write_text(folder / "results.md", text)
    print(f"\n{text}\npage:  {output / 'report.html'}\ntable: {folder / 'results.md'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.paper",
        epilog="After -- come options of pica compare: -- --workers 2 --shard 1/4 --retry-failed",
        description=package.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", choices=[*TABLES, board.NAME])
    parser.add_argument("--work", type=Path, required=True, help="where the runs go, and go on")
    parser.add_argument("--check", action="store_true", help="say what it would take, and begin nothing")
    parser.add_argument("--no-check", action="store_true", help="begin at once")
    parser.add_argument(
        "--miniature", action="store_true", help="small models of the same architecture, made-up problems"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="the first one chooses the rates (default: 0)"
    )
    parser.add_argument("--one-rate", action="store_true", help="only the middle rate of each row's grid")
    parser.add_argument("--tokens", type=int, help="of a padded training sequence, for the hours")
    parser.add_argument("--model", help="folder or hub name in place of the table's")
    parser.add_argument("--train", help="training problems in place of the table's")
    parser.add_argument("--test", help="test problems in place of the table's")
    parser.add_argument("--peft", type=Path, help=f"{board.NAME}: a clone of PEFT's repository")
    asked = list(sys.argv[1:] if argv is None else argv)
    own = asked[: asked.index("--")] if "--" in asked else asked
    given = parser.parse_args(own)
    given.compare = asked[len(own) + 1 :]
    given.work = given.work.expanduser().resolve()
    try:
        return board.run(given) if given.table == board.NAME else run_table(TABLES[given.table], given)
    except PicaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
