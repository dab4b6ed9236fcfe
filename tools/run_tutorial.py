"""Run the commands of docs/tutorial.md and write what they print below each.

    python tools/run_tutorial.py                    those that need nothing but the package
    python tools/run_tutorial.py --model FOLDER     also those with SmolLM2-135M-Instruct, which lies there

A command is a line `$ ...` of a block `console`, with the lines that a backslash joins to it.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```console\n(\$ (?:[^\n]*\\\n)*[^\n]*\n)(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
NEED_MODEL = ("SmolLM2-135M-Instruct", "maren")


def run(text: str, folder: Path, model: Path | None = None) -> str:
    """The page with new outputs; `folder` is where the commands leave their files.

    Raises:
        RuntimeError: A command failed; the message holds what it said.
    """
    tools = folder / "bin"
    tools.mkdir()
    (tools / "pica").write_text(f'#!/bin/sh\nexec {sys.executable} -m pica "$@"\n')
    (tools / "pica").chmod(0o755)
    (folder / "examples").symlink_to(ROOT / "examples")
    if model is not None:
        (folder / NEED_MODEL[0]).symlink_to(model.resolve())
    path = f"{tools}:{os.environ['PATH']}"
    # COLUMNS: as wide as a page; one thread: the same numbers on any number of cores
    environment = os.environ | {"PATH": path, "COLUMNS": "88", "OMP_NUM_THREADS": "1", "PICA_DEVICE": "cpu"}

    def block(found: re.Match[str]) -> str:
        command = found[1].removeprefix("$ ")
        if model is None and any(name in command for name in NEED_MODEL):
            return found[0]
        done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{command}{done.stderr}")
        lines = [line.rstrip() for line in done.stdout.strip("\n").splitlines()]
        return "```console\n" + found[1] + "\n".join(lines) + "\n```"

    return BLOCK.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = run(PAGE.read_text(encoding="utf-8"), Path(folder), given.model)
    PAGE.write_text(text, encoding="utf-8")
    print(PAGE.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
