"""The same tables from end to end in minutes: models of the same architecture with tiny sizes, made-up problems."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GemmaConfig, LlamaConfig

from benchmarks.paper.tables import Row, Table

_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
_KINDS = {"google/gemma-2b": GemmaConfig, "meta-llama/Meta-Llama-3-8B": LlamaConfig}
SMALLER = 16
"""Ranks are divided by this."""


def smaller(row: Row) -> Row:
    """The row with a rank that fits a tiny model."""
    if row.adapter is None or "r" not in row.adapter:
        return row
    return Row(row.label, {**row.adapter, "r": max(1, row.adapter["r"] // SMALLER)}, row.rates, row.published)


def miniature(table: Table, shared: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Write a model and problems into a folder.

    Args:
        table: Which one.
        shared: The fields that its rows share.
        folder: Where.
    Returns:
        The fields for them.
    """
    model = _write_model(shared["model"]["path"], folder / "model")
    data = folder / "data"
    trainer = {**shared["trainer"], "epochs": 1, "max_steps": 6, "batch_size": 4, "accumulation": 1, "max_length": 320}
    trainer |= {"eval_batch_size": 4, "warmup": 0.1}
    made = {**shared, "model": {**shared["model"], "path": str(model)}, "trainer": trainer}
    made["task"] = {**shared["task"], "max_new_tokens": 8}
    if table.tests:
        train = _write(data / "train.jsonl", [_problem(number) for number in range(60)])
        tests = {
            name: str(_write(data / f"{name}.jsonl", [_problem(first + number) for number in range(6)]))
            for first, name in zip((100, 200), table.tests)
        }
        made["data"] = {"train": str(train), "test": tests, "validation_limit": 8}
        return made
    for name in ("boolq", "piqa"):
        _write(data / name / "test.jsonl", [_choice(number, name) for number in range(100, 106)])
    train = _write(data / "train.jsonl", [_choice(number, "boolq") for number in range(60)])
    made["data"] = {"train": str(train), "test": str(data), "validation_limit": 8}
    return made


def _write_model(like: str, folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        source = resources.files("pica") / "assets" / "tiny-llama"
        with resources.as_file(source) as path:
            tokenizer: Any = AutoTokenizer.from_pretrained(path)
        config = _KINDS[like](
            **_SIZES,
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        torch.manual_seed(0)
        tokenizer.save_pretrained(folder)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def _write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def _problem(number: int) -> dict[str, str]:
    return {"question": f"What is {number} plus 1?", "answer": f"{number} plus 1 is {number + 1}. #### {number + 1}"}


def _choice(number: int, name: str) -> dict[str, str]:
    answer = ("true", "false")[number % 2]
    question = f"{name}: {number} is even. Answer format: true/false"
    return {"instruction": question, "output": f"the correct answer is {answer}", "answer": answer}
