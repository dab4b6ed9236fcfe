"""`pica report`: the page of a run, or a comparison's anew, from what its folder holds."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pica.cli.options import command_parser
from pica.cli.show import show

EPILOG = """examples:
  pica report my-style
  pica report pica-compare-arithmetic-tiny
  pica report pica-compare-minilm-sst2 -o minilm.html
  pica report --vtab pica-vtab-* -o vtab.html
"""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = command_parser(
        "report",
        "Write one page from the folder of a finished run: the numbers before and after, the loss, the answers "
        "side by side, the recipe. Or write the page, results.csv and results.json of a comparison anew from the records of "
        "its cells; also of one that is unfinished.",
        EPILOG,
    )
    made.add_argument("folder", type=Path, nargs="+", help="output folder of pica train or pica compare")
    made.add_argument(
        "--vtab",
        action="store_true",
        help="the folders are runs or comparisons on sets of VTAB-1K: give the means of its groups",
    )
    made.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="the page, report.html in the folder if left out; with --vtab a page (.html) or numbers (.csv)",
    )
    made.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
    made.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    return made


def run(arguments: Sequence[str]) -> int:
    """Parse and write."""
    made = parser()
    given = made.parse_intermixed_args(arguments)  # a folder may also stand behind an option
    if len(given.folder) > 1 and not given.vtab:
        made.error("one folder at a time, but with --vtab")
    if given.output is None:
        return _write(given)

    from pica.files.output import claimed_file

    with claimed_file(given.output, overwrite=given.overwrite):
        return _write(given)


def _write(given: argparse.Namespace) -> int:
    if given.vtab:
        return _vtab(given.folder, given.output)
    given.folder = given.folder[0]

    from pica.report.pictures_page import is_picture_run, write_picture_page

    if is_picture_run(given.folder):
        show(f"Report: {write_picture_page(given.folder, page=given.output)}")
        return 0

    from pica.report.run_page import is_run, write_run_page

    if is_run(given.folder):
        show(f"Report: {write_run_page(given.folder, page=given.output)}")
        return 0

    from pica.cli.compare import print_summary
    from pica.report.comparison import write_report

    summary = write_report(given.folder, page=given.output)
    print_summary(summary, given.folder, given.output)
    return 0


def _vtab(folders: Sequence[Path], output: Path | None) -> int:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from pica.cli.console import table_console
    from pica.errors import ConfigError
    from pica.report.vtab import WHAT, overall_standing, read_vtab, write_vtab
    from pica.report.vtab_page import write_vtab_page

    if output is not None and output.suffix not in (".csv", ".html"):
        raise ConfigError(f"--output {str(output)!r}: with --vtab its name ends in .html (a page) or .csv (numbers).")
    methods = read_vtab(folders)
    if output is not None:  # before anything is shown: a reader such as `head` may end this process
        (write_vtab_page if output.suffix == ".html" else write_vtab)(methods, output)
    table = Table(title="VTAB-1K, top-1", title_justify="left", box=box.SIMPLE)
    table.add_column("", no_wrap=True)
    for name in ("sets", *methods[0].means):
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))  # to fit 80 columns
    for method in methods:
        means = ("-" if mean is None else f"{mean:.1%}" for mean in method.means.values())
        table.add_row(Text(method.label), f"{len(method.scores)}", *means)
    console = table_console()
    console.print(table)
    if found := overall_standing(methods):
        console.print(found.statement(WHAT), markup=False)
    console.print(
        "A mean is only given where all its sets are there. All sets counts each set the same, all groups each group."
    )
    if output is not None:
        console.print(f"{'Report' if output.suffix == '.html' else 'Numbers'}: {output}", markup=False)
    return 0
