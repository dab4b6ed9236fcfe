"""Files that somebody else may have written with intent: one sentence with file and line, at once."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import get_peft_model
from tests.cli.test_errors import sentence
from transformers import AutoModelForCausalLM

import pica as package

DEEP = "[" * 10_000 + "]" * 10_000
BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)
RECIPES = {
    "bomb": (BOMB, "line 6: not valid YAML, its aliases stand for more than"),
    "deep": (f"name: x\nmodel: {DEEP}\n", "line 2: not valid YAML, lists and mappings are nested more than 100 deep"),
    "twice": ("name: x\nname: y\n", "line 2: not valid YAML, the key 'name' occurs twice (first in line 1)"),
}


@pytest.fixture(scope="module")
def adapter(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_folder),
        package.PicaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    package.save_adapter(model, folder)  # pyright: ignore[reportArgumentType]
    return folder


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("command", ["train", "compare"])
def test_recipes_and_comparisons(pica: Callable, tmp_path: Path, kind: str, command: str):
    text, message = RECIPES[kind]
    (tmp_path / "a.yaml").write_text(text)
    pica(command, "no-such-name")  # has the libraries imported
    begun = time.process_time()
    said = sentence(pica(command, tmp_path / "a.yaml", "-o", tmp_path / "out"))
    assert time.process_time() - begun < 1
    assert message in said
    assert str(tmp_path / "a.yaml") in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"peft_type": "PICA",\n"r": ' + DEEP + "}", "line 2: not valid JSON, lists and objects are nested"),
        ('{"peft_type": "PICA",\n"r": 4,\n"r": 8}', "line 3: not valid JSON, the key 'r' occurs twice"),
    ],
)
def test_adapter_configurations(pica: Callable, tmp_path: Path, adapter: Path, text: str, message: str):
    evil = shutil.copytree(adapter, tmp_path / "adapter")
    (evil / "adapter_config.json").write_text(text)
    more = [
        ["verify"],
        ["merge", "-o", tmp_path / "m"],
        ["export", "-o", tmp_path / "l"],
        ["evaluate", "--task", "math"],
    ]
    for command in more:
        outcome = pica(command[0], evil, *command[1:])
        assert f"adapter_config.json, {message}" in outcome.err + outcome.out
        assert outcome.status in (1, 2)
        assert "Traceback" not in outcome.err


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_rows_of_data(pica: Callable, quick: list[str], tmp_path: Path, ending: str):
    row = json.dumps({"instruction": "How many?", "input": "", "output": "The answer is 4.", "answer": "4"})
    for wrong, message in (
        (row.replace('"4"', DEEP), "lists and objects are nested more than 100 deep"),
        (row.replace('"answer"', '"answer": "5", "answer"'), "the key 'answer' occurs twice in one object"),
    ):
        path = tmp_path / f"data{ending}"
        path.write_text(f"{row}\n{wrong}\n" if ending == ".jsonl" else f"[{row},\n{wrong}]")
        said = sentence(pica("train", *quick, "--data.train", path, "--data.test", path, "-o", tmp_path / "out"))
        assert f"data{ending}, line 2: not valid JSON ({message}" in said
    path = tmp_path / f"data{ending}"
    wrong = row.replace('"4"', "1" * 5000)
    path.write_text(f"{row}\n{wrong}\n" if ending == ".jsonl" else f"[{row},\n{wrong}]")
    said = sentence(pica("train", *quick, "--data.train", path, "--data.test", path, "-o", tmp_path / "out"))
    assert f"data{ending}, line 2: field 'answer' is not a number: '111" in said
    assert len(said) < 400


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("comparison.yaml", BOMB, "comparison.yaml, line 6: not valid YAML, its aliases"),
        ("comparison.yaml", "[]", "is damaged"),
        ("cells.json", DEEP, "cells.json, line 1: not valid JSON"),
        ("cells.json", '{"cells": 5}', "is damaged"),
        ("cells/k.json", '{"status": "done",\n"status": "done"}', "k.json, line 2: not valid JSON, the key 'status'"),
        ("cells/k.json", '{"status": "done", "seed": 0}', "is damaged"),
        ("cells/k.json", '{"status": "done", "seed": 0, "result": []}', "is damaged"),
    ],
)
def test_results_that_are_reported(pica: Callable, tmp_path: Path, file: str, text: str, message: str):
    (tmp_path / "cells").mkdir()
    (tmp_path / "comparison.yaml").write_text("name: a\nmethods: [{label: x}]\n")
    cell = {"key": "k", "label": "x", "seed": 0, "status": "done"}
    (tmp_path / "cells.json").write_text(json.dumps({"workers": 1, "cells": [cell]}))
    (tmp_path / "cells" / "k.json").write_text(json.dumps({"status": "failed", "error": "x"}))
    (tmp_path / file).write_text(text)
    assert message in sentence(pica("report", tmp_path))
