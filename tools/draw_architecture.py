"""Draws the floors of the package into docs/architecture.md from its own imports, so that the picture stays true.

    python tools/draw_architecture.py            write the picture into the page
    python tools/draw_architecture.py --check    exit 1 if the page shows another one

A room is a folder (or a single file) of `src/pica`; an arrow is an import between two rooms that no longer way implies.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- picture: made by tools/draw_architecture.py -->", "<!-- end of picture -->"


def floors() -> list[list[str]]:
    """Rooms of each floor, the top one first, as the import contract in pyproject.toml has them."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[room.strip().removeprefix("pica.") for room in layer.split(":")] for layer in layers]


def room_of(module: str, rooms: list[str]) -> str | None:
    """The room that a module is in: the longest name that its own begins with."""
    inside = [room for room in rooms if module == f"pica.{room}" or module.startswith(f"pica.{room}.")]
    return max(inside, key=len, default=None)


def imports(rooms: list[str]) -> set[tuple[str, str]]:
    """(importing room, imported room) for every two rooms."""
    graph = grimp.build_graph("pica", cache_dir=None)
    found = set()
    for module in graph.modules:
        here = room_of(module, rooms)
        for imported in graph.find_modules_directly_imported_by(module):
            there = room_of(imported, rooms)
            if here and there and here != there:
                found.add((here, there))
    return found


def reduced(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The edges that no longer way implies; the graph has no circle, which the import contract makes sure of."""
    after: dict[str, set[str]] = {}

    def reach(room: str) -> set[str]:
        if room not in after:
            direct = {there for here, there in edges if here == room}
            after[room] = direct.union(*map(reach, direct)) if direct else set()
        return after[room]

    return {
        (here, there)
        for here, there in edges
        if not any(there in reach(other) for first, other in edges if first == here and other != there)
    }


def size(room: str) -> str:
    """Files of a room."""
    place = ROOT / "src" / "pica" / room.replace(".", "/")
    count = len(list(place.rglob("*.py"))) if place.is_dir() else 1
    return f"{count} file{'s' if count > 1 else ''}"


def picture() -> str:
    """The floors as a Mermaid graph."""
    plan = floors()
    rooms = [room for floor in plan for room in floor]
    lines = ["```mermaid", "flowchart TD"]
    for number, floor in zip(range(len(plan), 0, -1), plan):
        lines.append(f'    subgraph floor{number}["{number}"]')
        lines += [f'        {room.replace(".", "_")}["<b>{room}</b><br>{size(room)}"]' for room in floor]
        lines.append("    end")
    lines += [
        f"    {here.replace('.', '_')} --> {there.replace('.', '_')}" for here, there in sorted(reduced(imports(rooms)))
    ]
    return "\n".join([*lines, "```"])


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page shows another picture")
    check = parser.parse_args().check
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    made = f"{before}{BEGIN}\n{picture()}\n{END}{after}"
    if check:
        if made != text:
            print("docs/architecture.md shows another picture than the code gives: python tools/draw_architecture.py")
        return int(made != text)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
