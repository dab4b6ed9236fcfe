"""Pictures with a label: from class folders, tables and lists of files, parquet and arrow files, or the hub.

Pillow is imported when the first picture is decoded: it comes with the `vision` extra, and text tasks do without.
"""

import hashlib
import io
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pica.errors import ConfigError, DataError, PicaError
from pica.tasks.base import Bar, Source, Split, Target
from pica.tasks.columns import renamed
from pica.tasks.labelled import Fields, check_labels, label_of
from pica.tasks.places import FORMATS as RECORDS
from pica.tasks.places import check_location, is_hub
from pica.tasks.records import Record, read_records
from pica.tasks.rows import load_hub

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
"""Endings of files in a class folder that are taken for pictures; other files there are no one's business."""
TABLES = (".parquet", ".arrow")
ENDINGS = (*RECORDS, ".txt", *TABLES)
KINDS_OF_FILE = "a folder of pictures, a .txt, .json, .jsonl, .tsv or .csv list of them, a .parquet or .arrow file"
FIELDS: Fields = {
    "image": ("image", "file_name", "path", "file", "img", "picture", "1"),
    "label": ("label", "labels", "class", "target", "fine_label", "2"),
}
_STEMS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "train800"),
    "validation": ("validation", "valid", "val", "dev", "val200"),
    "test": ("test",),
}
_EVERY_STEM = {stem for stems in _STEMS.values() for stem in stems}
_THREADS = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledPicture:
    """One example of an image classification task.

    Attributes:
        source: File of the picture; or a data set's row and column, where its bytes are.
        label: Name of its class; a number where the task is a regression.
        place: Where it stands ("cats/7.jpg", "train.parquet, row 7"), for messages and predictions.
        identity: Digest of the picture's file: equal for the same picture under another name.
    """

    source: "Path | Cell"
    label: str | float
    place: str
    identity: str = field(default="", compare=False)

    def read(self) -> bytes:
        """The picture's file; raises OSError where it cannot be read."""
        return self.source.read_bytes()


@dataclass(frozen=True, eq=False)
class Cell:
    """A picture inside a data set, which is only read when it is asked for."""

    rows: Any
    row: int
    column: str
    folder: Path

    def read_bytes(self) -> bytes:
        """The picture's bytes, or those of the file that the cell names, relative to the data set's folder."""
        value = self.rows[self.row][self.column]
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            return (self.folder / value).read_bytes()
        raise OSError(f"column {self.column!r} holds {type(value).__name__}, neither a picture nor the name of a file")


