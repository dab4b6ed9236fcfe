"""Writing results so that what stands under its final name is complete."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pica.adapters.folders import atomic_folder as atomic_folder
from pica.adapters.folders import disk_is_full as disk_is_full
from pica.adapters.folders import translated_write_errors as translated_write_errors
from pica.errors import OutputError
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
    if not folder.exists() or not any(folder.iterdir()):
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


def create(folder: Path) -> None:
    """Make an empty output folder, in place of an earlier run that `check_free` allowed to replace.

    Raises:
        OutputError: The folder can't be made.
    """
    with translated_write_errors(folder):
        if (folder / RESOLVED).is_file():
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)


def check_file(target: Path) -> None:
    """Check, as far as can be told beforehand, that a file can be written. Changes nothing.

    Raises:
        OutputError: It is a folder, or its folder is a file or not to be written in.
    """
    if target.is_dir():
        raise OutputError(f"{str(target)!r} is a folder; name a file with --output.")
    place = next(parent for parent in target.absolute().parents if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        reason = "may not be written in" if place.is_dir() else "is a file"
        raise OutputError(f"Cannot write {str(target)!r}: {str(place)!r} {reason}; name another file with --output.")


def write_text(target: Path, text: str) -> None:
    """Write a whole file under its final name or not at all.

    Raises:
        OutputError: Writing failed; an earlier file of that name is as it was.
    """
    with translated_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(partial, 0o666 & ~_umask())
            os.replace(partial, target)
        finally:
            Path(partial).unlink(missing_ok=True)


def write_json(target: Path, value: Any) -> None:
    """Write a value as indented JSON; see `write_text`."""
    write_text(target, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(target: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line; see `write_text`."""
    write_text(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_csv(target: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Write these columns of the rows, empty where a row has none; see `write_text`."""
    write_text(target, csv_text(rows, columns))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
