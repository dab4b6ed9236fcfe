"""The paper's tables as commands: rows that can be run, sizes as published, and the whole way in miniature."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from benchmarks.paper import board
from benchmarks.paper.__main__ import main
from benchmarks.paper.checks import Timed, work_of
from benchmarks.paper.tables import TABLES
from peft import get_peft_model
from tests.tuners.base.test_counts import GEMMA_2B, LLAMA_3_8B, on_meta

from pica.experiments.compare.comparison import check_methods, load_comparison
from pica.experiments.methods import configuration
from pica.experiments.recipes.recipe import AdapterSection

SIZES = {
    ("gemma-2b-metamathqa", "PiCa r=32"): 671_744,
    ("gemma-2b-metamathqa", "PiCa r=256"): 5_373_952,
    ("gemma-2b-metamathqa", "LoRA r=1"): 820_224,
    ("gemma-2b-metamathqa", "LoRA r=32"): 26_247_168,
    ("gemma-2b-metamathqa", "DoRA r=1"): 1_198_080,
    ("gemma-2b-metamathqa", "DoRA r=16"): 13_501_440,
    ("gemma-2b-metamathqa", "SVFT plain"): 193_536,
    ("gemma-2b-metamathqa", "SVFT random d=16"): 6_352_416,
    ("gemma-2b-commonsense", "SVFT banded d=16"): 6_352_416,
    ("llama-3-8b-metamathqa", "PiCa r=32"): 1_376_256,
    ("llama-3-8b-metamathqa", "PiCa r=256"): 11_010_048,
    ("llama-3-8b-metamathqa", "LoRA r=1"): 1_769_472,
}


@pytest.mark.parametrize("name", TABLES)
def test_every_row_can_be_run(name: str, tmp_path: Path):
    table, file = TABLES[name], tmp_path / "asked.yaml"
    shared: Any = table.fields()
    for split in ("train", "test"):
        if shared["data"].get(split) == "REQUIRED":
            shared["data"][split] = str(tmp_path)
    (tmp_path / "test.json").write_text("[]")
    file.write_text(yaml.safe_dump(table.comparison(shared, (0, 1), one_rate=False)))
    comparison = load_comparison(str(file))
    check_methods(comparison, str(file))
    assert all(len(row.learning_rates) == 3 for row in comparison.rows)
    assert [row.label for row in comparison.rows] == [row.label for row in table.rows if row.adapter is not None]


@pytest.mark.parametrize(("table", "label"), SIZES)
def test_rows_have_the_sizes_that_were_published(table: str, label: str):
    row = next(row for row in TABLES[table].rows if row.label == label)
    targets = TABLES[table].fields()["adapter"]["target_modules"]
    config = configuration(AdapterSection(**{"target_modules": targets, **(row.adapter or {})}))
    model = on_meta(LLAMA_3_8B if table.startswith("llama") else GEMMA_2B)
    with torch.device("meta"):
        adapted = get_peft_model(model, config)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == SIZES[table, label]


def test_hours_count_every_pass_and_every_answer():
    shared = TABLES["gemma-2b-metamathqa"].fields()
    work = work_of(shared, 40_000, 1_319, 256)
    assert (work.steps, work.batch, work.tokens) == (2 * 39_000 // 16, 16, 256)
    assert (work.answer_batches, work.answer_tokens) == (21, 512)
    assert Timed(step=1.0, token=0.5).hours(work, 3) == pytest.approx((3 * 4875 + 21 * 512 * 0.5) / 3600)
    shared["trainer"] |= {"max_steps": 10}
    assert work_of(shared, 40_000, 1_319, 9999).steps == 40, "four passes a step"
    assert work_of(shared, 40_000, 1_319, 9999).tokens == 512, "cut at the recipe's length"


def test_what_lacks_memory_is_said_and_nothing_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("benchmarks.paper.checks._memory", lambda device: 2**20)
    assert main(["gemma-2b-metamathqa", "--work", str(tmp_path), "--miniature"]) == 2
    shown = capsys.readouterr()
    assert "too little" in shown.out
    assert "--no-check goes on" in shown.err
    assert not (tmp_path / "gemma-2b-metamathqa-miniature" / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_a_table_from_beginning_to_page(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    begun = [name, "--work", str(tmp_path), "--miniature", "--one-rate", "--", "--methods", "PiCa;LoRA r=1"]
    assert main(begun) == 0
    first = capsys.readouterr().out
    assert "hours at most" in first
    text = (tmp_path / f"{name}-miniature" / "results.md").read_text()
    assert text.count("| 1 |") == sum(row.label.startswith(("PiCa", "LoRA r=1")) for row in TABLES[name].rows)
    assert main([*begun[:5], "--no-check", *begun[5:]]) == 0
    assert (tmp_path / f"{name}-miniature" / "results.md").read_text() == text, "finished cells are not run again"


def test_the_board_reads_what_peft_wrote(tmp_path: Path):
    folder = tmp_path / board.FOLDER
    for kind, name, status, accuracy in (
        ("results", "lora/rank32", "success", 0.478),
        ("temporary_results", "pica/rank64", "success", 0.5),
        ("cancelled_results", "pica/rank64", "canceled", 0.9),
        ("results", "lora/broken", "failed", 0.9),
    ):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        trained = {"status": status, "metrics": [{"test accuracy": accuracy}], "num_trainable_params": 1000}
        trained |= {"train_time": 900.0, "accelerator_memory_max": 2**31, "file_size": 2**20}
        content = {"run_info": {"experiment_name": name}, "train_info": trained}
        (folder / kind / f"{name.replace('/', '-')}.json").write_text(json.dumps(content))
    lines = board.board_table(tmp_path).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| pica/rank64", "| lora/rank32"]
    assert "50.0% | 900 | 2.0 | 1.0" in lines[0]


def test_the_boards_experiments_are_read_by_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([board.NAME, "--work", str(tmp_path), "--peft", str(tmp_path / "peft"), "--miniature"]) == 0
    shown = capsys.readouterr().out
    assert all(size in shown for size in ("1,048,576", "2,097,152", "4,194,304"))


def test_the_board_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([board.NAME, "--work", str(tmp_path), "--peft", str(tmp_path)]) == 2
    assert "is no clone of PEFT" in capsys.readouterr().err
    assert main([board.NAME, "--work", str(tmp_path)]) == 2
