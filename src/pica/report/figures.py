"""Plots as inline SVG that takes its colours from the page, so that one file is right in light, in dark and on paper.

matplotlib draws with stand-in colours, each of which is replaced by a CSS variable of the page. A figure is drawn
twice, wide and narrow; the page shows the one that fits, since text in a shrunk picture cannot be read on a phone.
"""

import io
import itertools
import math
import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pica.report.page import inline
from pica.text import visible

INK, MUTED, GRID, CARD = "#010101", "#010102", "#010103", "#010104"
"""Text and axes; secondary text; grid lines; the surface below the figure (for outlines)."""

SERIES = tuple(f"#0102{index:02x}" for index in range(1, 9))
"""Eight colours that people with any kind of colour vision can tell apart; see `style` for what else tells them apart."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", "*", ">", "h")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.3)), (0, (6, 2, 1, 2)), (0, (8, 3)), (0, (3, 1, 1, 1, 1, 1)))

_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", CARD: "--card"} | {
    colour: f"--series-{index}" for index, colour in enumerate(SERIES, start=1)
}
_COLOUR = re.compile("|".join(map(re.escape, _VARIABLES)))
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # real text: selectable, searchable, and in the page's own typeface
    "text.parse_math": False,  # labels are names, and a "$" in one is no formula
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "lines.markersize": 7,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}

Width = Literal["wide", "narrow"]
WIDTHS: dict[Width, float] = {"wide": 8.6, "narrow": 3.9}
"""Inches, at 72 CSS pixels each: the widths of a desk's and a phone's column."""


class Style(NamedTuple):
    """How one series looks: colour, marker and dash differ all three, so that no two are alike in greyscale."""

    color: str
    marker: str
    linestyle: Any


def style(index: int) -> Style:
    """The look of series number `index`, from 0; colours repeat after 8, markers after 12, the pair after 24."""
    return Style(SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)], DASHES[index % len(DASHES)])


class Sheet:
    """What a drawing function is given.

    Attributes:
        figure: An empty matplotlib figure with constrained layout; add axes with `figure.subplots()`.
        narrow: Whether this is the phone's version: one column of axes, fewer ticks, legends below.
    """

    def __init__(self, figure: Figure, narrow: bool) -> None:
        self.figure, self.narrow = figure, narrow
        self._tips: dict[str, str] = {}

    def tip(self, artist: Artist, text: str) -> None:
        """Show this text where the pointer rests on the artist, or it is touched, or has the focus."""
        name = f"tip-{len(self._tips)}"
        artist.set_gid(name)
        self._tips[name] = text


def figure(
    name: str,
    draw: Callable[[Sheet], None],
    *,
    caption: str,
    alt: str,
    height: float = 4.2,
    narrow_height: float | None = None,
) -> Markup:
    """Draw a figure, for a desk and for a phone.

    Args:
        name: Distinct on its page; letters, digits and "-".
        draw: Called for each width; draws on the sheet's figure, with `INK`, `MUTED`, `SERIES` or `style` for colours.
        caption: A sentence or two below the figure: what is shown and what it says.
        alt: What a person who cannot see the figure needs to know.
        height: Of the wide version, in inches.
        narrow_height: Of the narrow version; `height` if None.
    Returns:
        An HTML `figure` element.
    """
    wide = _svg(name, draw, "wide", height, alt)
    narrow = _svg(name, draw, "narrow", narrow_height or height, alt)
    return Markup('<figure id="{}">{}{}<figcaption>{}</figcaption></figure>').format(
        name, wide, narrow, inline(caption)
    )


def quantity(value: float, _: object = None) -> str:
    """A number with k, M or G, as on an axis of parameter counts: 671744 -> "672k"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def log_axis(axis: Any) -> None:
    """Make an axis logarithmic with labels such as 10k; where it spans little, between the powers of ten as well.

    An axis that spans less than a factor of three stays linear. To be called after everything has been drawn, since the
    labels depend on the limits.
    """
    set_scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    low, high = sorted(axis.get_data_interval())
    if not (0 < low < math.inf and high < math.inf):
        return
    axis.set_major_formatter(FuncFormatter(quantity))
    if high / low < 3:
        axis.set_major_locator(MaxNLocator(4))
        return
    set_scale("log")
    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1,) if decades > 3 else (1, 3) if decades > 1 else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(quantity))
    axis.set_minor_formatter(NullFormatter())


def _svg(name: str, draw: Callable[[Sheet], None], width: Width, height: float, alt: str) -> Markup:
    settings: dict[Any, Any] = {**_SETTINGS, "svg.hashsalt": f"{name}-{width}"}  # the same bytes each time
    with matplotlib.rc_context(settings):
        drawing = Figure(figsize=(WIDTHS[width], height), layout="constrained")
        canvas = FigureCanvasSVG(drawing)
        sheet = Sheet(drawing, narrow=width == "narrow")
        draw(sheet)
        written = io.StringIO()
        canvas.print_svg(written, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(visible(written.getvalue()))  # control characters of names would be no XML
    for parent in list(root.iter()):
        for child in list(parent):
            # The metadata hold addresses, and the style is a rule on "*", which inside a page would hit everything.
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style") or child.tag.endswith("RDF"):
                parent.remove(child)
    _rename(root, f"{name}-{width}-", sheet._tips)
    root.attrib.update({"class": width, "role": "img", "aria-label": alt})
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _rename(root: ElementTree.Element, prefix: str, tips: dict[str, str]) -> None:
    """Plain HTML names for elements, ids of the figure's own, variables for colours, and the tips."""
    counter = itertools.count()
    names: dict[str, str] = {}
    for element in root.iter():
        if "id" in element.attrib:
            names[element.attrib["id"]] = f"{prefix}{next(counter)}"
    for element in list(root.iter()):
        element.tag = element.tag.removeprefix(_SVG)
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            if key == "id":
                if value in tips:
                    title = ElementTree.Element("title")
                    title.text = tips[value]
                    element.insert(0, title)
                value = names[value]
            elif key == f"{_XLINK}href" and value.startswith("#"):
                value = f"#{names[value[1:]]}"
            value = re.sub(r"url\(#([^)]+)\)", lambda match: f"url(#{names[match[1]]})", value)
            value = _COLOUR.sub(lambda match: f"var({_VARIABLES[match[0]]})", value)
            value = re.sub(r"font-family:[^;]*;?", "", value) if key == "style" else value
            element.attrib[key.removeprefix(_XLINK)] = value
