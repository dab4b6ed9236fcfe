"""Pictures with a label: from class folders, tables and lists of files, parquet and arrow files, or the hub."""

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pica.errors import DataError, PicaError
from pica.tasks.base import Source, Split, Target
from pica.tasks.columns import renamed
from pica.tasks.decoding import Cell, LabelledPicture, readable
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
