"""Writes the JSON schemas of the files that pica writes, from the dataclasses that hold their content.

python tools/write_schemas.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pica.experiments.results import FILES
from pica.experiments.results.documents import schema

FOLDER = Path(__file__).parents[1] / "src" / "pica" / "assets" / "schemas"


def written() -> dict[str, str]:
    """The text of each schema, by its file's name."""
    return {f"{name}.schema.json": json.dumps(schema(kind), indent=2) + "\n" for name, kind in FILES.items()}


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for name, text in written().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
