"""What digests see, and what they leave alone."""

import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pica.experiments.recipes.recipe import Recipe
from pica.experiments.train.origins import changes, differing_files, examples_digest, file_digest, model_digest, origin
from pica.tasks.base import Example, LabelledText


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of 36 MiB: two large tensors, and between them a small one."""
    file = tmp_path_factory.mktemp("large") / "model.safetensors"
    save_file({"a": torch.zeros(3 << 20), "b": torch.zeros(1000), "c": torch.zeros(6 << 20)}, file)
    return file


def offset_of(file: Path, tensor: str) -> int:
    import json

    with open(file, "rb") as opened:
        length = struct.unpack("<Q", opened.read(8))[0]
        return 8 + length + json.loads(opened.read(length))[tensor]["data_offsets"][0]


@pytest.mark.parametrize("place", ["a small tensor", "a retyped header", "half of the values"])
def test_changes_in_a_large_file_of_weights_show(large: Path, tmp_path: Path, place: str):
    copy = Path(shutil.copy(large, tmp_path))
    before = file_digest(copy)
    assert file_digest(large) == before, "a copy is the same, whenever it was made"
    with open(copy, "r+b") as file:
        if place == "a small tensor":
            file.seek(offset_of(copy, "b") + 2000)
            file.write(b"\x01")
        elif place == "a retyped header":
            content = file.read(300)
            file.seek(content.index(b"F32"))
            file.write(b"I32")
        else:
            begin = offset_of(copy, "c")
            file.seek(begin)
            file.write(b"\x01" * (12 << 20))
    assert file_digest(copy) != before


def test_a_file_that_changes_within_its_clocks_tick_is_read_again(tmp_path: Path):
    file = tmp_path / "x"
    file.write_text("1")
    status, before = file.stat(), file_digest(file)
    file.write_text("2")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_digest(file) != before


def test_of_a_model_its_own_files_count_and_others_do_not(model_folder: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    before = model_digest(str(folder))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(before)
    (folder / "README.md").write_text("x")
    (folder / "pica-run").mkdir()
    (folder / "pica-run" / "model.safetensors").write_text("x")
    os.utime(folder / "model.safetensors")
    assert model_digest(str(folder)) == before
    (folder / "config.json").write_text("{}")
    assert differing_files(before, model_digest(str(folder))) == ["config.json"]
    assert model_digest("embedded")
    assert model_digest("someone/not-in-the-cache") == {}
    assert differing_files(before, {}) == [], "what is not known says nothing"


def test_all_of_an_example_counts_but_where_it_stands():
    one = Example("2 + 3?", "It is 5.", "5", ("4", "5"))
    different = [replace(one, prompt="2 - 3?"), replace(one, completion="5"), replace(one, choices=("5", "4"))]
    assert len({examples_digest([each]) for each in (one, *different)}) == 4
    assert examples_digest([one, different[0]]) != examples_digest([different[0], one])
    text = LabelledText("good", "yes", place="train.tsv, line 7")
    assert examples_digest([text]) == examples_digest([replace(text, place="other.tsv, line 1")])
    assert examples_digest([text]) != examples_digest([replace(text, label="no")])


def test_what_changed_is_named_and_what_only_moved_is_not(recipe: Callable[..., Recipe]):
    rows = [Example("1?", "1", "1"), Example("2?", "2", "2")]
    made = recipe()
    before = origin(made, {"train": rows, "test": rows})
    moved = replace(
        made, output="elsewhere", model=replace(made.model, path="embedded"), trainer=replace(made.trainer, threads=9)
    )
    assert changes(before, before | {"settings": origin(moved, {})["settings"]}) == []
    other = replace(made, trainer=replace(made.trainer, max_steps=7))
    assert changes(before, origin(other, {"train": rows[:1], "test": rows})) == [
        "the training problems (2 then, 1 now, from 'embedded')",
        "trainer.max_steps (6 then, 7 now)",
    ]
    assert changes({}, before) == [], "a run of an earlier version has noted nothing"
