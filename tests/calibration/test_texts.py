"""What a model reads when a basis is made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from pica.calibration.texts import calibration, embedded_text
from pica.errors import ConfigError, DataError


def letters(texts: list[str], verbose: bool = True) -> dict[str, Any]:
    """A tokenizer with a token a byte."""
    return {"input_ids": [list(text.encode()) for text in texts]}


def read(source: Any, **options: Any) -> list[str]:
    found = calibration(source, letters, **options)
    return [bytes(batch["input_ids"][0].tolist()).decode() for batch in found.batches]


def test_the_embedded_text_is_fixed():
    """A basis names this text, and is to be made from it again."""
    text = embedded_text()
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "839674cbed6e2f88a3a3478890f78e3e9175c2b1c2cd5f69a62415736e9499a3"
    )
    assert 2400 < len(text.split()) < 2600


def test_texts_files_rows_and_data_sets_are_read(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\nline\n\ntwo\n\n\n")
    rows = [
        {"text": "three", "label": "x"},
        {"question": "four", "answer": "five", "number": "6"},
        {"messages": [{"role": "user", "content": "seven"}, {"role": "assistant", "content": "eight"}]},
    ]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert sorted(read(tmp_path / "a.txt")) == ["one\nline", "two"]
    assert sorted(read(str(tmp_path / "b.jsonl"))) == ["four\nfive", "seven\neight", "three"]
    assert sorted(read(["a", " ", "b"])) == ["a", "b"]
    assert sorted(read(datasets.Dataset.from_list([{"text": "x"}, {"text": "y"}]))) == ["x", "y"]
    encoded = datasets.Dataset.from_list([{"input_ids": [104, 105], "labels": [-100, 105]}])
    assert read(encoded) == ["hi"]


def test_so_many_tokens_in_an_order_that_the_seed_decides():
    texts = [letter * 10 for letter in "abcdefgh"]
    first, again, other = (read(texts, tokens=25, seed=seed) for seed in (0, 0, 1))
    assert [len(text) for text in first] == [10, 10, 5]
    assert first == again != other
    assert [len(text) for text in read(texts, length=4)] == [4] * 8
    digests = {calibration(texts, letters, tokens=25, seed=seed).about["digest"] for seed in (0, 0, 1)}
    assert len(digests) == 2


def test_batches_are_read_as_they_are_and_padding_is_not_counted():
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}
    found = calibration([batch, {"pixel_values": torch.zeros(4, 3, 2, 2)}])
    assert found.batches[0] is batch
    assert (found.about["tokens"], found.about["sequences"]) == (4, 6)


@pytest.mark.parametrize(
    ("source", "options", "kind", "why"),
    [
        ([], {}, DataError, "holds no text to read"),
        ("nowhere.jsonl", {}, DataError, "nowhere.jsonl"),
        (["a"], {"tokens": 0}, ConfigError, "tokens=0 must be at least 1"),
        (["a"], {"tokenizer": None}, ConfigError, "need the model's tokenizer"),
    ],
)
def test_what_cannot_be_read_is_refused(source, options, kind, why):
    with pytest.raises(kind, match=why):
        calibration(source, **{"tokenizer": letters, **options})
