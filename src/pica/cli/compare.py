"""`pica compare`: several methods on one task, side by side."""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pica.cli.options import Words, add_trust, command_parser, split_words
from pica.cli.show import show
from pica.errors import ConfigError
from pica.foreign_code import FLAG
from pica.text import in_words

if TYPE_CHECKING:
    from pica.experiments.compare.cells import Cell
    from pica.experiments.results.comparison import CellRecord
    from pica.report.comparison import Summary

DEFAULT = "arithmetic-tiny"

DESCRIPTION = """Train several methods on one task with the same data, order, steps and
evaluation, each at the best of its learning rates by the validation problems,
with several seeds; write one report page. COMPARISON is a YAML file or one of
{builtin}.
Without one it is {default}, which needs no download.
"""

EPILOG = """Finished cells are never run again: the same command goes on where Ctrl-C, a
failure or a power cut ended it. A changed recipe makes new cells. Several of
these commands may share one folder, also from several machines: each runs what
no other is running, and writes the report when nothing is left to do.

examples:
  pica compare
  pica compare minilm-sst2 --model.path ./minilm --data.train ./sst2 --workers 2
  pica compare my-own.yaml --methods "PiCa;LoRA r=8" --seeds 0,1,2,3,4

The output folder gets report.html (one file, no network), results.csv,
results.json, comparison.yaml and cells/.
"""


def parser(*, everything: bool = False) -> argparse.ArgumentParser:
    """The options as argparse knows them, for help and completion; `split_arguments` reads them."""
    from pica.cli.recipe_help import add_fields
    from pica.experiments.compare.comparison import builtin_comparisons

    made = command_parser(
        "compare",
        DESCRIPTION.format(builtin=", ".join(builtin_comparisons()), default=DEFAULT),
        EPILOG,
        usage="pica compare [COMPARISON] [options] [--section.field VALUE ...]",
    )
    made.add_argument("comparison", nargs="?", metavar="COMPARISON", help=argparse.SUPPRESS)
    made.add_argument("-o", "--output", metavar="DIR", help="folder for results (default: pica-compare-NAME)")
    made.add_argument(
        "--methods", metavar="LABELS", help='only these rows: labels, or their beginnings, separated by ";"'
    )
    made.add_argument(
        "--seeds", metavar="NUMBERS", help="instead of the comparison's, as 0,1,2; the first one chooses the rates"
    )
    made.add_argument("--workers", metavar="N", help="cells at a time, each with its share of the cores (default: 1)")
    made.add_argument("--shard", metavar="I/N", help="every N-th row, from the I-th on: one for each of N jobs")
    made.add_argument("--retry-failed", action="store_true", help="run cells again that failed")
    add_trust(made)
    made.add_argument("--list", action="store_true", help="show the rows and how many trainings they need")
    made.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    if everything:
        add_fields(made, everything=True)
    else:
        made.add_argument_group(
            "fields of a recipe", "--section.field VALUE sets one in every cell; see pica train --help"
        )
    return made


def run(arguments: Sequence[str]) -> int:
    """Parse, run the grid, write the report, and print the table."""
    from pica.experiments.compare.comparison import check_methods, load_comparison

    if {"-h", "--help"} & set(arguments):
        show(parser().format_help(), end="")
        return 0
    reference, overrides, options = split_arguments(arguments)
    workers = _whole(options.get("workers", "1"), "--workers", least=1)
    seeds = [_whole(text, "--seeds", least=0) for text in _parts(options, "seeds", ",")]
    labels = _parts(options, "methods", ";")
    shard = parse_shard(options.get("shard", "1/1"))

    reference = DEFAULT if reference is None else reference
    comparison = load_comparison(reference, seeds=seeds, overrides=overrides)
    rows = comparison.selected(labels)[shard[0] - 1 :: shard[1]]
    trainings = sum(len(row.learning_rates) + len(comparison.seeds) - 1 for row in rows)
    if options.get("list"):
        for row in rows:
            show(f"{row.label:<28} rates {', '.join(f'{rate:g}' for rate in row.learning_rates)}")
        show(f"{len(rows)} methods x {len(comparison.seeds)} seeds: {trainings} trainings")
        return 0
    folder = Path(options.get("output") or f"pica-compare-{comparison.name}").expanduser()

    from pica.cli.console import loading

    with loading() as shown:
        check_methods(comparison, reference)
        from pica.experiments.compare.grid import run_grid
        from pica.report.comparison import write_report
    shown.say(
        f"Comparison {comparison.name}: {len(rows)} methods, {len(comparison.seeds)} seeds, {trainings} trainings, "
        f"into {folder}"
    )
    with GridDisplay(shown.console, len(rows) * len(comparison.seeds)) as display:
        run_grid(
            comparison, rows, folder, workers=workers, watcher=display, retry_failed=bool(options.get("retry_failed"))
        )
    summary = write_report(folder)
    print_summary(summary, folder)
    return 0 if any(row.done for row in summary.rows) else 2


