"""`pica compare` and `pica report` through the console script's own function."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tests.experiments.tiny_vision import write_pictures, write_tiny_vision
from tests.report.browser import check_page

from pica.experiments.compare.comparison import builtin_comparisons


@pytest.fixture
def comparison(model_folder: Path, tmp_path: Path) -> Path:
    content = {
        "name": "tiny",
        "base": {
            "model": {"path": str(model_folder)},
            "data": {"train_limit": 24, "test_limit": 2, "validation_limit": 2},
            "task": {"max_new_tokens": 2},
            "adapter": {"target_modules": ["q_proj", "v_proj"]},
            "trainer": {"max_steps": 2, "batch_size": 4, "threads": 1},
        },
        "methods": [
            {"label": "PiCa r=2", "adapter": {"method": "pica", "r": 2}, "learning_rates": [0.01]},
            {
                "label": "BOFT",
                "adapter": {"method": "boft", "options": {"boft_block_size": 7}},
                "learning_rates": [0.01],
            },
        ],
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_compare_then_report(pica: Callable, comparison: Path, tmp_path: Path):
    folder = tmp_path / "out"
    outcome = pica("compare", comparison, "-o", folder, "--trainer.max_steps", "3")
    assert outcome.status == 0, outcome.err
    assert "2/2 cells" in outcome.err
    assert "PiCa r=2" in outcome.out
    assert "…" not in outcome.out, "nothing is cut off"
    assert "BOFT: 1 failed" in outcome.out, "a method that does not fit the layers is told, not hidden"
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["seeds_done"] for row in rows] == [1, 0]
    assert (folder / "report.html").is_file()
    record = json.loads(next((folder / "cells").glob("*.json")).read_text())
    assert record["recipe"]["trainer"]["max_steps"] == 3
    page = tmp_path / "page.html"
    again = pica("report", folder, "-o", page)
    assert again.status == 0, again.err
    assert page.read_text() == (folder / "report.html").read_text()


def test_methods_that_begin_with_a_look_at_data(pica: Callable, comparison: Path, tmp_path: Path):
    content = yaml.safe_load(comparison.read_text())
    content["methods"] = [
        {"label": "PiCa r=4, activation", "adapter": {"method": "pica", "r": 4, "projection": "activation"}},
        {"label": "EVA r=2", "adapter": {"method": "eva", "r": 2}},
        {"label": "LoRA r=2", "adapter": {"method": "lora", "r": 2}},
    ]
    comparison.write_text(yaml.safe_dump(content | {"learning_rates": [0.01]}))
    outcome = pica("compare", comparison, "-o", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert [(row["label"], row["seeds_done"]) for row in rows] == [
        ("PiCa r=4, activation", 1),
        ("EVA r=2", 1),
        ("LoRA r=2", 1),
    ]
    cells = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").glob("*.json")]
    losses = {cell["recipe"]["adapter"]["method"]: cell["result"]["loss"] for cell in cells}
    assert losses["eva"] != losses["lora"], "another start than LoRA's"
    page = (tmp_path / "out" / "report.html").read_text()
    check_page(page)
    assert "EVA r=2" in page


def test_list_says_what_would_be_done(pica: Callable, comparison: Path, tmp_path: Path):
    outcome = pica("compare", comparison, "--seeds", "0,1,2", "--list", "-o", tmp_path / "out")
    assert outcome.status == 0
    assert "2 methods x 3 seeds: 6 trainings" in outcome.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such"], "neither a file nor built in"),
        (["smolm2-arithmetic"], "Did you mean 'smollm2-arithmetic'?"),
        (["a", "b"], "One comparison at a time"),
        (["--frobnicate", "1"], "Unknown option --frobnicate"),
        (["--workers", "none"], "--workers none: expected a whole number from 1"),
        (["--seeds", "0,x"], "--seeds x: expected a whole number"),
        (["--trainer.learning_rate", "1"], "is decided for each cell"),
        (["--adapter.method", "lora"], "is what a comparison's rows differ in"),
        (["--methods"], "Option --methods needs a value"),
        (["--methods", ""], "--methods names nothing"),
        (["--seeds="], "--seeds names nothing"),
    ],
)
def test_mistakes_are_one_sentence(pica: Callable, arguments: list[str], message: str):
    outcome = pica("compare", *arguments)
    assert outcome.status == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_report_of_something_else(pica: Callable, tmp_path: Path):
    outcome = pica("report", tmp_path)
    assert outcome.status == 2
    assert "no output folder of pica compare" in outcome.err


def test_help_lists_the_built_in_comparisons(pica: Callable):
    outcome = pica("compare", "--help")
    assert outcome.status == 0
    assert all(name in outcome.out for name in builtin_comparisons())


def test_pictures_are_compared_like_texts(pica: Callable, tmp_path: Path):
    """VTAB's protocol with two methods: rates chosen on held-out pictures, then trained on all, then put together."""
    write_tiny_vision(tmp_path / "vit")
    for name, count, offset in (("train", 24, 0), ("val", 8, 50), ("test", 10, 100)):
        write_pictures(tmp_path / "data" / name, count, offset=offset)
    content = {
        "name": "pictures",
        "base": {
            "model": {"path": str(tmp_path / "vit")},
            "data": {"train": str(tmp_path / "data"), "refit": True},
            "task": {"name": "vtab", "subset": "patch_camelyon"},
            "trainer": {"max_steps": 4, "batch_size": 8, "log_steps": 1, "threads": 1},
        },
        "methods": [
            {"label": "PiCa", "adapter": {"method": "pica", "r": 8}, "learning_rates": [0.001, 0.01]},
            {
                "label": "LoRA",
                "adapter": {"method": "lora", "r": 2, "target_modules": ["q_proj"]},
                "learning_rates": [0.01],
            },
        ],
    }
    path = tmp_path / "pictures.yaml"
    path.write_text(yaml.safe_dump(content))
    folder = tmp_path / "out"
    outcome = pica("compare", path, "-o", folder)
    assert outcome.status == 0, outcome.err
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [(row["seeds_done"], row["metric"], row["head_parameters"]) for row in rows] == [(1, "accuracy", 66)] * 2
    records = [json.loads(file.read_text()) for file in (folder / "cells").glob("*.json")]
    for record in records:
        assert [step for step, _ in record["curve"]] == [1, 2, 3, 4], "the final training's curve and no other"
        refit = len(record["result"]["candidates"]) > 1
        assert record["result"].get("refit", False) == refit == (record["label"] == "PiCa")
    outcome = pica("report", "--vtab", folder)
    assert outcome.status == 0, outcome.err
    assert "LoRA" in outcome.out


@pytest.mark.parametrize(("shard", "said"), [("1/2", None), ("0/2", "--shard 0/2: expected I/N"), ("x", "--shard x")])
def test_a_shard_has_every_nth_row(pica: Callable, shard: str, said: str | None):
    rows = [line.split("  ")[0] for line in pica("compare", "--list").out.splitlines()[:-1]]
    outcome = pica("compare", "--list", "--shard", shard)
    if isinstance(said, str):
        assert outcome.status == 2
        assert said in outcome.err
    else:
        assert [line.split("  ")[0] for line in outcome.out.splitlines()[:-1]] == rows[::2]
