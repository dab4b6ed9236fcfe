"""The tutorial prints what its commands print."""

import re
from pathlib import Path

import pytest
from tools import run_tutorial

NUMBER = re.compile(r"\d[\d,.]*(?:e-?\d+)?")


def words(text: str) -> str:
    """A page without what varies: numbers, and how wide columns are because of them."""
    return re.sub(r"[ ─]+", " ", NUMBER.sub("#", text))


@pytest.mark.slow
def test_the_outputs_are_those_of_the_commands(tmp_path: Path):
    page = run_tutorial.PAGE.read_text(encoding="utf-8")
    assert len(run_tutorial.BLOCK.findall(page)) == 5
    again = run_tutorial.run(page, tmp_path)
    assert words(again) == words(page), "run python tools/run_tutorial.py"
    reached = [float(re.findall(r"pica r=16 .* (\d+\.\d)% ±", text)[0]) for text in (page, again)]
    assert abs(reached[0] - reached[1]) <= 10


def test_a_command_that_fails_is_told(tmp_path: Path):
    with pytest.raises(RuntimeError, match="no such"):
        run_tutorial.run("```console\n$ echo no such thing >&2; false\nold\n```\n", tmp_path)
