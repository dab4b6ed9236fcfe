"""Writing results so that what stands under its final name is complete."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pica.errors import OutputError
from pica.files import folders
from pica.files.claims import LOCK
from pica.files.claims import claimed as claimed
from pica.files.folders import atomic_folder as atomic_folder
from pica.files.folders import disk_is_full as disk_is_full
from pica.files.folders import translated_write_errors as translated_write_errors
from pica.text import csv_text

RESOLVED = "recipe.resolved.yaml"
"""File in every output folder that holds the full recipe; its presence marks a folder as one of ours."""


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Check that a new run may use this folder. Changes nothing.

    Raises:
        OutputError: It is a file, or is not empty and may not be overwritten.
    """
    if folder.is_symlink() and not folder.exists():
        raise OutputError(f"Output folder {str(folder)!r} is a link to nowhere; remove it or choose another folder.")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"Output folder {str(folder)!r} is a file; choose another name with --output.")
    if is_empty(folder):
        return
    ours = (folder / RESOLVED).is_file()
    if not overwrite:
        more = ", continue that run with --resume, or replace it with --overwrite" if ours else ""
        raise OutputError(f"Output folder {str(folder)!r} is not empty; choose another with --output{more}.")
    if not ours:
        raise OutputError(
            f"Output folder {str(folder)!r} is not empty and holds no {RESOLVED}, so it is no earlier run and "
            "--overwrite leaves it alone; choose another with --output."
        )


def is_empty(folder: Path) -> bool:
    """Whether nothing is there, or a folder with nothing in it but the lock of `claimed`."""
    return not folder.exists() or all(path.name == LOCK for path in folder.iterdir())


def create(folder: Path, recipe: str) -> None:
    """Begin a run's folder with its recipe, in place of an unfinished run that may be there.

    Raises:
        OutputError: The folder can't be made; then it isn't there, or is empty where it was.
    """
    with translated_write_errors(folder):
        for path in folder.iterdir() if folder.is_dir() else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()
    write_text(folder / RESOLVED, recipe)


@contextmanager
def claimed_file(target: Path, *, overwrite: bool) -> Iterator[None]:
    """`claimed`, for a file that is written in the block and may be written at all; see `check_file`."""
    check_file(target, overwrite=overwrite)  # before a claim would make folders
    with claimed(target):
        check_file(target, overwrite=overwrite)
        yield


def check_file(target: Path, *, overwrite: bool = False) -> None:
    """Check, as far as can be told beforehand, that a file can be written. Changes nothing.

    Raises:
        OutputError: It is there and is not to be replaced, it is a folder, or its folder is a file or not to be written in.
    """
    if target.is_dir():
        raise OutputError(f"{str(target)!r} is a folder; name a file with --output.")
    place = next(parent for parent in target.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        reason = "may not be written in" if place.is_dir() else "is a file"
        raise OutputError(f"Cannot write {str(target)!r}: {str(place)!r} {reason}; name another file with --output.")
    if target.exists() and not overwrite:
        raise OutputError(
            f"{str(target)!r} is there already; name another file with --output, or replace it with --overwrite."
        )


def write_text(target: Path, text: str) -> None:
    """Write a whole file under its final name or not at all.

    Raises:
        OutputError: Writing failed; an earlier file of that name is as it was.
    """
    with translated_write_errors(target):
        made = folders.make_parents(target)
        partial = None
        try:
            handle, partial = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(partial, 0o666 & ~_umask())
            os.replace(partial, target)
        finally:
            if partial is not None:
                Path(partial).unlink(missing_ok=True)
            folders.remove_empty(made)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """A value as every JSON parser reads it: numbers that JSON has not, NaN and the infinities, become null."""
    return json.dumps(plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    """A value as it is once written as JSON and read again, with None in place of NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value


def write_json(target: Path, value: Any) -> None:
    """Write a value as indented JSON; see `json_text` and `write_text`."""
    write_text(target, json_text(value, indent=2) + "\n")


def write_jsonl(target: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line; see `write_text`."""
    write_text(target, "".join(json_text(row) + "\n" for row in rows))


def write_csv(target: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write these columns of the rows, empty where a row has none; see `write_text`."""
    write_text(target, csv_text(rows, columns))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
