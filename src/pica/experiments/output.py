"""Writing results so that what stands under its final name is complete."""

import csv
import errno
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pica.errors import OutputError

RESOLVED = "recipe.resolved.yaml"
"""File in every output folder that holds the full recipe; its presence marks a folder as one of ours."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# safetensors, torch.save and shutil report a failed write in exceptions of their own, with only the text to tell by;
# "inline_container" is the part of torch that writes files.
_FULL_TEXTS = ("No space left", "StorageFull", "quota exceeded", "File too large", "inline_container")


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


def disk_is_full(error: BaseException) -> bool:
    """Whether an exception, of whatever library, means that a write found no room."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    known = isinstance(error, (OSError, RuntimeError)) or type(error).__name__ == "SafetensorError"
    return known and any(part in str(error) for part in _FULL_TEXTS)


@contextmanager
def translated_write_errors(path: Path) -> Iterator[None]:
    """Turn failures to write into one sentence that names the place.

    Raises:
        OutputError: In place of an OSError, or of another library's error for a full disk.
    """
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        if disk_is_full(error):
            raise OutputError(
                f"No room left to write {str(path)!r}; free some space on that disk, or choose another place with "
                "--output."
            ) from error
        if isinstance(error, OSError):
            raise OutputError(f"Cannot write {str(path)!r}: {error.strerror or error}.") from error
        raise


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the name `target` once the block has ended without an error.

    Raises:
        OutputError: Writing failed; nothing is left behind.
    """
    with translated_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        try:
            partial.chmod(0o777 & ~_umask())  # mkdtemp's 0o700 would shut out the other users of a shared disk
            yield partial
            _flush(partial)
            if target.exists():
                shutil.rmtree(target)
            os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


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
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(target, buffer.getvalue())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(folder: Path) -> None:
    """Have the files' contents on disk before the rename is, so that a power cut cannot leave empty ones."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