def decode(data: bytes) -> Any:
    """Decode a picture.

    Transparent parts are put on white, 16-bit grey values are scaled to 8 bits, and of an animation the first frame counts.

    Returns:
        A PIL image in RGB, upright as the picture's EXIF says.
    Raises:
        OSError: The bytes are no picture that Pillow reads, or are cut off.
        ConfigError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ConfigError("Pictures need the package pillow: pip install 'pica-peft[vision]'.") from None
    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            picture = ImageOps.exif_transpose(opened)
    except OSError:
        raise
    except Exception as error:  # damaged headers raise many kinds, a bomb of pixels one of its own
        raise OSError(str(error) or type(error).__name__) from error
    if picture.mode.startswith("I"):  # Pillow's own conversion would cut all above 255 off
        picture = picture.convert("I").point(lambda value: value * (1 / 256), "L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


def location_problem(location: str) -> str | None:
    """As `pica.tasks.records.check_location`, for pictures."""
    path = Path(location).expanduser()
    if path.is_file() and path.suffix in ENDINGS:
        return None
    if location == "embedded" or is_hub(location) or path.is_dir():
        return check_location(location)
    there = "does not exist" if not path.exists() else "has an unknown ending"
    return f"{location!r} {there}; give {KINDS_OF_FILE}, or hub:OWNER/NAME."


def has_pictures(location: str, split: Split) -> bool:
    """Whether a location is a folder with a file or a folder for this split."""
    folder = Path(location).expanduser()
    return not is_hub(location) and folder.is_dir() and bool(_split_places(folder, split))


def files_of(location: str, split: Split, columns: Mapping[str, str]) -> list[Path]:
    """Find the files that decide one split.

    Those of a list or table that is in disorder are left out: it is for `read_pictures` to say so.

    Args:
        location: As a source's.
        split: Which part of a folder is meant.
        columns: As a source's.
    Returns:
        Class folders' pictures, a list and the pictures that it names, or tables and the pictures that they name.
    """
    path = Path(location).expanduser()
    if is_hub(location) or not path.exists():
        return []
    places = (_split_places(path, split) if path.is_dir() else [path]) or [path]
    if places[0].suffix in TABLES:
        return sorted({*places, *_named_in(places, renamed(FIELDS, columns)["image"])})
    lists = [file for file in (places[0], *_metadata(places[0])) if file.is_file()]
    try:
        listed = _listed(split, Source(location, columns=columns), Target(), renamed(FIELDS, columns), None)
    except PicaError:
        listed = []
    return sorted({*lists, *(each.source for each in listed if isinstance(each.source, Path))})


def read_pictures(
    split: Split, source: Source, target: Target, *, numbered: int | None = None, fields: Fields = FIELDS
) -> list[LabelledPicture]:
    """Read one split; every picture is decoded once, so that a bad one shows now and not after hours.

    A limit leaves a sample drawn by the source's seed, in the data's order.

    Args:
        split: Which part of a folder is meant.
        source: Where the pictures are; its columns rename `fields`.
        target: What the labels are.
        numbered: Number of classes of a task whose labels are their indices; names in folders, sorted, become indices.
        fields: Accepted names of the fields of a table.
    Returns:
        The pictures, in the data's order.
    Raises:
        DataError: Nothing is there, a class folder has no pictures, a row lacks a field, or a picture is unreadable and
            the source does not say to leave those out.
        ConfigError: The source's columns name a field that the task does not have.
    """
    found = _listed(split, source, target, renamed(fields, source.columns), numbered)
    if source.limit is not None and source.limit < len(found):
        chosen = random.Random(source.seed).sample(range(len(found)), source.limit)
        found = [found[index] for index in sorted(chosen)]
    if target.labels is not None:
        check_labels(found, target.labels, split)
    return readable(found, skip=source.skip_unreadable, bar=source.bar, leave_out=source.leave_out)


def _listed(
    split: Split, source: Source, target: Target, fields: Mapping[str, tuple[str, ...]], numbered: int | None
) -> list[LabelledPicture]:
    if is_hub(source.location):
        rows = load_hub(source.location)
        return _of_rows(rows, source.location, Path(), target, fields, names=numbered is None)
    if problem := location_problem(source.location):
        raise DataError(problem[0].upper() + problem[1:])
    path = Path(source.location).expanduser()
    places = _split_places(path, split) if path.is_dir() else [path]
    if not places:
        inner = [each for each in _visible(path) if each.is_dir()]
        if not inner or any(each.name in _EVERY_STEM for each in inner):
            raise DataError(
                f"{source.location!r} is a folder without a {' or '.join(_STEMS[split])} folder, list or .parquet file in "
                "it, and without class folders."
            )
        places = [path]
    if places[0].is_dir():
        return _of_folder(places[0], numbered, target, fields)
    if places[0].suffix in TABLES:
        rows = _table(places)
        return _of_rows(rows, str(places[0]), places[0].parent, target, fields, names=numbered is None)
    return _of_list(places[0], split, target, fields)


def _split_places(folder: Path, split: Split) -> list[Path]:
    """A folder or a list that is named after the split, or a parquet or arrow file, perhaps in parts."""
    for stem in _STEMS[split]:
        if (folder / stem).is_dir():
            return [folder / stem]
        for ending in ENDINGS:
            if (folder / f"{stem}{ending}").is_file():
                return [folder / f"{stem}{ending}"]
        if parts := sorted(folder.glob(f"{stem}-*-of-*.parquet")):
            return parts
    return []


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__")))


def _metadata(folder: Path) -> list[Path]:
    """Where a list of a folder's pictures may be; the first that is there counts."""
    return [folder / f"metadata{ending}" for ending in RECORDS]


