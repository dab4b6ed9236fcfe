"""`pica report`: write a comparison's page anew from its records."""

import argparse
from collections.abc import Sequence
from pathlib import Path

EPILOG = """examples:
  pica report pica-compare-arithmetic-tiny
  pica report pica-compare-minilm-sst2 -o minilm.html
"""


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    made = argparse.ArgumentParser(
        prog="pica report",
        description="Write the page, results.csv and results.json of a comparison anew from the records of its cells; also "
        "of one that is unfinished.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("folder", type=Path, help="output folder of pica compare")
    made.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="the page; report.html in the folder if left out"
    )
    made.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    return made


def run(arguments: Sequence[str]) -> int:
    """Parse and write."""
    given = parser().parse_args(arguments)

    from pica.cli.compare import print_summary
    from pica.report.comparison import write_report

    summary = write_report(given.folder, page=given.output)
    print_summary(summary, given.folder, given.output)
    return 0
