"""Comparison files: what they may hold, and what is said about the others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import yaml

from pica.errors import ConfigError
from pica.experiments.compare.cells import make_cell
from pica.experiments.compare.comparison import builtin_comparisons, dump_comparison, load_comparison
from tests.experiments.tiny_vision import write_tiny_vision

SMALL = {
    "name": "small",
    "seeds": [3, 4],
    "learning_rates": [0.01, "1e-3"],
    "base": {"data": {"train_limit": 40}, "trainer": {"max_steps": 4}},
    "methods": [
        {"label": "PiCa", "adapter": {"method": "pica", "r": 4}},
        {"label": "LoRA", "adapter": {"method": "lora", "r": 1}, "learning_rates": [0.1]},
    ],
    "ablations": [{"title": "A", "question": "Q", "methods": ["PiCa", "LoRA"]}],
}


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    def write(**changes: object) -> str:
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in (SMALL | changes).items() if value != "absent"}))
        return str(path)

    return write


def test_rows_become_recipes(written: Callable[..., str]):
    comparison = load_comparison(
        written(), overrides=[("trainer.max_steps", "7"), ("adapter.target_modules", "[q_proj]")]
    )
    one, other = comparison.rows
    assert one.learning_rates == (0.001, 0.01)
    recipe = comparison.recipe(one, 3, one.learning_rates)
    assert (recipe.trainer.seed, recipe.trainer.max_steps, recipe.trainer.learning_rates) == (3, 7, [0.001, 0.01])
    assert (recipe.adapter.method, recipe.adapter.r, recipe.adapter.target_modules) == ("pica", 4, ["q_proj"])
    assert recipe.evaluate_base, "once, by the first cell"
    assert recipe.data.hold_out, "every cell learns from the same problems"
    later = comparison.recipe(other, 4, (0.1,))
    assert not later.evaluate_base
    assert later.adapter.method == "lora"
    assert later.data == recipe.data


def test_a_dumped_comparison_reads_back(written: Callable[..., str], tmp_path: Path):
    comparison = load_comparison(written(), seeds=[9])
    again = tmp_path / "again.yaml"
    again.write_text(dump_comparison(comparison))
    assert load_comparison(str(again)) == comparison
    assert comparison.seeds == (9,)


@pytest.mark.parametrize("name", builtin_comparisons())
def test_built_in_comparisons_are_right_once_their_places_are_given(name: str, tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    data = tmp_path / "rows.json"
    data.write_text("[]")
    places = {"data.train": str(data), "data.test": str(data)}
    comparison = load_comparison(name, overrides=[*places.items(), ("model.path", str(tmp_path))])
    assert len(comparison.rows) >= 6
    assert comparison.ablations
    assert all(row.learning_rates for row in comparison.rows)
    if name != "arithmetic-tiny":
        with pytest.raises(ConfigError, match=r"data\.train is not set"):
            load_comparison(name)


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"metods": []}, ["metods: no such field"]),
        ({"methods": []}, ["methods: expected a list"]),
        ({"methods": [{"adapter": {}}]}, ["methods, entry 1: expected a mapping with a label"]),
        ({"methods": [*SMALL["methods"], {"label": "PiCa"}]}, ["label 'PiCa' occurs twice"]),
        ({"methods": [{"label": "x", "adapter": {"method": "lara"}}], "ablations": "absent"}, ["did you mean 'lora'"]),
        ({"methods": [{"label": "x", "adapter": {"rank": 3}}], "ablations": "absent"}, ["adapter.rank: no such field"]),
        ({"learning_rates": [-1]}, ["learning_rates: expected numbers above 0"]),
        ({"learning_rates": "absent"}, ["'PiCa': no learning_rates"]),
        ({"seeds": "absent", "base": {"trainer": {"seed": 3}}}, ["trainer.seed is decided for each cell"]),
        ({"seeds": ["a"]}, ["seeds: expected a list of whole numbers"]),
        ({"base": {"trainer": {"max_stepz": 3}}}, ["did you mean trainer.max_steps"]),
        ({"ablations": [{"title": "A", "methods": ["PICA"]}]}, ["'PICA' is no method's label"]),
        ({"seeds": [0, 0], "base": {"baseline": {"method": "lora"}}}, ["holds one twice", "instead of a baseline"]),
    ],
)  # fmt: skip
def test_mistakes_are_told_together(written: Callable[..., str], changes: dict, messages: list[str]):
    with pytest.raises(ConfigError) as caught:
        load_comparison(written(**changes))
    for message in messages:
        assert message in str(caught.value)


def test_what_is_wrong_with_all_rows_is_said_once(written: Callable[..., str]):
    with pytest.raises(ConfigError) as caught:
        load_comparison(written(), overrides=[("model.path", "./nowhere")])
    assert str(caught.value).count("nowhere") == 1


def test_labels_select_rows(written: Callable[..., str]):
    comparison = load_comparison(written())
    assert [row.label for row in comparison.selected(["lo", "PICA"])] == ["PiCa", "LoRA"]
    with pytest.raises(ConfigError, match="Did you mean 'LoRA'"):
        comparison.selected(["LoR4"])


def test_equal_work_has_equal_keys(written: Callable[..., str], tmp_path: Path):
    comparison = load_comparison(written())
    row = comparison.rows[0]
    key = make_cell(comparison, row, 3, (0.1,)).key
    same = load_comparison(written(name="other", title="x", seeds=[3, 4, 5]), overrides=[("trainer.threads", 2)])
    assert make_cell(same, same.rows[0], 3, (0.1,)).key == key
    assert make_cell(comparison, row, 4, (0.1,)).key != key
    assert make_cell(comparison, row, 3, (0.2,)).key != key
    changed = load_comparison(written(), overrides=[("trainer.max_steps", 5)])
    assert make_cell(changed, changed.rows[0], 3, (0.1,)).key != key


@pytest.mark.parametrize("several", [False, True])
def test_a_changed_data_file_makes_new_cells(written: Callable[..., str], tmp_path: Path, several: bool):
    file, other = tmp_path / "rows.jsonl", tmp_path / "others.jsonl"
    other.write_text("{}\n")
    train = [str(other), str(file)] if several else str(file)
    test = {"other": str(other), "rows": str(file)} if several else str(file)
    keys = []
    for content in ("{}\n", "{}\n{}\n", "{}\n"):
        file.write_text(content)
        comparison = load_comparison(written(), overrides=[("data.train", train), ("data.test", test)])
        keys.append(make_cell(comparison, comparison.rows[0], 0, (0.1,)).key)
    assert keys[0] == keys[2] != keys[1]


@pytest.mark.parametrize("file", ["train.jsonl", "dev.jsonl", "test.jsonl", "boolq/test.jsonl"])
def test_a_changed_file_in_a_data_folder_makes_new_cells(written: Callable[..., str], tmp_path: Path, file: str):
    folder, keys = tmp_path / "rows", []
    (folder / "boolq").mkdir(parents=True)
    for content in ("{}\n", "{}\n{}\n", "{}\n"):
        (folder / file).write_text(content)
        comparison = load_comparison(written(), overrides=[("data.train", str(folder)), ("data.test", str(folder))])
        keys.append(make_cell(comparison, comparison.rows[0], 0, (0.1,)).key)
    assert keys[0] == keys[2] != keys[1]


def test_a_changed_picture_makes_new_cells(written: Callable[..., str], tmp_path: Path):
    folder, elsewhere = tmp_path / "pictures", tmp_path / "elsewhere"
    for inner in (folder / "train" / "a", folder / "train" / "b", elsewhere):
        inner.mkdir(parents=True)
    (folder / "test.txt").write_text("../elsewhere/two.png a\n")
    model = write_tiny_vision(tmp_path / "vit")

    def key() -> str:
        places = [("task.name", "images"), ("model.path", str(model)), ("data.train", str(folder))]
        comparison = load_comparison(written(), overrides=places)
        return make_cell(comparison, comparison.rows[0], 0, (0.1,)).key

    keys = []
    for file in (folder / "train" / "a" / "one.png", folder / "train" / "b" / "one.png", elsewhere / "two.png"):
        file.write_bytes(b"first")
    keys.append(key())
    for file in (folder / "train" / "a" / "one.png", elsewhere / "two.png"):
        file.write_bytes(b"other")  # as long as before
        keys.append(key())
    (folder / "train" / "a" / "one.png").rename(folder / "train" / "a" / "three.png")
    keys.append(key())
    assert len(set(keys)) == 4
    (folder / "train" / "a" / "three.png").rename(folder / "train" / "a" / "one.png")
    (folder / "train" / "a" / "notes.md").write_text("no picture")
    assert key() == keys[2]


@pytest.mark.parametrize("form", ["names", "typed"])
def test_a_changed_picture_that_a_table_names_makes_new_cells(written: Callable[..., str], tmp_path: Path, form: str):
    folder, shots_folder = tmp_path / "pictures", tmp_path / "shots"
    folder.mkdir()
    shots_folder.mkdir()
    held = {"bytes": b"inside", "path": "../shots/unused.png"}
    shots: list[Any] = ["../shots/one.png", "../shots/two.png", "../shots/missing.png"]
    if form == "typed":
        shots = [{"bytes": None, "path": name} for name in shots] + [held]
    rows = {"image": shots, "label": list("abab")[: len(shots)]}
    features = {"image": datasets.Image(decode=False), "label": datasets.Value("string")}
    made = datasets.Dataset.from_dict(rows, datasets.Features(features) if form == "typed" else None)
    for split in ("train", "test"):
        pq.write_table(made.data.table, folder / f"{split}.parquet")
    model = write_tiny_vision(tmp_path / "vit")

    def key() -> str:
        places = [("task.name", "images"), ("model.path", str(model)), ("data.train", str(folder))]
        comparison = load_comparison(written(), overrides=places)
        return make_cell(comparison, comparison.rows[0], 0, (0.1,)).key

    for file in ("one", "two"):
        (shots_folder / f"{file}.png").write_bytes(b"first")
    before = key()
    (shots_folder / "unused.png").write_bytes(b"named by none, or held")
    assert key() == before
    (shots_folder / "two.png").write_bytes(b"other")
    assert key() != before
    (shots_folder / "two.png").write_bytes(b"first")
    assert key() == before
