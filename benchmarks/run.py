"""Every benchmark that needs no data, one after another, and the page of their results.

    python -m benchmarks.run --quick      under ten minutes on two cores
    python -m benchmarks.run              about an hour
    python -m benchmarks.run --page       only write the tables that are there into the pages of docs/

Quick results go to benchmarks/results/quick/ and are not put on the page.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import RESULTS
from pica.files.output import write_text

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
BASES, ADAPTERS = PAGE.with_name("performance-bases.md"), PAGE.with_name("performance-adapters.md")
PICTURES = PAGE.with_name("vision.md")
"""Has the table of benchmarks.digits, which is run by itself."""
QUANTISED = PAGE.with_name("quantised.md")
"""Has the table of benchmarks.quantised, which needs a real model."""
RESULTS_PAGE = PAGE.with_name("results.md")
"""Has the tables of benchmarks.comparisons, which need real models and data."""
SCRIPTS = ["basis", "step_time", "many_adapters", "mixed_batches"]
BEGIN, END = "<!-- results of {} -->", "<!-- end of {} -->"


def write_page(page: Path | None = None) -> list[str]:
    """Put each result table that exists into its place on the page (`PAGE`); returns the names of those that do not."""
    page = page or PAGE
    text, missing = page.read_text(), []
    opening = re.compile(r"^<!-- results of (\S+) -->$", re.MULTILINE)
    names = opening.findall(text)
    for name in names:
        path = RESULTS / f"{name}.md"
        if not path.exists():
            missing.append(name)
            continue
        before, rest = text.split(BEGIN.format(name), 1)
        after = rest.split(END.format(name), 1)[1]
        text = f"{before}{BEGIN.format(name)}\n{path.read_text().strip()}\n{END.format(name)}{after}"
    write_text(page, text)
    return missing


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--page", action="store_true")
    given = parser.parse_args(argv)
    failed = []
    if not given.page:
        for script in SCRIPTS:
            begun = time.monotonic()
            command = [sys.executable, "-m", f"benchmarks.{script}"]
            command += ["--quick", "--name", f"quick/{script}"] if given.quick else []
            print(f"+ {' '.join(command[1:])}", flush=True)
            if subprocess.run(command, check=False).returncode:
                failed.append(script)
            print(f"  {time.monotonic() - begun:.0f} s\n", flush=True)
    if not given.quick:
        pages = (PAGE, BASES, ADAPTERS, PICTURES, QUANTISED, RESULTS_PAGE)
        missing = [name for page in pages for name in write_page(page)]
        wrote = ", ".join(page.name for page in pages)
        print(f"Wrote {wrote}" + (f"; no results yet of {', '.join(missing)}" if missing else ""))
    if failed:
        print(f"Failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
