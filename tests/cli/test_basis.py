"""`pica basis` as a user calls it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pica.basis.file import open_basis


def test_it_says_what_it_made_and_how_it_is_used(pica: Callable, model_folder: Path, tmp_path: Path):
    made = pica("basis", model_folder, "-o", tmp_path / "b", "--r", 4, "--tokens", 300, "--target-modules", "q_proj")
    assert made.status == 0, made.err
    assert "activation directions of 2 layers, up to 4 each from 300 tokens of embedded" in made.out
    assert f"--adapter.projection activation --adapter.basis_from {tmp_path / 'b'}" in made.out
    basis = open_basis(tmp_path / "b")
    assert basis.layers == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert basis.about.base == str(model_folder)
    again = pica("basis", model_folder, "-o", tmp_path / "b", "--r", 4)
    assert again.status == 2
    assert "is not empty; choose another folder, or pass --overwrite" in again.err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--projection", "minor", "--data", "x.txt"], "projection minor looks at no data"),
        (["--target-modules", "q_prj"], "not found in the base model. Names that are near: o_proj, q_proj"),
    ],
)
def test_what_cannot_be_made_is_one_sentence(pica: Callable, model_folder: Path, tmp_path: Path, arguments, why):
    outcome = pica("basis", model_folder, "-o", tmp_path / "b", *arguments)
    assert outcome.status == 2
    assert why in outcome.err
    assert outcome.err.count("error:") == 1
    assert not (tmp_path / "b").exists()
