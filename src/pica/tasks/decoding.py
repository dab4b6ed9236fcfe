"""A picture as an example: where its bytes lie, with its label, and how they are decoded.

Pillow is imported when the first picture is decoded: it comes with the `vision` extra, and text tasks do without.
"""

import hashlib
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pica.errors import ConfigError, DataError
from pica.tasks.base import Bar

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
