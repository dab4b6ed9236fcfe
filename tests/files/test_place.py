"""What is finished is only replaced by what is finished, in one step, wherever a kill hits."""

import os
from pathlib import Path

import pytest

from pica.errors import OutputError
from pica.files.place import Place

END = "end.json"


def write(folder: Path, text: str, *, age: float = 0.0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / END).write_text(text)
    if age:
        status = (folder / END).stat()
        os.utime(folder / END, (status.st_atime - age, status.st_mtime - age))


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_nothing_finished_is_written_to_directly(tmp_path: Path):
    place = Place(tmp_path / "out", END)
    assert place.folder == tmp_path / "out"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "part").write_text("x")
    place = Place(tmp_path / "out", END)
    assert (place.folder, place.complete) == (tmp_path / "out", False)
    place.done()
    assert content(tmp_path) == {"out/part": "x"}


@pytest.mark.parametrize("linked", [False, True])
def test_a_finished_one_stays_until_the_new_one_is(tmp_path: Path, linked: bool):
    out = tmp_path / "out"
    write(tmp_path / "real" if linked else out, "old", age=5)
    if linked:
        out.symlink_to("real")
    place = Place(out, END)
    assert place.complete
    write(place.folder, "new")
    assert content(out) == {END: "old"}
    place.done()
    assert content(out) == {END: "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == (["out", "real"] if linked else ["out"])


def test_what_was_begun_goes_on_and_is_not_thrown_away_unasked(tmp_path: Path):
    write(tmp_path / "out", "old")
    first = Place(tmp_path / "out", END)
    first.folder.mkdir()
    (first.folder / "part").write_text("x")
    again = Place(tmp_path / "out", END)
    assert (again.folder, again.complete) == (first.folder, False)
    again.check(overwrite=True)
    with pytest.raises(OutputError, match="begun with --overwrite and then interrupted; go on with that"):
        again.check(overwrite=False)


@pytest.mark.parametrize("exchanged", [False, True])
def test_a_kill_at_the_very_end_leaves_the_new_one(tmp_path: Path, exchanged: bool):
    names = [tmp_path / ".out.unfinished", tmp_path / "out"]
    new, old = reversed(names) if exchanged else names
    write(old, "old", age=5)
    write(new, "new")
    place = Place(tmp_path / "out", END)
    assert place.complete
    assert content(tmp_path) == {f"out/{END}": "new"}
