"""`pica analyze` as a user calls it: what it writes, what it prints, what it refuses."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tests import results
from tests.report.browser import check_page

from pica.experiments.analyze import analysis as engine


@pytest.fixture
def tuned(model_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "tuned"
    folder.mkdir()
    for path in model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    g = torch.Generator().manual_seed(0)
    tensors = {
        name: t + 0.01 * torch.randn(t.shape, generator=g)
        for name, t in load_file(folder / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_pair_of_models(pica: Callable, model_folder: Path, tuned: Path, tmp_path: Path):
    out = tmp_path / "out"
    outcome = pica(
        "analyze", model_folder, tuned, "-o", out, "--rank", "4", "--suggest-rank", "0.5", "--only", "down|q_proj"
    )
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].split()[:3] == ["role", "layers", "out"]
    assert [line.split()[0] for line in lines[1:3]] == ["mlp.down_proj", "self_attn.q_proj"]
    assert max(len(line) for line in lines[:3]) <= 120
    assert "times what chance gives" in outcome.out

    results.check_file("analysis", out / "analysis.json")
    data = json.loads((out / "analysis.json").read_text())
    assert len(data["layers"]) == 4
    assert data["suggestion"]["ranks"].keys() == {role["role"] for role in data["roles"]}
    for role in data["roles"]:
        curve = role["curves"]["column"]
        assert curve == sorted(curve)
        assert role["curves"]["r"][0] == 1
    rows = list(csv.DictReader((out / "layers.csv").read_text().splitlines()))
    assert len(rows) == 4
    assert all(0 < float(row["column"]) < 1 and float(row["residual"]) >= float(row["optimum"]) for row in rows)
    assert len(list(csv.DictReader((out / "roles.csv").read_text().splitlines()))) == 2
    assert yaml.safe_load((out / "rank_pattern.yaml").read_text())["adapter"]["rank_pattern"].keys() == {
        "q_proj",
        "down_proj",
    }
    names = {path.name for path in (out / "figures").iterdir()}
    assert names == {f"{n}.{e}" for n in ("energy", "angles", "perturbations", "spectra") for e in ("png", "svg")}
    assert all((out / "figures" / n).read_bytes()[:4] == b"\x89PNG" for n in names if n.endswith("png"))
    page = (out / "report.html").read_text()
    check_page(page)
    assert "mathdefault" not in page
    for text in ("What holds", "Energy captured", "rank_pattern.yaml", "layers.csv"):
        assert text in page
    assert not (out / engine.PROGRESS).exists()


def test_a_base_alone(pica: Callable, tmp_path: Path):
    out = tmp_path / "out"
    outcome = pica("analyze", "embedded", "-o", out, "--suggest-rank", "0.9", "--only", "layers.0.self_attn.q")
    assert outcome.status == 0, outcome.err
    assert "eff. rank W" in outcome.out
    results.check_file("analysis", out / "analysis.json")
    assert {path.name for path in (out / "figures").iterdir()} == {"spectra.png", "spectra.svg"}
    assert "no task was looked at" in (out / "rank_pattern.yaml").read_text()
    page = (out / "report.html").read_text()
    check_page(page)
    assert "mathdefault" not in page, "labels are text, so a tick is a number and no formula"
    assert re.search(r">0\.[0-9]+<", page)


def test_an_interrupt_says_how_to_go_on(
    pica: Callable, model_folder: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measure, calls = engine._measure, []

    def stop(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(engine, "_measure", stop)
    command = ["analyze", model_folder, tuned, "-o", tmp_path / "out", "--only", "layers.*(o|up)_proj"]
    outcome = pica(*command)
    assert outcome.status == 130
    assert "The same command goes on from there." in outcome.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [engine.PROGRESS]
    assert pica(*command).status == 0
    assert len(calls) == 2 + 3
    again = pica(*command)
    assert again.status == 2
    assert "--overwrite" in again.err
    assert pica("analyze", tmp_path / "typo", *command[2:], "--overwrite").status == 2
    assert (tmp_path / "out" / "analysis.json").is_file(), "a mistake in the command costs no results"
    behind = ["analyze", model_folder, "--only", "layers.1.*up_proj", tuned, "-o", tmp_path / "out", "--overwrite"]
    assert pica(*behind).status == 0
    assert len(json.loads((tmp_path / "out" / "analysis.json").read_text())["layers"]) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--suggest-rank", "90"], "--suggest-rank 90.0 must lie above 0 and be at most 1"),
        (["--rank", "0"], "--rank 0 must be at least 1"),
        (["--intruder-top", "-1"], "--intruder-top -1 must be at least 1"),
        (["--only", "("], "is no regular expression"),
        (["--intruder-threshold", "2"], "--intruder-threshold 2.0"),
    ],
)
def test_bad_values(pica: Callable, model_folder: Path, tuned: Path, tmp_path: Path, given: list[str], message: str):
    outcome = pica("analyze", model_folder, tuned, "-o", tmp_path / "out", *given)
    assert outcome.status == 2
    assert message in outcome.err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(pica: Callable, model_folder: Path, tuned: Path, tmp_path: Path):
    outcome = pica("analyze", model_folder, tuned, "-o", model_folder, "--overwrite")
    assert outcome.status == 2
    assert "holds no analysis" in outcome.err
    assert (model_folder / "model.safetensors").is_file()


def test_names_that_are_formulas_or_steer_a_terminal(pica: Callable, tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    names = ["blocks.0.$x_{$.weight", "blocks.0.\x1b[31mred\x07.weight", "blocks.1.=1+1.weight", "=cmd.<b>.weight"]
    for folder in ("base", "tuned"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text("{}")
        tensors = {name: torch.randn(24, 16, generator=generator) for name in names}
        save_file(tensors, tmp_path / folder / "model.safetensors")
    outcome = pica("analyze", tmp_path / "base", tmp_path / "tuned", "--rank", "4", "-o", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert "\x1b" not in outcome.out + outcome.err
    page = next((tmp_path / "out").glob("*.html")).read_text()
    assert "\x1b" not in page
    assert "cmd.&lt;b&gt;" in page
    assert "cmd.<b>" not in page
    assert "$x_{$" in page
    assert any(
        row.startswith("'=cmd") for file in (tmp_path / "out").glob("*.csv") for row in file.read_text().split("\n")
    )
