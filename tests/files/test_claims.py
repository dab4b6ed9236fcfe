"""One writer at a time: between processes, after a crash, and where the place is not as one would have it."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pica.errors import OutputError
from pica.files.claims import claimed

HOLDER = """
import sys, time
from pathlib import Path
import _pica_entry
_pica_entry.starting = True  # so that torch is not loaded
from pica.files.claims import claimed
from pica.errors import OutputError
place, begin = Path(sys.argv[1]), float(sys.argv[2])
time.sleep(max(0, begin - time.time()))
try:
    with claimed(place):
        print("mine", flush=True)
        sys.stdin.read()
except OutputError as error:
    print(error, flush=True)
"""


def holder(place: Path, begin: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(place), str(begin)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_of_many_that_begin_at_the_same_moment_one_writes(tmp_path: Path):
    begin = time.time() + 1.5
    processes = [holder(tmp_path / "new" / "out", begin) for _ in range(4)]
    said = [line_of(process) for process in processes]
    assert said.count("mine") == 1
    assert all("Another pica" in line for line in said if line != "mine"), said  # named once it has written its name
    for process in processes:
        process.communicate()
    assert list(tmp_path.iterdir()) == [], "neither a lock nor a folder that was made for it is left"


def test_a_killed_owner_stands_in_nobodys_way(tmp_path: Path):
    process = holder(tmp_path / "out")
    assert line_of(process) == "mine"
    with pytest.raises(OutputError, match=f"process {process.pid} on .* is writing .*out.; wait for it, or choose"):
        claimed(tmp_path / "out").__enter__()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with claimed(tmp_path / "out"):
        assert (tmp_path / ".out.lock").is_file()
    assert list(tmp_path.iterdir()) == []


def test_the_same_place_by_another_name_is_the_same(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    with claimed(tmp_path / "link"), pytest.raises(OutputError, match="Another pica"), claimed(tmp_path / "out"):
        pass
    with claimed(tmp_path / "out"), claimed(tmp_path / "other"):
        pass


def test_patience_waits_for_another_owner(tmp_path: Path):
    process = holder(tmp_path / "out")
    assert line_of(process) == "mine"
    assert process.stdin is not None
    process.stdin.close()
    with claimed(tmp_path / "out", patience=30):
        pass
    process.wait()


def test_a_folder_in_a_place_not_to_be_written_is_locked_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mounted").mkdir()
    real = os.open

    def refuse(path: os.PathLike[str], flags: int, mode: int = 0o777) -> int:
        if Path(path).parent == tmp_path:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    with claimed(tmp_path / "mounted"):
        assert [path.name for path in (tmp_path / "mounted").iterdir()] == [".lock"]
        with pytest.raises(OutputError, match="Another pica"), claimed(tmp_path / "mounted"):
            pass
    assert list((tmp_path / "mounted").iterdir()) == []
    with pytest.raises(OutputError, match="Cannot write .*new.: Read-only file system"), claimed(tmp_path / "new"):
        pass
