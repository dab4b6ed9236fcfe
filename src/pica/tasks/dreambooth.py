"""DreamBooth: a few pictures of one subject, which a text-to-image model learns to draw."""

from pathlib import Path

from pica.errors import DataError
from pica.tasks.base import Bar, Kind, Source, Split
from pica.tasks.decoding import LabelledPicture, readable
from pica.tasks.pictures import PICTURES

SUBJECT = "subject"


class DreamBoothTask:
    """The pictures of one folder, all of the same subject; the recipe's `dreambooth` section says in which words."""

    name = "dreambooth"
    kind: Kind = "text-to-image"
    subsets: tuple[str, ...] = ()
    has_embedded = False

    def load(self, split: Split, source: Source) -> list[LabelledPicture]:
        """The folder's pictures by name; with a limit the first ones. See `Task.load`."""
        if source.location == "embedded":
            raise DataError("Task dreambooth has no embedded pictures; set data.train to a folder with some.")
        return read_folder(source.location, limit=source.limit, skip=source.skip_unreadable, bar=source.bar)


def folder_problem(location: str) -> str | None:
    """What is wrong with a folder of pictures, as far as can be told without decoding them; None if nothing is."""
    path = Path(location).expanduser()
    if not path.exists():
        return f"{location!r} does not exist; give a folder of pictures."
    if not path.is_dir():
        return f"{location!r} is a file; give the folder that the pictures are in."
    if not picture_files(path):
        return f"{location!r} holds no pictures (files ending in {', '.join(PICTURES)})."
    return None


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder, by name; not those of folders in it."""
    if not folder.is_dir():
        return []
    files = (path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.is_file())
    return sorted(path for path in files if not path.name.startswith("."))


def read_folder(
    location: str, *, limit: int | None = None, skip: bool = False, bar: Bar | None = None
) -> list[LabelledPicture]:
    """Read the pictures of a folder; each is decoded once, so that a bad one shows now and not after hours.

    Args:
        location: The folder.
        limit: Use at most this many, the first by name.
        skip: Leave out with a warning what cannot be decoded, instead of refusing it.
        bar: As in `Source`.
    Returns:
        The pictures by name, all with the label `SUBJECT`.
    Raises:
        DataError: The folder is missing or has no pictures, or one cannot be decoded and `skip` is off.
    """
    if problem := folder_problem(location):
        raise DataError(problem)
    found = [LabelledPicture(path, SUBJECT, str(path)) for path in picture_files(Path(location).expanduser())]
    return readable(found, skip=skip, bar=bar)[:limit]
