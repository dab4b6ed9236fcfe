"""A basis as a file: what is written is read, and nothing else is taken for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pica.basis.cache import shared_folder
from pica.basis.file import (
    NAME,
    About,
    BasisFile,
    LayerRows,
    find_basis,
    open_basis,
    weight_sample,
    write_basis,
)
from pica.basis.shared import keep, kept
from pica.errors import ConfigError, OutputError

WEIGHT = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))


def layer(seed: int = 0) -> LayerRows:
    rows = torch.linalg.qr(torch.randn(20, 6, generator=torch.Generator().manual_seed(seed)))[0].T.contiguous()
    return LayerRows(rows, (rows @ WEIGHT.T).norm(dim=1), weight_sample(WEIGHT))


def write(folder: Path, seed: int = 0, **about: object) -> BasisFile:
    q = layer(seed)
    layers = {"block.0.q": q, "block.0.k": q, "block.0.down": layer(seed + 10)}
    made = About("activation", 6, base="tiny", calibration={"source": "here", "digest": "ab"}, **about)  # pyright: ignore
    return write_basis(folder, layers, made)


def test_what_is_written_is_read(tmp_path: Path):
    made = write(tmp_path / "basis")
    assert made.layers == ["block.0.down", "block.0.k", "block.0.q"]
    assert torch.equal(made.rows("block.0.down", 4, 20), layer(10).rows[:4])
    assert torch.equal(made.rows("block.0.k", 9, 20), layer().rows), "as many as there are"
    assert torch.equal(made.gains("block.0.q", 2), layer().gains[:2])
    assert made.about.calibration == {"source": "here", "digest": "ab"}
    assert (made.about.projection, made.about.base) == ("activation", "tiny")
    with safe_open(made.path, framework="pt") as file:  # those who read the same are stored once
        assert sum(name.startswith("rows:") for name in file.keys()) == 2  # noqa: SIM118


def test_the_same_basis_has_the_same_bytes(tmp_path: Path):
    assert write(tmp_path / "one").digest == write(tmp_path / "two").digest
    assert write(tmp_path / "three", seed=1).digest != open_basis(tmp_path / "one").digest


def test_another_weight_is_told_apart(tmp_path: Path):
    made = write(tmp_path / "basis")
    made.check_weight("block.0.q", WEIGHT, quantised=False)
    made.check_weight("block.0.q", WEIGHT.bfloat16(), quantised=False)
    coarse = WEIGHT + 0.15 * torch.randn(WEIGHT.shape, generator=torch.Generator().manual_seed(5))
    made.check_weight("block.0.q", coarse, quantised=True)
    with pytest.raises(ConfigError, match=r"made for another base model \(tiny\): the weight of block.0.q differs by"):
        made.check_weight("block.0.q", coarse, quantised=False)
    with pytest.raises(ConfigError, match="another base model"):
        made.check_weight("block.0.q", -WEIGHT, quantised=True)


def test_it_is_found_by_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PICA_CACHE_DIR", str(tmp_path / "cache"))
    made, other = write(tmp_path / "run" / "basis"), write(tmp_path / "other", seed=1)
    adapter = tmp_path / "run" / "adapter"
    adapter.mkdir()
    named = str(tmp_path / "run" / "basis")
    for source, beside in (
        (named, None),
        (named + "/" + NAME, None),
        (None, str(adapter)),
        (str(tmp_path / "gone"), named),
    ):
        assert find_basis(source, made.digest, beside).digest == made.digest
    assert find_basis(str(tmp_path / "other"), made.digest, str(adapter)).digest == made.digest, "the right one of two"
    with pytest.raises(ConfigError, match=r"is not to be found: looked in .*other.* is another one \(sha256 "):
        find_basis(str(tmp_path / "other"), made.digest, None)
    with pytest.raises(ConfigError, match="is not to be found"):
        find_basis(None, made.digest, None)
    keep("k" * 64, made)
    assert find_basis(None, made.digest, None).digest == made.digest
    found = kept("k" * 64)
    assert found is not None
    assert found.digest == made.digest
    assert kept("x" * 64) is None
    assert find_basis(str(tmp_path / "other"), None, None).digest == other.digest
    monkeypatch.setenv("PICA_CACHE_DIR", "")
    assert shared_folder() is None
    assert kept("k" * 64) is None


def damaged(folder: Path, **changes: object) -> Path:
    write(folder)
    tensors = load_file(folder / NAME)
    if "rows" in changes:
        tensors["rows:block.0.q"] = changes["rows"]  # pyright: ignore[reportArgumentType]
    with safe_open(folder / NAME, framework="pt") as file:
        text = file.metadata()["pica_basis"]
    if "text" in changes:
        text = changes["text"](text)  # pyright: ignore[reportCallIssue]
    save_file(tensors, folder / NAME, {"pica_basis": text})
    return folder


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda text: "no json", "no basis that `pica basis` wrote"),
        (lambda text: text.replace('"format": 1', '"format": 2'), "has format 2, this pica reads 1; upgrade"),
        (lambda text: text.replace('"rank": 6', '"rank": "six"'), "its header's rank makes no sense"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path: Path, change, why):
    with pytest.raises(ConfigError, match=why):
        open_basis(damaged(tmp_path / "basis", text=change))


def test_what_is_no_basis_is_refused(tmp_path: Path):
    skewed = open_basis(damaged(tmp_path / "skewed", rows=layer().rows * 1.1))
    with pytest.raises(ConfigError, match="is damaged: the directions of block.0.k are not orthonormal"):
        skewed.rows("block.0.k", 3, 20)
    whole = write(tmp_path / "whole")
    with pytest.raises(ConfigError, match="is of another model: block.0.q is 16 wide, and its directions there 20"):
        whole.rows("block.0.q", 3, 16)
    with pytest.raises(ConfigError, match="has no directions for block.1.q: it was made for other layers"):
        whole.rows("block.1.q", 3, 20)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / NAME).write_bytes(whole.path.read_bytes()[:200])
    with pytest.raises(ConfigError, match="cannot be read"):
        open_basis(tmp_path / "cut")


def test_nothing_is_written_over(tmp_path: Path):
    write(tmp_path / "basis")
    with pytest.raises(OutputError, match="is not empty"):
        write(tmp_path / "basis")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "precious").write_text("dear")
    with pytest.raises(OutputError, match="something else than a basis"):
        write_basis(tmp_path / "letters", {}, About("activation", 6), overwrite=True)
