"""Results are complete or absent, and a full disk is told in one sentence."""

import errno
import json
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pica.errors import OutputError
from pica.files import output
from pica.files.folders import atomic_file


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """The kernel refuses to write beyond this many bytes of a file, as it would on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_folder_appears_only_when_complete(tmp_path: Path):
    with output.atomic_folder(tmp_path / "adapter") as partial:
        (partial / "a").write_text("1")
        assert not (tmp_path / "adapter").exists()
    assert everything_in(tmp_path) == ["adapter", "adapter/a"]


def test_failure_leaves_nothing_and_an_earlier_folder_as_it_was(tmp_path: Path):
    with output.atomic_folder(tmp_path / "adapter") as partial:
        (partial / "a").write_text("1")

    def fail_halfway() -> None:
        with output.atomic_folder(tmp_path / "adapter") as partial:
            (partial / "b").write_text("2")
            raise KeyError

    with pytest.raises(KeyError):
        fail_halfway()
    assert everything_in(tmp_path) == ["adapter", "adapter/a"]


def test_two_that_write_one_file_each_leave_it_whole(tmp_path: Path):
    target = tmp_path / "new" / "a"
    with atomic_file(target) as one:
        one.write_text("1")
        with atomic_file(target) as other:
            other.write_text("2")
        assert target.read_text() == "2"
    assert target.read_text() == "1"

    def fail_halfway() -> None:
        with atomic_file(target) as partial:
            partial.write_text("3")
            raise KeyError

    with pytest.raises(KeyError):
        fail_halfway()
    assert everything_in(tmp_path) == ["new", "new/a"]
    assert target.read_text() == "1"


def test_what_a_killed_process_left_of_a_file_goes(tmp_path: Path):
    for name, age in ((".a.1.partial", 7200), (".a.2.partial", 60), (".b.1.partial", 7200)):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    with atomic_file(tmp_path / "a") as partial:
        partial.write_text("1")
    assert everything_in(tmp_path) == [".a.2.partial", ".b.1.partial", "a"]


@pytest.mark.parametrize("library", ["python", "safetensors", "torch"])
def test_a_write_that_the_system_refuses_is_an_output_error(tmp_path: Path, library: str):
    def write() -> None:
        with files_no_longer_than(4096), output.atomic_folder(tmp_path / "adapter") as partial:
            if library == "python":
                (partial / "a").write_bytes(bytes(10_000))
            elif library == "safetensors":
                save_file({"a": torch.zeros(10_000)}, partial / "a")
            else:
                torch.save({"a": torch.zeros(100_000)}, partial / "a")

    with pytest.raises(OutputError, match="No room left to write .*adapter"):
        write()
    assert everything_in(tmp_path) == []


def test_text_is_written_whole_or_not_at_all(tmp_path: Path):
    target = tmp_path / "metrics.json"
    output.write_json(target, {"a": 1})
    with pytest.raises(OutputError, match="No room left"), files_no_longer_than(1000):
        output.write_json(target, {"a": "x" * 10_000})
    assert json.loads(target.read_text()) == {"a": 1}
    assert everything_in(tmp_path) == ["metrics.json"]


def test_other_failures_to_write_name_the_place(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"Cannot write .*file/x.: (File exists|Not a directory)"):
        output.write_text(tmp_path / "file" / "x", "text")


def test_errors_of_other_kinds_pass_unchanged(tmp_path: Path):
    with pytest.raises(RuntimeError, match="shape"), output.translated_write_errors(tmp_path):
        raise RuntimeError("shape mismatch")


def test_disk_is_full_by_number_and_by_text():
    assert output.disk_is_full(OSError(errno.ENOSPC, "x"))
    assert output.disk_is_full(OSError(errno.EDQUOT, "x"))
    assert not output.disk_is_full(OSError(errno.EACCES, "x"))
    assert not output.disk_is_full(ValueError("No space left"))


def test_only_an_empty_folder_is_free(tmp_path: Path):
    output.check_free(tmp_path, overwrite=False)
    output.check_free(tmp_path / "new", overwrite=False)
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(OutputError, match="is not empty; choose another with --output.$"):
        output.check_free(tmp_path, overwrite=False)
    with pytest.raises(OutputError, match="is a file"):
        output.check_free(tmp_path / "precious.txt", overwrite=True)


def test_overwriting_is_for_earlier_runs_only(tmp_path: Path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(OutputError, match="--overwrite leaves it alone"):
        output.check_free(tmp_path, overwrite=True)
    (tmp_path / output.RESOLVED).write_text("name: x")
    with pytest.raises(OutputError, match="--resume, or replace it with --overwrite"):
        output.check_free(tmp_path, overwrite=False)
    output.check_free(tmp_path, overwrite=True)
    assert (tmp_path / "precious.txt").exists(), "checking must not delete"
    output.create(tmp_path, "name: y")
    assert everything_in(tmp_path) == [output.RESOLVED]


def test_csv_has_the_columns_asked_for(tmp_path: Path):
    output.write_csv(tmp_path / "a.csv", [{"a": 1, "b": 2}, {"a": 3, "c": 4}], ("a", "c"))
    assert (tmp_path / "a.csv").read_text() == "a,c\n1,\n3,4\n"


@pytest.mark.parametrize("kind", ["run", "json", "folder", "claim"])
def test_a_full_disk_leaves_no_folder(tmp_path: Path, kind: str):
    target = tmp_path / "new" / "er" / "out"

    def write() -> None:
        with files_no_longer_than(0):
            if kind == "run":
                output.create(target, "name: x")
            elif kind == "json":
                output.write_json(target, {"a": 1})
            elif kind == "folder":
                with output.atomic_folder(target) as partial:
                    (partial / "a").write_text("1")
            else:
                with output.claimed(target):
                    output.write_text(target, "x")

    with pytest.raises(OutputError, match="No room left to write"):
        write()
    assert everything_in(tmp_path) == []


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path):
    def write() -> None:
        with output.atomic_folder(tmp_path / "out", replace=False) as partial:
            (partial / "a").write_text("mine")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "a").write_text("theirs")

    with pytest.raises(OutputError, match="out. was free when this began and is no longer"):
        write()
    assert everything_in(tmp_path) == ["out", "out/a"]
    assert (tmp_path / "out" / "a").read_text() == "theirs"


def test_a_link_to_an_empty_folder_is_that_folder(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with output.atomic_folder(tmp_path / "link", replace=False) as partial:
        (partial / "a").write_text("1")
    assert (tmp_path / "link").is_symlink()
    assert everything_in(tmp_path / "real") == ["a"]


def test_json_holds_nothing_that_json_has_not(tmp_path: Path):
    value = {"a": float("nan"), "b": [1.5, float("inf"), (float("-inf"), "é")], "c": {"d": None}}
    output.write_json(tmp_path / "a.json", value)
    output.write_jsonl(tmp_path / "a.jsonl", [value])
    expected = {"a": None, "b": [1.5, None, [None, "é"]], "c": {"d": None}}
    for file in ("a.json", "a.jsonl"):
        text = (tmp_path / file).read_text(encoding="utf-8")
        assert json.loads(text, parse_constant=pytest.fail) == expected
    assert output.plain(value) == expected


def test_a_file_that_is_there_is_only_replaced_when_asked(tmp_path: Path):
    (tmp_path / "a").write_text("precious")
    output.check_file(tmp_path / "b")
    with pytest.raises(
        OutputError, match="a. is there already; name another file with --output, or replace it with --over"
    ):
        output.check_file(tmp_path / "a")
    output.check_file(tmp_path / "a", overwrite=True)