def _of_folder(
    folder: Path, numbered: int | None, target: Target, fields: Mapping[str, tuple[str, ...]]
) -> list[LabelledPicture]:
    """Class folders, or a metadata file that names pictures beside it."""
    for file in _metadata(folder):
        if file.is_file():
            return _of_list(file, None, target, fields)
    classes = [path for path in _visible(folder) if path.is_dir()]
    if not classes:
        raise DataError(f"{str(folder)!r} holds no class folders (one for each class, with its pictures in it).")
    if numbered is not None and len(classes) != numbered:
        raise DataError(
            f"{str(folder)!r} holds {len(classes)} class folders where this task has {numbered} classes; give a list of "
            "pictures and class numbers instead."
        )
    found = []
    for number, inner in enumerate(classes):
        pictures = [path for path in sorted(inner.rglob("*")) if path.suffix.lower() in PICTURES and path.is_file()]
        if not pictures:
            raise DataError(f"Class folder {str(inner)!r} holds no pictures; put some in, or remove it.")
        name = inner.name if numbered is None else str(number)
        label = _number(name, str(inner)) if target.regression else name
        found += [LabelledPicture(path, label, str(path)) for path in pictures]
    return found


def _number(name: str, place: str) -> float:
    try:
        return float(name)
    except ValueError:
        raise DataError(f"{place}: the folder's name is not a number, which a regression needs.") from None


def _of_list(
    path: Path, split: Split | None, target: Target, fields: Mapping[str, tuple[str, ...]]
) -> list[LabelledPicture]:
    """Rows that name a picture, relative to the file's own folder, and its label."""
    if path.suffix == ".txt":
        records = list(_plain(path))
    else:
        names = {name for accepted in fields.values() for name in accepted} - {"1", "2"}
        records = read_records(str(path), split, names=names)
    found = []
    for record in records:
        named = path.parent / record.text(*fields["image"]).strip()
        if not named.is_file():
            raise DataError(f"{record.place}: there is no picture {str(named)!r}.")
        label = label_of(record, fields["label"], target, {})
        found.append(LabelledPicture(named, label, str(named)))
    return found


