"""One self-contained HTML page: no network, light and dark, for a phone and for a desk."""

import base64
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

import jinja2
from markupsafe import Markup, escape

from pica._version import __version__
from pica.text import csv_text as csv_text
from pica.text import visible

_ASSETS = "assets/report"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: Of the row's value.
        title: Its heading.
        help: Shown where the pointer rests on the heading, or it has the focus, or is touched.
        numeric: Aligned to the right and sorted by value.
        lower_first: Whether the first click sorts the smallest number first, where that is the better one.
        wraps: Whether its text, which may be long, is broken into lines.
    """

    key: str
    title: str
    help: str = ""
    numeric: bool = True
    lower_first: bool = False
    wraps: bool = False


@dataclass(frozen=True)
class Cell:
    """A table's cell that shows something else than its sorting value.

    Attributes:
        text: What is shown; text is escaped, `Markup` is not.
        value: What the column is sorted by; None comes last in either direction.
    """

    text: str
    value: float | str | None = None


@dataclass
class Page:
    """Sections of HTML, put together by `html`.

    Attributes:
        title: Of the page.
        lead: One or two sentences below it.
        facts: Name and value of what holds for the whole page, such as the model.
        refresh: Seconds after which a browser looks for a newer page; never if None.
    """

    title: str
    lead: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)
    refresh: int | None = None
    _sections: list[tuple[str, str, list[Markup]]] = field(default_factory=list)
    _downloads: list[tuple[str, Markup]] = field(default_factory=list)

    def section(self, heading: str, *blocks: Markup | str) -> None:
        """Add a section; plain text becomes a paragraph."""
        parts = [block if isinstance(block, Markup) else paragraph(block) for block in blocks]
        self._sections.append((heading, _slug(heading), parts))

    def download(self, name: str, text: str, *, kind: Literal["text/csv", "application/json", "text/yaml"]) -> None:
        """Add a file that the page carries and a reader can save."""
        data = base64.b64encode(text.encode("utf-8")).decode("ascii")
        self._downloads.append((name, Markup(f"data:{kind};charset=utf-8;base64,{data}")))

    def html(self) -> str:
        """The whole page."""
        folder = resources.files("pica") / _ASSETS
        style, script, template = (
            (folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js", "page.html.jinja")
        )
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
        environment.filters["inline"] = inline
        page = environment.from_string(template).render(
            title=self.title,
            lead=self.lead,
            facts=self.facts,
            refresh=self.refresh,
            sections=self._sections,
            downloads=self._downloads,
            style=Markup(style),
            script=Markup(script),
            version=__version__,
        )
        return visible(page)  # control characters have no place in HTML, and names from files may hold some


def inline(text: str) -> Markup:
    """Text within a line: escaped, and what stands between backticks as code; `Markup` stays as it is."""
    if isinstance(text, Markup):
        return text
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def paragraph(text: str) -> Markup:
    """Text as a paragraph."""
    return Markup("<p>{}</p>").format(inline(text))


def notice(text: str, kind: Literal["note", "warning"] = "note") -> Markup:
    """A paragraph that stands out."""
    label = "Warning" if kind == "warning" else "Note"
    return Markup('<p class="notice {}" role="note"><strong>{}.</strong> {}</p>').format(kind, label, inline(text))


def bullets(items: Iterable[str]) -> Markup:
    """A list; text is escaped, `Markup` is not."""
    return Markup("<ul>{}</ul>").format(Markup("").join(Markup("<li>{}</li>").format(inline(item)) for item in items))


def details(summary: str, *blocks: Markup | str) -> Markup:
    """Something that opens on a click."""
    body = Markup("").join(block if isinstance(block, Markup) else paragraph(block) for block in blocks)
    return Markup("<details><summary>{}</summary>{}</details>").format(inline(summary), body)


def preformatted(text: str) -> Markup:
    """Text with its line breaks, in a fixed-width typeface."""
    return Markup("<pre>{}</pre>").format(text)


def entries(
    items: Iterable[tuple[Markup, str, float, int]], *, kinds: Sequence[str], orders: Mapping[str, str]
) -> Markup:
    """Make a list with a search box; without scripts, the list alone, in the order in which it is given.

    Args:
        items: Content, kind, a number that is the lower the better, and where it stands in the data.
        kinds: What a reader may choose one of.
        orders: Titles of "turns" (as given), "best", "worst" and "place".
    Returns:
        HTML.
    """
    options = Markup("").join(
        Markup('<option value="{}">{}</option>').format(*pair) for pair in [("", "all"), *((k, k) for k in kinds)]
    )
    choice = Markup('<label>Show <select name="kind">{}</select></label>').format(options) if len(kinds) > 1 else ""
    ordered = Markup("").join(Markup('<option value="{}">{}</option>').format(*pair) for pair in orders.items())
    listed = Markup("").join(
        Markup('<li data-kind="{}" data-change="{}" data-place="{}">{}</li>').format(kind, f"{change:.9g}", place, body)
        for body, kind, change, place in items
    )
    return Markup(
        '<div class="entries"><div class="controls" hidden><label>Search <input type="search"></label>{}'
        '<label>Order <select name="order">{}</select></label><output></output></div><ol>{}</ol></div>'
    ).format(choice, ordered, listed)


def table(
    columns: Sequence[Column],
    rows: Sequence[Mapping[str, Any]],
    *,
    caption: str,
    sortable: bool = True,
    marked: Collection[int] = (),
) -> Markup:
    """Make a table whose first column names the row; a click on a heading sorts it.

    Args:
        columns: What is shown.
        rows: Values by column key: text, a number, None, or a `Cell`.
        caption: One sentence above it.
        sortable: Whether headings sort.
        marked: Places of the rows that stand out.
    Returns:
        HTML.
    """
    heads = []
    for column in columns:
        kind = Markup(' class="number"') if column.numeric else ""
        hint = Markup(' title="{}"').format(column.help) if column.help else ""
        first = "ascending" if column.lower_first or not column.numeric else "descending"
        sort = Markup(' aria-sort="none" data-first="{}"').format(first) if sortable else ""
        if sortable:
            inner = Markup('<button type="button"{}>{}</button>').format(hint, column.title)
        else:
            inner = Markup("<span{}>{}</span>").format(hint, column.title) if column.help else column.title
        heads.append(Markup('<th scope="col"{}{}>{}</th>').format(kind, sort, inner))
    lines = []
    for place, row in enumerate(rows):
        cells = [_cell(row.get(column.key), column, first=index == 0) for index, column in enumerate(columns)]
        stands_out = Markup(' class="best"') if place in marked else ""
        lines.append(Markup("<tr{}>{}</tr>").format(stands_out, Markup("").join(cells)))
    name = caption.replace("`", "")
    # The caption stands outside of what scrolls sideways: inside, it would be as wide as the table, and cut off on a phone.
    return Markup(
        '<p class="caption">{}</p><div class="table" tabindex="0" role="region" aria-label="{}"><table aria-label="{}"{}>'
        "<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>"
    ).format(
        inline(caption),
        name,
        name,
        Markup(' class="sortable"') if sortable else "",
        Markup("").join(heads),
        Markup("\n").join(lines),
    )


def _cell(content: Any, column: Column, *, first: bool) -> Markup:
    shown, value = (content.text, content.value) if isinstance(content, Cell) else (content, content)
    shown = "" if shown is None else shown
    if isinstance(shown, float):
        shown = f"{shown:.4g}"
    elif isinstance(shown, int) and not isinstance(shown, bool):
        shown = f"{shown:,}"
    sort = "" if value is None else value
    tag = Markup('th scope="row"') if first else Markup("td")
    kind = Markup(' class="number"') if column.numeric and not first else ""
    kind = Markup(' class="wrap"') if column.wraps else kind
    end = Markup("th") if first else Markup("td")
    return Markup('<{}{} data-value="{}">{}</{}>').format(tag, kind, escape(str(sort)), shown, end)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
