"""The comparison on digits, in miniature: shapes show their kind, splits share no picture, the table is of what was run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import ViTConfig

from benchmarks import comparisons, digits, harness, run

TINY = ViTConfig(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=digits.SIZE,
    patch_size=8,
)


def test_shapes_show_their_kind_and_follow_the_generator_alone():
    pictures, kinds = digits.shapes(600, torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    again, _ = digits.shapes(600, torch.Generator().manual_seed(0))
    others, _ = digits.shapes(600, torch.Generator().manual_seed(1))
    assert torch.equal(pictures, again)
    assert not torch.equal(pictures, others)
    assert pictures.shape == (600, 3, digits.SIZE, digits.SIZE)
    assert pictures.min() == -1
    assert 0.9 < pictures.max() <= 1
    # the nearest mean picture already names them far above chance, which is 1 in 12
    flat = pictures[:, 0].flatten(1)
    means = torch.stack([flat[:400][kinds[:400] == kind].mean(0) for kind in range(len(digits.STROKES))])
    named = torch.cdist(flat[400:], means).argmin(1)
    assert (named == kinds[400:]).float().mean() > 4 / len(digits.STROKES)


def test_the_digits_are_all_there_once_as_they_are(tmp_path: Path):
    counts = digits.write_digits(tmp_path / "pictures")
    assert counts == {"train": 800, "validation": 200, "test": 797}
    found = sorted((tmp_path / "pictures").rglob("*.png"))
    assert [path.name for path in sorted(found, key=lambda path: path.name)] == [f"{n:04d}.png" for n in range(1797)]
    wanted, labels = load_digits(return_X_y=True)
    for path in found[::100]:
        number = int(path.stem)
        assert path.parent.name == str(labels[number])
        pixels = np.asarray(Image.open(path)).astype(float)
        np.testing.assert_allclose(pixels / 255 * 16, wanted[number].reshape(8, 8), atol=0.04)


def test_the_whole_command_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(digits, "VIT", TINY)
    monkeypatch.setattr(digits, "HELD_OUT", 64)
    command = ["--work", str(tmp_path / "work"), "--steps", "3", "--train", "40"]
    limits = ["--data.validation_limit", "10", "--data.test_limit", "20"]
    chosen = ["--seeds", "0", "--methods", "PiCa r=4;head only", "--trainer.max_steps", "1", *limits]
    assert digits.main([*command, "--prepare-only"]) == 0
    model = tmp_path / "work" / "model"
    written = load_file(model / "model.safetensors")
    assert not [name for name in written if "classifier" in name], "the head for shapes is left behind"
    assert digits.main([*command, "--", *chosen]) == 0
    found = json.loads((tmp_path / "digits.json").read_text())
    assert found["shapes"]["pictures"] == 3 * digits.BATCH
    assert found["shapes"]["parameters"] == sum(map(torch.numel, written.values())) + 17 * len(digits.STROKES)
    rows = {row["label"]: row for row in found["digits"]["rows"]}
    # rank 4 times the outputs of six roles; a head of 10 classes
    assert rows["PiCa r=4"]["parameters"] == 4 * (5 * 16 + 24)
    assert rows["head only"]["parameters"] == 10 * 16 + 10
    table = (tmp_path / "digits.md").read_text()
    assert "then on 40 digits" in table
    assert "| head only | 170 |" in table
    assert "LoRA" not in table, "only what was run is in the table"
    compared = tmp_path / "work" / "compared"
    for file in harness.COPIED:
        assert (tmp_path / "comparisons" / "digits" / file).read_bytes() == (compared / file).read_bytes()
    (tmp_path / "comparisons" / "digits" / "report.html").unlink()

    page = tmp_path / "results-page.md"
    page.write_text("before\n<!-- results of comparison_digits -->\nold\n<!-- end of comparison_digits -->\nafter\n")
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    for module in (comparisons, run):
        monkeypatch.setattr(module, "RESULTS_PAGE", page)
    assert comparisons.main([str(compared)]) == 0
    assert (tmp_path / "comparisons" / "digits" / "report.html").is_file()
    assert "| head only | 170 |" in page.read_text()
    assert "40 training problems" in page.read_text()
    assert "old" not in page.read_text()
