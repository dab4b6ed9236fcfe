"""The cache of exports: whole entries only, within its bound, and nothing removed that a living server uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pica.adapters.integrations.export_cache import ExportCache
from pica.adapters.integrations.named import CONFIG, WEIGHTS

SIZE = 4 * 1000


def write(cache: ExportCache, key: str, age: float) -> None:
    folder = cache.entry(key)
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(1000)}, folder / WEIGHTS)
    (folder / CONFIG).write_text("{}")
    os.utime(folder, (age, age))


def test_half_an_entry_is_none(tmp_path: Path) -> None:
    cache = ExportCache(tmp_path / "cache", 2**30)
    assert not cache.take("one")
    write(cache, "one", 1)
    assert cache.take("one")
    weights = cache.entry("one") / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not cache.take("one")
    write(cache, "two", 1)
    (cache.entry("two") / CONFIG).unlink()
    assert not cache.take("two")


def test_the_entries_used_longest_ago_go_first(tmp_path: Path) -> None:
    cache = ExportCache(tmp_path / "cache", int(2.5 * SIZE))
    for age, key in enumerate(("old", "older", "new", "newest")):
        write(cache, key, 1000 - age if key == "older" else 1000 + age)
    cache.trim()
    assert {path.name for path in cache.folder.iterdir() if path.name[0] != "."} == {"new", "newest"}
    cache.trim()
    assert cache.entry("new").is_dir()


def test_what_is_in_use_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A process that lives keeps its entries; one that was killed does not."""
    cache = ExportCache(tmp_path / "cache", 0)
    for key in ("mine", "theirs", "nobody's"):
        write(cache, key, 1)
    assert cache.take("mine")
    other = ExportCache(cache.folder, 0)  # the system's locks know two who open a file apart, in one process too
    assert other.take("theirs")
    cache.trim()
    assert not cache.entry("nobody's").exists()
    assert cache.entry("theirs").is_dir()
    assert "in use" in caplog.text
    assert other._lease is not None
    os.close(other._lease)  # as the system does when a process ends, however it does
    cache.trim()
    assert not cache.entry("theirs").exists()
    assert cache.entry("mine").is_dir()
