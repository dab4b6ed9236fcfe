"""`pica env`: what to paste into a bug report."""

import argparse
from collections.abc import Sequence
from typing import Any

from pica.cli.options import command_parser
from pica.cli.show import show


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = command_parser("env", "Print versions, devices and caches.")
    made.add_argument("--json", action="store_true", help="print JSON")
    return made


def run(arguments: Sequence[str]) -> int:
    """Print versions, devices and caches."""
    given = parser().parse_args(arguments)

    from pica.experiments.environment import environment
    from pica.files.output import json_text

    found = environment()
    show(json_text(found, indent=2) if given.json else "\n".join(_lines(found)))
    return 0


def _lines(found: dict[str, Any]) -> list[str]:
    lines = []
    for section, values in found.items():
        lines.append(f"{section}:")
        lines += [f"  {name + ':':<18} {_value(value)}" for name, value in values.items()]
    return lines


def _value(value: Any) -> str:
    if isinstance(value, dict) and "fits" in value:  # a range of versions
        return f"{value['declared']} ({'fits' if value['fits'] else 'the installed version is outside of it'})"
    if isinstance(value, dict):  # a cache folder
        if value["path"] is None:
            return "off"
        size = "absent" if value["bytes"] is None else f"{value['bytes'] / 2**20:.1f} MiB"
        return f"{value['path']} ({size})"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)
