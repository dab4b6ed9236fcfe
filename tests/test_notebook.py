"""The notebook of examples/ runs from top to bottom, and gives what its outputs say."""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "first_steps.ipynb"


def cells() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def outputs() -> str:
    """What the committed notebook prints."""
    texts = [output.get("text", "") for cell in cells() for output in cell["outputs"]]
    return "".join("".join(text) for text in texts)


def test_the_outputs_are_kept_and_hold_no_error():
    found = [output for cell in cells() for output in cell["outputs"]]
    assert {output["output_type"] for output in found} <= {"stream", "display_data", "execute_result"}
    assert any("image/png" in output.get("data", {}) for output in found), "the curves"
    assert "/home/" not in NOTEBOOK.read_text()
    assert "/work/" not in NOTEBOOK.read_text()
    assert "refused: " in outputs()


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    left: dict[str, Any] = {}
    for number, cell in enumerate(cells()):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), left)
    printed = capsys.readouterr().out
    measured = left["measured"]
    assert measured["PiCa r=16"] < 0.5 * measured["the model alone"]
    assert measured["LoRA r=1"] < 0.5 * measured["the model alone"]
    assert left["done"].max_logit_difference < 1e-3
    refusals = [re.findall("^refused: .*30 of 30 layers", text, flags=re.MULTILINE) for text in (printed, outputs())]
    assert refusals[0] == refusals[1] != []