def split_arguments(arguments: Sequence[str]) -> Words:
    """Split what follows `pica compare`.

    Args:
        arguments: As the shell gave them.
    Returns:
        The comparison, the fields of every cell's recipe, and the options by name.
    Raises:
        ConfigError: An option is unknown or has no value, a field is not for all cells, or there are two comparisons.
    """
    words = split_words(
        arguments,
        noun="comparison",
        flags=("--retry-failed", "--list", FLAG),
        valued=("--output", "--methods", "--seeds", "--workers", "--shard"),
        is_field=lambda name: name.startswith("--") and ("." in name or name == "--evaluate_base"),
        advice="see pica compare --help. Recipe fields are --section.field VALUE.",
    )
    _, overrides, options = words
    if options.get("trust_remote_code"):
        overrides.append(("model.trust_remote_code", True))
    for key, _ in overrides:
        if key in ("trainer.seed", "trainer.learning_rate", "trainer.learning_rates") or key.startswith("baseline."):
            raise ConfigError(
                f"--{key}: is decided for each cell; use --seeds, or learning_rates in the comparison's file."
            )
        if key in ("adapter.method", "adapter.r"):
            raise ConfigError(f"--{key}: is what a comparison's rows differ in; change it in the comparison's file.")
    return words


class GridDisplay:
    """The whole grid and each worker's cell, as bars on a terminal, as lines in a log file."""

    def __init__(self, console: Any, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._console, self._begun, self._done = console, time.monotonic(), 0
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._all = self._progress.add_task("all cells", total=total, note="")
        self._tasks: dict[int, Any] = {}
        self._first_done: int | None = None

    def __enter__(self) -> "GridDisplay":
        self._progress.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._progress.stop()

    def begun(self, worker: int, cell: "Cell") -> None:
        """See `Watcher`."""
        if worker not in self._tasks:
            self._tasks[worker] = self._progress.add_task("", total=None, note="")
        self._progress.reset(self._tasks[worker], description=f"  {cell.label}", total=None, note="starting")

    def progress(self, worker: int, label: str, done: int, total: int, note: str) -> None:
        """See `Watcher`."""
        step = label.rpartition(": ")[2] if ": " in label else label.rpartition(", ")[2]
        self._progress.update(self._tasks[worker], completed=done, total=total, note=f"{step}  {note}")

    def ended(self, worker: int, cell: "Cell", record: "CellRecord") -> None:
        """See `Watcher`."""
        if record.status == "failed":
            self._say(f"{cell.label}: failed: {record.error}")
        else:
            shown = f"{record.result.score:.4f}" if math.isfinite(record.result.score) else "undefined"
            self._say(f"{cell.label}: {shown} at rate {record.result.learning_rate:g}, {record.wall_seconds:.0f} s")
        self._progress.update(self._tasks[worker], note="")

    def grid(self, done: int, failed: int, total: int) -> None:
        """See `Watcher`."""
        now = time.monotonic()
        if self._first_done is None:
            self._first_done = done  # those of earlier runs say nothing about how long the rest takes
        fresh = done - self._first_done
        note = f"{failed} failed  " if failed else ""
        if fresh > 0 and done < total:
            note += f"about {(now - self._begun) / fresh * (total - done) / 60:.0f} min left"
        self._progress.update(self._all, completed=done, note=note)
        if not self._console.is_terminal and done != self._done:
            self._say(f"{done}/{total} cells, {now - self._begun:.0f} s{', ' + note if note else ''}")
        self._done = done

    def warn(self, text: str) -> None:
        """See `Watcher`."""
        self._say(f"warning: {text}")

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False)


def print_summary(summary: "Summary", folder: Path, page: Path | None = None) -> None:
    """The table, and what lies where; `page` if it is not report.html in the folder."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from pica.cli.console import print_sentences, table_console
    from pica.report.summary import SPREADS, shown_row

    title = summary.title + (", one seed" if summary.one_seed else "")
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in ("", "trainable", "rate", in_words(summary.metric), "", "s/\ntraining", "peak\nMiB"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for row in summary.rows:
        if not row.done:
            table.add_row(Text(row.label), "", "", "failed" if row.failures else "not run")
            continue
        rate = f"{row.rate:g}" + ("*" if row.edge else "")
        place = summary.standing.place(row.label) if summary.standing else ""
        cells = (f"{row.parameters:,}", rate, shown_row(summary.metric, row), place)
        table.add_row(Text(row.label), *cells, f"{row.seconds.mean:.1f}", f"{row.memory.mean:.0f}")
    console = table_console()
    console.print(table)
    if summary.standing:
        print_sentences(console, summary.standing.statement())
    print_sentences(console, f"{SPREADS}; * the best rate is at the edge of its grid\n")
    for row in summary.rows:
        if row.failures:
            print_sentences(console, f"{row.label}: {len(row.failures)} failed: {row.failures[0]}")
    console.print(f"Report:  {page or folder / 'report.html'}", markup=False)
    console.print(f"Numbers: {folder / 'results.csv'}, {folder / 'results.json'}", markup=False)


def parse_shard(text: str) -> tuple[int, int]:
    """Read --shard.

    Args:
        text: "i/N".

    Returns:
        (i, N).

    Raises:
        ConfigError: It is nothing like that, or i is not from 1 to N.
    """
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ConfigError(f"--shard {text}: expected I/N with I from 1 to N, for instance 2/4.")
    return int(number), int(count)


def _parts(options: Mapping[str, Any], name: str, separator: str) -> list[str]:
    found = [part.strip() for part in options.get(name, "").split(separator) if part.strip()]
    if name in options and not found:  # such as an empty shell variable; it must not mean "all of them"
        raise ConfigError(f"--{name} names nothing; separate several by {separator!r}, or leave it out.")
    return found


def _whole(text: str, option: str, *, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise ConfigError(f"{option} {text}: expected a whole number from {least}.")
    return value
