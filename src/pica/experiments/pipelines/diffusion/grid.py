"""Pictures side by side in one: the subject above, below it a row for each prompt and noise, a column for each model."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

_TILE, _SMALLEST = 256, 128
_GAP, _MARGIN = 8, 16
_INK, _MUTED, _GROUND = "#1a1a1a", "#666666", "#ffffff"


def picture_grid(
    columns: Mapping[str, Sequence[Image.Image]], labels: Sequence[str], subject: Sequence[Image.Image]
) -> Image.Image:
    """Put pictures side by side.

    Args:
        columns: Title of each column and its pictures, as many as there are labels.
        labels: What each row shows; a label that repeats the one above is not written again.
        subject: Square pictures of the real subject, for the strip at the top.
    Returns:
        One picture of them all.
    """
    first = next(iter(columns.values()))[0]
    tile = min(max(first.width, _SMALLEST), _TILE)
    font, small = ImageFont.load_default(16), ImageFont.load_default(13)
    line = 20
    # A row's label stands above it over the whole width, where even a long prompt has room.
    heights = [line if label and (not i or labels[i - 1] != label) else 0 for i, label in enumerate(labels)]
    strip = min(len(subject), 6)
    thumb = max(64, tile // 2)
    inner = max(len(columns) * (tile + _GAP), strip * (thumb + _GAP), _longest(columns, labels, font, small)) - _GAP
    top = _MARGIN + (line + thumb + 2 * _GAP if strip else 0)
    height = top + line + sum(heights) + len(labels) * (tile + _GAP) + _MARGIN
    sheet = Image.new("RGB", (inner + 2 * _MARGIN, height), _GROUND)
    pen = ImageDraw.Draw(sheet)
    if strip:
        shown = f"{strip} of {len(subject)} pictures" if strip < len(subject) else "all pictures"
        pen.text((_MARGIN, _MARGIN), f"the subject: {shown} that are learnt from", fill=_MUTED, font=small)
        for number, picture in enumerate(subject[:strip]):
            place = (_MARGIN + number * (thumb + _GAP), _MARGIN + line)
            sheet.paste(_scaled(picture, thumb), place)
    for number, title in enumerate(columns):
        place = (_MARGIN + number * (tile + _GAP), top)
        pen.text(place, _cut(title, tile, font), fill=_INK, font=font)
    y = top + line
    for row, label in enumerate(labels):
        if heights[row]:
            pen.text((_MARGIN, y), label, fill=_MUTED, font=small)
            y += heights[row]
        for number, pictures in enumerate(columns.values()):
            sheet.paste(_scaled(pictures[row], tile), (_MARGIN + number * (tile + _GAP), y))
        y += tile + _GAP
    return sheet


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    """Square; small pictures keep their pixels visible."""
    if picture.size == (side, side):
        return picture
    whole = side % picture.width == 0 and picture.width < side
    return picture.resize((side, side), Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def _longest(columns: Mapping[str, Any], labels: Sequence[str], font: Any, small: Any) -> int:
    """Pixels that the longest label takes, up to what a page has room for."""
    widths = [small.getlength(label) for label in labels] + [
        small.getlength("the subject: all pictures that are learnt from")
    ]
    return int(min(max(widths), 900)) + _GAP


def _cut(text: str, width: int, font: Any) -> str:
    """The text, shortened where it does not fit."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
