"""A screen of bases: what is read, how layers are pooled, and what it looks like."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pica.calibration.capture import LayerCapture
from pica.calibration.texts import Calibration
from pica.cli import main
from pica.errors import DataError
from pica.experiments.results.screening import Screen, ScreenRow, TextRead
from pica.experiments.screening import as_batch, pooled, without
from pica.report.screening import as_text
from tests import results
from tests.experiments.tiny import write_tiny_llama


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


def text(*rows: list[int]) -> Calibration:
    about = {"source": "rows", "digest": "d", "tokens": sum(map(len, rows)), "sequences": len(rows), "seed": 0}
    return Calibration([{"input_ids": torch.tensor([row])} for row in rows], about)


def test_a_batch_has_labels_but_for_its_padding():
    batch = as_batch(text([5, 6, 7], [8]))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]


def test_what_the_gradient_is_of_is_left_out_of_the_calibration_text():
    read = without(text([1, 2, 3], [4, 5], [6, 7]), text([1, 2], [4, 5, 9]))
    assert [batch["input_ids"].tolist() for batch in read.batches] == [[[6, 7]]]
    assert (read.about["tokens"], read.about["sequences"]) == (2, 1)
    assert "digest" not in read.about
    whole = text([1, 2])
    assert without(whole, text([3])) is whole
    with pytest.raises(DataError, match="holds no text but what the gradient is of"):
        without(text([1, 2]), text([1, 2]))


def test_layers_are_pooled_by_their_energies():
    captured = {
        "h.0.q": LayerCapture(10, 3.0, {"a": 0.5}),
        "h.1.q": LayerCapture(10, 1.0, {"a": 0.1}),
        "h.0.down": LayerCapture(40, 4.0, {"a": 1.0}),
    }
    q, down, whole = pooled(captured, {"h.0.q": 2, "h.1.q": 2, "h.0.down": 2})
    assert (q.role, q.layers, q.chance, q.shares["a"]) == ("h.*.q", 2, 0.2, pytest.approx((1.5 + 0.1) / 4))
    assert (down.role, down.layers, down.chance, down.shares["a"]) == ("h.*.down", 1, 0.05, 1.0)
    assert (whole.role, whole.layers) == ("all", 3)
    assert whole.shares["a"] == pytest.approx((1.5 + 0.1 + 4) / 8)
    assert whole.chance == pytest.approx((4 * 0.2 + 4 * 0.05) / 8)


def test_lines_fit_a_terminal_however_long_a_roles_name_is():
    names = ("principal", "random", "minor", "activation", "weighted")
    shares: dict[str, float] = dict.fromkeys(names, 1.0)
    roles = ["encoder.layer.*.attention.output.dense.of.a.deep.model", "encoder.layer.*.x", "all"]
    read = TextRead(source="train.jsonl", tokens=20_000, sequences=80, seed=0)
    rows = [ScreenRow(role=role, layers=12, chance=0.05, shares=shares) for role in roles]
    found = Screen(r=32, gradient=read, calibration=read, rows=rows, notes=["A note. " * 20])
    lines = as_text(found).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("...") and line.count("100.0%") == 5 for line in lines)
    assert "A screen, not a prediction" in as_text(found)


def test_plan_and_analyze_say_the_same(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Callable[[Path], Path]
):
    data = str(words(tmp_path / "words.txt"))
    screened = ["--screen", data, "--calibration", data]
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    plan = ["plan", str(model_folder), "--r", "4", "--length", "8", "--batch", "1", "--target-modules", *targets]
    assert main([*plan, *screened, "--json"]) == 0
    (tmp_path / "plan.json").write_text(capsys.readouterr().out)
    results.check_file("plan", tmp_path / "plan.json")
    planned = json.loads((tmp_path / "plan.json").read_text())["screen"]
    assert main(["analyze", str(model_folder), "-o", str(tmp_path / "a"), "--rank", "4", *screened]) == 0
    shown = capsys.readouterr().out
    results.check_file("analysis", tmp_path / "a" / "analysis.json")
    analysed = json.loads((tmp_path / "a" / "analysis.json").read_text())["screen"]
    assert sorted(row["role"] for row in planned["rows"]) == sorted(row["role"] for row in analysed["rows"])
    by_role = {row["role"]: row for row in planned["rows"]}
    for row in analysed["rows"]:
        assert row["shares"].keys() == {"principal", "random", "minor", "activation", "weighted"}
        assert row["chance"] == pytest.approx(by_role[row["role"]]["chance"])
        for name, share in row["shares"].items():
            assert 0 < share <= 1
            assert share == pytest.approx(by_role[row["role"]]["shares"][name], rel=1e-3)
    assert analysed["gradient"]["tokens"] + analysed["calibration"]["tokens"] <= 300 * 20
    assert "A screen, not a prediction" in shown
    page = (tmp_path / "a" / "report.html").read_text()
    assert "A screen of bases" in page
    assert "activation" in page


def test_without_calibration_text_only_the_weights_own(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Callable[[Path], Path]
):
    data = str(words(tmp_path / "words.txt"))
    arguments = ["plan", str(model_folder), "--r", "4", "--length", "8", "--batch", "1", "--screen", data]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    header = next(line for line in out.splitlines() if "principal" in line)
    assert header.split() == ["role", "r/n", "principal", "random", "minor"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--calibration", "x.txt"], "--calibration is for --screen"),
        (["--screen", "nowhere.txt"], "nowhere.txt"),
        (["--screen", "WORDS", "--calibration", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str],
    said: str,
    model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: Callable[[Path], Path],
):
    place = str(words(tmp_path / "words.txt"))
    arguments = [place if argument == "WORDS" else argument for argument in arguments]
    for command in (
        ["plan", str(model_folder), "--length", "8"],
        ["analyze", str(model_folder), "-o", str(tmp_path / "a")],
    ):
        assert main([*command, *arguments]) == 2
        shown = capsys.readouterr()
        assert said in shown.err
        assert "Traceback" not in shown.err
    assert not (tmp_path / "a" / "analysis.json").exists()


def test_a_model_that_predicts_no_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Callable[[Path], Path]
):
    from tests.experiments.tiny_encoder import write_tiny_bert

    folder = write_tiny_bert(tmp_path / "bert")
    assert main(["plan", str(folder), "--length", "8", "--batch", "1", "--screen", str(words(tmp_path / "w.txt"))]) == 2
    assert "--screen is for models that predict text" in capsys.readouterr().err


@pytest.fixture
def words() -> Callable[[Path], Path]:
    """Writes three hundred short texts of the characters that the tiny model knows."""

    def write(path: Path) -> Path:
        path.write_text("\n\n".join(f"{n} + {n % 7} = {n + n % 7}." for n in range(100, 400)), encoding="utf-8")
        return path

    return write