def _plain(path: Path) -> Iterator[Record]:
    """Lines of a picture's name, a space and its label; names may hold spaces, labels may not."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
    empty = True
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            name, _, label = line.strip().rpartition(" ")
            if not name:
                raise DataError(f"{path}, line {number}: expected the name of a picture, a space and its label.")
            empty = False
            yield Record({"1": name, "2": label}, f"{path}, line {number}")
    if empty:
        raise DataError(f"{path}: the file holds no rows.")


def _table(paths: Sequence[Path]) -> Any:
    """Rows of parquet files, or of one arrow file, mapped from disk."""
    import datasets

    try:
        if paths[0].suffix == ".arrow":
            return datasets.Dataset.from_file(str(paths[0]))
        return datasets.Dataset.from_parquet([str(path) for path in paths])
    except Exception as error:  # pyarrow and datasets raise many kinds; all mean that the file is no good
        lines = str(error).splitlines() or [type(error).__name__]
        raise DataError(f"{paths[0]}: not a readable {paths[0].suffix} file ({lines[0]}).") from error


def _named_in(places: Sequence[Path], accepted: Sequence[str]) -> Iterator[Path]:
    """Pictures that a table names instead of holding, where they are; no picture in it is read."""
    from pyarrow import compute, types

    try:
        rows = _table(places)
    except DataError:
        return
    column = next((name for name in accepted if name in rows.column_names), None)
    if column is None:
        return
    for part in rows.data.column(column).chunks:
        if types.is_struct(part.type):
            known = {field.name for field in part.type}
            if "path" not in known:
                continue
            named = part.field("path")
            if "bytes" in known:
                named = named.filter(compute.is_null(part.field("bytes")))  # pyright: ignore[reportAttributeAccessIssue]
        elif types.is_string(part.type) or types.is_large_string(part.type):
            named = part
        else:
            continue
        files = (places[0].parent / name for name in named.to_pylist() if name)
        yield from (file for file in files if file.is_file())


def _of_rows(
    rows: Any, place: str, folder: Path, target: Target, fields: Mapping[str, tuple[str, ...]], *, names: bool
) -> list[LabelledPicture]:
    """Rows of a data set; class indices become their names, if `names` says so and the data set has them."""
    import datasets

    if not len(rows):
        raise DataError(f"{place}: the data set holds no rows.")
    column = next((name for name in fields["image"] if name in rows.column_names), None)
    label = next((name for name in fields["label"] if name in rows.column_names), None)
    if column is None or label is None:
        what = "image" if column is None else "label"
        raise DataError(
            f"{place}: no column {' or '.join(map(repr, fields[what]))} (it has {', '.join(rows.column_names)}); name it "
            f"with data.columns, for instance {{{what}: {rows.column_names[0]}}}."
        )
    rows = rows.select_columns([column, label])  # other columns, perhaps pictures too, need not be read
    if isinstance(rows.features[column], datasets.Image):
        rows = rows.cast_column(column, datasets.Image(decode=False))
    feature, found = rows.features[label], []
    for number, value in enumerate(rows[label]):
        where = f"{place}, row {number + 1}"
        if names and isinstance(feature, datasets.ClassLabel) and value is not None and value >= 0:
            value = feature.int2str(value)
        chosen = label_of(Record({label: value}, where), [label], target, {})
        found.append(LabelledPicture(Cell(rows, number, column, folder), chosen, where))
    return found


def readable(
    examples: Sequence[LabelledPicture],
    *,
    skip: bool,
    bar: Bar | None = None,
    leave_out: Callable[[str, str, str], None] | None = None,
) -> list[LabelledPicture]:
    """The examples with their digests, without those that cannot be decoded; decodes each, which many show a bar for."""

    def check(example: LabelledPicture) -> LabelledPicture | OSError:
        try:
            data = example.read()
            decode(data)
        except OSError as error:
            return error
        return replace(example, identity=hashlib.sha256(data).hexdigest())

    with ThreadPoolExecutor(_THREADS) as pool:
        checked = []
        with bar("Decoding pictures", len(examples)) if bar else nullcontext() as advance:
            for each in pool.map(check, examples):
                checked.append(each)
                if advance is not None:
                    advance()
    kept = [each for each in checked if isinstance(each, LabelledPicture)]
    bad = [(example.place, each) for example, each in zip(examples, checked) if isinstance(each, OSError)]
    if not bad:
        return kept
    named = "; ".join(f"{place} ({_reason(error)})" for place, error in bad[:5]) + ("; ..." if len(bad) > 5 else "")
    if not skip:
        raise DataError(
            f"{len(bad)} of {len(examples)} pictures cannot be read: {named}. Replace them, or leave them out with "
            "data.skip_unreadable true."
        )
    if not kept:
        raise DataError(f"None of {len(examples)} pictures can be read: {named}.")
    for place, error in bad if leave_out else ():
        leave_out(place, place, f"cannot be read ({_reason(error)})")  # pyright: ignore[reportOptionalCall]
    logger.warning("%d of %d pictures cannot be read and are left out: %s", len(bad), len(examples), named)
    return kept


def _reason(error: OSError) -> str:
    text = error.strerror or str(error)
    return "no picture that Pillow knows" if text.startswith("cannot identify image file") else text
