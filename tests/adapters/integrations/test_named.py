"""Names that clients send reach adapters in the folder, and nothing else on the machine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pica.adapters.integrations.named import CONFIG, WEIGHTS, AdapterFolder
from pica.errors import AdapterFileError, ConfigError


def write(folder: Path, method: str = "PICA") -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(json.dumps({"peft_type": method}))
    (folder / WEIGHTS).write_bytes(b"weights")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "outside")
    root = tmp_path / "adapters"
    for name in ("alice", "team/bob", "ünï-ß 1"):
        write(root / name)
    write(root / "svft", "SVFT")
    write(root / "lora", "LORA")
    write(root / ".hidden")
    return root


@pytest.mark.parametrize("name", ["alice", "team/bob", "ünï-ß 1", "svft"])
def test_a_name_is_a_subfolder(root: Path, name: str) -> None:
    found = AdapterFolder(root).find(name)
    assert found is not None
    assert found.folder == root / name


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "/", "alice/", "/alice", "./alice", "alice/..", "alice/../alice", "../outside", "team"),
        *(
            "team/../../outside",
            "..\\outside",
            "alice\0",
            "alice\n",
            ".hidden",
            "nobody",
            "lora",
            "a" * 300,
            "a/" * 600,
        ),
        "\ud800",
    ],
)
def test_no_other_name_finds_anything(root: Path, name: str) -> None:
    assert AdapterFolder(root).find(name) is None


def test_an_absolute_path_is_no_name(root: Path) -> None:
    assert AdapterFolder(root).find(str(root / "alice")) is None
    assert AdapterFolder(root).find(str(root.parent / "outside")) is None


def test_links_lead_within_the_folder_only(root: Path) -> None:
    (root / "latest").symlink_to(root / "alice")
    (root / "away").symlink_to(root.parent / "outside")
    (root / "up").symlink_to(root)
    folder = AdapterFolder(root)
    found = folder.find("latest")
    assert found is not None
    assert found.folder == root / "alice"
    assert folder.find("away") is None
    assert folder.find("up") is None
    assert folder.find("up/alice") is not None  # within, by a longer way
    for file in (CONFIG, WEIGHTS):
        stolen = write(root / f"stolen-{file}")
        (stolen / file).unlink()
        (stolen / file).symlink_to(root.parent / "outside" / file)
        with pytest.raises(AdapterFileError, match="leads out of the folder"):
            folder.find(stolen.name)


def test_a_folder_that_is_itself_a_link_is_followed(root: Path) -> None:
    (root.parent / "mounted").symlink_to(root)
    assert AdapterFolder(root.parent / "mounted").find("alice") is not None


def test_what_is_damaged_is_said(root: Path) -> None:
    folder = AdapterFolder(root)
    (root / "alice" / WEIGHTS).unlink()
    with pytest.raises(AdapterFileError, match=f"'alice': {WEIGHTS} cannot be read"):
        folder.find("alice")
    (root / "svft" / CONFIG).write_text("{")
    with pytest.raises(AdapterFileError, match="'svft'"):
        folder.find("svft")
    (root / "svft" / CONFIG).write_text("[]")
    with pytest.raises(AdapterFileError, match="holds no configuration"):
        folder.find("svft")


def test_an_adapter_that_is_written_anew_is_another_one(root: Path) -> None:
    folder = AdapterFolder(root)
    before = folder.find("alice")
    assert before is not None
    assert folder.find("alice") == before
    digest = before.digest()
    (root / "alice" / WEIGHTS).write_bytes(b"WEIGHTS")
    after = folder.find("alice")
    assert after is not None
    assert after != before
    assert after.digest() != digest
    shutil.rmtree(root / "alice")
    assert folder.find("alice") is None


def test_there_has_to_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        AdapterFolder(tmp_path / "nothing")
