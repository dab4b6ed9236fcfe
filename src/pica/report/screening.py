"""A screen of bases as text and as a part of a page."""

from __future__ import annotations

import textwrap
from typing import Any

from pica.experiments.analyze.summary import short_names
from pica.experiments.results.screening import Screen
from pica.report.page import Cell, Column, notice, table

WIDTH = 80
_ALL = "all"
_NARROWEST = 12  # of the column of roles

NOT_A_PREDICTION = (
    "A screen, not a prediction: it is of the first step alone, and which basis trains best is for pica compare to say."
)


def as_text(screen: Screen) -> str:
    """A title, the table by role, and what to make of it, in lines of at most `WIDTH` characters."""
    lines = [["role", "r/n", *_projections(screen)]]
    lines += [[row["role"], _percent(row["chance"]), *map(_percent, row["shares"])] for row in _rows(screen)]
    widths = [max(len(line[i]) for line in lines) for i in range(1, len(lines[0]))]
    first = max(len(line[0]) for line in lines)
    first = max(_NARROWEST, min(first, WIDTH - sum(widths) - 2 * len(widths)))
    body = [
        "  ".join([_ending(line[0], first).ljust(first), *(c.rjust(w) for c, w in zip(line[1:], widths))])
        for line in lines
    ]
    words = [f"Cap: {_said(screen)}", *screen.notes]
    folded = [textwrap.fill(sentence, WIDTH) for sentence in words]
    return "\n".join([folded[0], "", *body, "", textwrap.fill(NOT_A_PREDICTION, WIDTH), *folded[1:]])


def blocks(screen: Screen) -> list[Any]:
    """The same for a page."""
    columns = [
        Column("role", "role", "The layers' common path", numeric=False),
        Column("layers", "layers", "", numeric=True),
        Column("chance", "r/n", "What random directions hold on average", numeric=True),
        *(Column(name, name, "", numeric=True) for name in _projections(screen)),
    ]
    rows = []
    for row in _rows(screen):
        shares = {
            name: Cell(_percent(v), v)
            for name, v in zip(("chance", *_projections(screen)), (row["chance"], *row["shares"]))
        }
        rows.append({"role": row["role"], "layers": row["layers"], **shares})
    found = [
        f"Cap: {_said(screen)} {NOT_A_PREDICTION}",
        table(columns, rows, caption="Cap by role.", marked=[len(rows) - 1]),
    ]
    return [*found, *(notice(note) for note in screen.notes)]


def _said(screen: Screen) -> str:
    gradient, read = screen.gradient, screen.calibration
    text = (
        f"the share of the first gradient's energy that {screen.r} directions of each layer hold. The gradient is of the "
        f"loss on {gradient.tokens:,} tokens of {gradient.source}"
    )
    if read is None:
        return f"{text}."
    return f"{text}; activation and weighted directions are of {read.tokens:,} other tokens of {read.source}."


def _projections(screen: Screen) -> list[str]:
    return list(screen.rows[0].shares)


def _rows(screen: Screen) -> list[dict[str, Any]]:
    names = short_names([row.role for row in screen.rows[:-1]]) | {screen.rows[-1].role: _ALL}
    return [
        {
            "role": names[row.role],
            "layers": row.layers,
            "chance": row.chance,
            "shares": [row.shares[name] for name in _projections(screen)],
        }
        for row in screen.rows
    ]


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _ending(name: str, width: int) -> str:
    """The end of a path tells more than its beginning."""
    return name if len(name) <= width else f"...{name[3 - width :]}"
