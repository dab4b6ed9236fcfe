"""Holds the package's files to what pyproject.toml says of them: no circle of imports, and no file that is too long.

    python tools/check_house.py

Prints what is wrong; the exit status says whether anything is.
"""

from __future__ import annotations

import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
FRONT_DOOR = "pica"  # loads its public names on use, so that every floor may import it


def circle() -> list[str]:
    """Modules that import each other, for type checking only or not; empty if there are none."""
    graph = grimp.build_graph(FRONT_DOOR, cache_dir=None)
    rooms = graph.modules - {FRONT_DOOR}
    try:
        TopologicalSorter({room: graph.find_modules_directly_imported_by(room) & rooms for room in rooms}).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def lengths() -> dict[str, int]:
    """Lines of each source file."""
    files = sorted((ROOT / "src").rglob("*.py"))
    return {str(f.relative_to(ROOT)): len(f.read_text(encoding="utf-8").splitlines()) for f in files}


def main() -> int:
    """Check, and give the exit status."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        house = tomllib.load(file)["tool"]["pica-house"]
    problems = []
    if found := circle():
        problems.append(f"these files import each other in a circle: {' -> '.join(found)}")
    for name, lines in lengths().items():
        if lines > house["lines"]:
            problems.append(f"{name} has {lines} lines and may have {house['lines']}")
    for problem in problems:
        print(problem)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
