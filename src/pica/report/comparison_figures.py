"""The plots of a comparison's page."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import ScaledTranslation

from pica.experiments.results.run import Candidate
from pica.experiments.uncertainty import SHARES
from pica.report.figures import CARD, GRID, INK, MARKERS, MUTED, SERIES, Sheet, figure, log_axis, quantity
from pica.report.summary import RowSummary, shown_row
from pica.text import in_words

_MARKER = 8.0  # points that a marker takes
_FAMILIES = ("PiCa", "LoRA", "SVFT", "LoRA from singular vectors", "orthogonal", "shared random bases", "other", "full")


class Labelled(Protocol):
    """What a method is called, and whom it is like."""

    @property
    def label(self) -> str: ...

    @property
    def family(self) -> str: ...


class Looks:
    """Colour by family, marker by method: no two methods have the same marker and filling."""

    def __init__(self, rows: Sequence[Labelled]) -> None:
        self._index = {row.label: index for index, row in enumerate(rows)}
        self._family = {row.label: row.family for row in rows}

    def color(self, label: str) -> str:
        """A stand-in colour."""
        family = self._family[label]
        return SERIES[_FAMILIES.index(family if family in _FAMILIES else "other")]

    def marker(self, label: str) -> dict[str, Any]:
        """matplotlib's marker properties; from the thirteenth method on, markers are hollow."""
        index, color = self._index[label], self.color(label)
        hollow = index // len(MARKERS) % 2 == 1
        return {
            "marker": MARKERS[index % len(MARKERS)],
            "markerfacecolor": CARD if hollow else color,
            "markeredgecolor": color,
            "markeredgewidth": 1.4,
        }


def against_figure(
    name: str,
    rows: Sequence[RowSummary],
    looks: Looks,
    metric: str,
    axes: Sequence[tuple[str, Callable[[RowSummary], float]]],
    *,
    caption: str,
) -> Markup:
    """The metric against one or more quantities, side by side on a desk and below each other on a phone."""

    def draw(sheet: Sheet) -> None:
        count = len(axes)
        shape = (count, 1) if sheet.narrow else (1, count)
        panels = sheet.figure.subplots(*shape, squeeze=False, sharey="row").ravel()
        cast(ConstrainedLayoutEngine, sheet.figure.get_layout_engine()).set(wspace=0.08)
        for panel, (title, value) in zip(panels, axes):
            drawn: list[Drawn] = []
            for row in rows:
                x = value(row)
                line = panel.errorbar(
                    [x],
                    [row.score.mean],
                    yerr=_bar(row),
                    color=looks.color(row.label),
                    linestyle="none",
                    elinewidth=1.3,
                    capsize=2.5,
                    **looks.marker(row.label),
                )
                tip = f"{row.label}: {in_words(metric)} {shown_row(metric, row)}, {title} {quantity(x)}"
                sheet.tip(line.lines[0], tip)
                drawn.append((x, row.score.mean, line.get_children()))
            panel.set_xlabel(title)
            if sheet.narrow or panel is panels[0]:
                panel.set_ylabel(in_words(metric))
            metric_axis(panel, metric)
            log_axis(panel.xaxis)
            side_by_side(panel, drawn)
        legend(sheet, rows, looks)

    lines = math.ceil(len(rows) / 2)
    names = 0.21 * lines
    return figure(
        name,
        draw,
        caption=caption,
        alt=f"{in_words(metric)} of {len(rows)} methods against {' and '.join(title for title, _ in axes)}; "
        "numbers are in the table.",
        height=max(4.4, 0.22 * len(rows) + 0.4) if len(axes) == 1 else 4.0 + 0.2 * math.ceil(len(rows) / 4),
        narrow_height=2.9 * len(axes) + names + 0.5,
    )


def ablation_figure(groups: Sequence[tuple[str, Sequence[RowSummary]]], looks: Looks, metric: str) -> Markup:
    """Each group's methods below each other: seeds as small points, their mean as the method's marker."""
    total = sum(len(members) for _, members in groups)

    def draw(sheet: Sheet) -> None:
        heights = [len(members) + 0.6 for _, members in groups]
        panels = sheet.figure.subplots(len(groups), 1, squeeze=False, sharex=True, height_ratios=heights).ravel()
        for panel, (title, members) in zip(panels, groups):
            for place, row in enumerate(reversed(members)):
                color = looks.color(row.label)
                panel.plot(row.scores, [place] * len(row.scores), "|", color=MUTED, markersize=11, markeredgewidth=1.4)
                mean = panel.plot([row.score.mean], [place], linestyle="none", **looks.marker(row.label))[0]
                below, above = _bar(row)
                ends = [row.score.mean - below[0], row.score.mean + above[0]]
                panel.plot(ends, [place, place], color=color, linewidth=1.3, zorder=1.5)
                sheet.tip(mean, f"{row.label}: {shown_row(metric, row)}, {row.parameters:,} parameters")
            names = [f"{row.label} ({quantity(row.parameters)})" for row in reversed(members)]
            if sheet.narrow:  # names beside the axes would leave no room for them
                panel.set_yticks([])
                for place, name in enumerate(names):
                    panel.annotate(name, (0.01, place + 0.24), xycoords=("axes fraction", "data"), fontsize=8)
            else:
                panel.set_yticks(range(len(members)), names)
            panel.set_ylim(-0.6, len(members) - 0.4 + 0.2 * sheet.narrow)
            panel.set_title(title)
            panel.grid(axis="y", visible=False)
        panels[-1].set_xlabel(in_words(metric))
        metric_axis(panels[-1], metric, axis="x")

    return figure(
        "ablations-plot",
        draw,
        caption="Strokes are seeds, markers their means, lines 95% intervals of test problems and seeds; in brackets the "
        "trained parameters.",
        alt=f"{in_words(metric)} of the methods of {len(groups)} ablations; the numbers are listed below.",
        height=0.75 * len(groups) + 0.32 * total + 0.5,
        narrow_height=0.75 * len(groups) + 0.42 * total + 0.5,
    )


def rates_figure(rows: Sequence[RowSummary], looks: Looks) -> Markup:
    """Validation loss against the learning rate, the chosen one marked."""

    def draw(sheet: Sheet) -> None:
        axes = sheet.figure.subplots()
        drawn: list[Drawn] = []
        for row in rows:
            tried = sorted(
                (one.learning_rate, one.validation_loss)
                for one in row.candidates
                if isinstance(one, Candidate) and one.validation_loss is not None
            )
            points = [rate for rate, _ in tried], [loss for _, loss in tried]
            axes.plot(*points, color=looks.color(row.label), linewidth=1.1, marker=".", markersize=5)
            for rate, loss in tried:
                if rate == row.rate:
                    chosen = axes.plot([rate], [loss], linestyle="none", **looks.marker(row.label))
                    drawn.append((rate, loss, chosen))
                    sheet.tip(chosen[0], f"{row.label}: rate {rate:g}, validation loss {loss:.4f}")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("validation loss")
        log_axis(axes.xaxis)
        side_by_side(axes, drawn)
        legend(sheet, rows, looks)

    return figure(
        "rates-plot",
        draw,
        caption="Validation loss after training with each learning rate (small points); large markers are the chosen rates.",
        alt="Validation loss against learning rate for every method; the numbers are in the table of rates.",
        height=max(4.2, 0.22 * len(rows) + 0.4),
        narrow_height=3.3 + 0.21 * math.ceil(len(rows) / 2),
    )


def curves_figure(rows: Sequence[RowSummary], looks: Looks) -> Markup:
    """One small panel a method: its seeds in colour, all other methods behind them in grey."""

    def draw(sheet: Sheet) -> None:
        columns = 2 if sheet.narrow else 4
        lines = math.ceil(len(rows) / columns)
        panels = sheet.figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for panel, row in zip(panels, rows):
            for other in rows:
                if other is not row:
                    _curve(panel, other.done[0].curve, color=GRID, linewidth=0.8)
            for record in row.done:
                _curve(panel, record.curve, color=looks.color(row.label), linewidth=1.3)
            panel.set_title(row.label, fontsize=9, fontweight="normal")
            panel.grid(visible=False)
        for panel in panels[len(rows) :]:
            panel.set_visible(False)
        highest = [losses[0] for row in rows for record in row.done if (losses := _smooth(record.curve)[1])]
        if highest:
            panels[0].set_ylim(0, 1.05 * max(min(max(highest), 3 * sorted(highest)[len(highest) // 2]), 1e-3))
        sheet.figure.supxlabel("optimizer step", fontsize=9, color=INK)
        sheet.figure.supylabel("training loss", fontsize=9, color=INK)

    return figure(
        "curves-plot",
        draw,
        caption="Training loss, the mean over up to nine neighbouring points: the method's seeds in colour, the other "
        "methods' first seed in grey.",
        alt=f"Training loss against optimizer steps for {len(rows)} methods.",
        height=1.55 * math.ceil(len(rows) / 4) + 0.6,
        narrow_height=1.5 * math.ceil(len(rows) / 2) + 0.6,
    )


Drawn = tuple[float, float, Sequence[Artist]]
"""Where a marker is, and what belongs to it."""


def side_by_side(panel: Any, drawn: Sequence[Drawn], *, vertical: bool = False) -> None:
    """Move markers that would hide each other apart, by their width; to be called when the limits are settled."""
    figure = panel.figure
    box = panel.get_position()
    sizes = figure.get_size_inches() * 72 * (box.width, box.height)  # points; before layout, so a little too large
    to_share = panel.transData - panel.transAxes
    places = [to_share.transform((x, y)) * sizes for x, y, _ in drawn]
    groups: list[list[int]] = []
    for index, place in enumerate(places):
        near = (group for group in groups if all(abs(place - places[group[0]]) < _MARKER))
        found = next(near, None)
        if found is None:
            groups.append([index])
        else:
            found.append(index)
    along = int(vertical)
    for group in (group for group in groups if len(group) > 1):
        group.sort(key=lambda index: places[index][along])
        middle = sum(places[index][along] for index in group) / len(group)
        for order, index in enumerate(group):
            shift = (middle + _MARKER * (order - (len(group) - 1) / 2) - places[index][along]) / 72
            move = ScaledTranslation(*((0, shift) if vertical else (shift, 0)), figure.dpi_scale_trans)
            for artist in drawn[index][2]:
                artist.set_transform(artist.get_transform() + move)


def _bar(row: RowSummary) -> list[list[float]]:
    """How far the score's interval reaches below and above it; nowhere if it is not known."""
    low, high = row.interval
    mean = row.score.mean
    return [[mean - low if low <= mean else 0.0], [high - mean if high >= mean else 0.0]]


def _smooth(curve: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Steps and losses, each loss the mean over a window of up to nine points."""
    steps, losses = [point[0] for point in curve], [point[1] for point in curve]
    half = min(4, len(losses) // 10)
    means = [
        sum(window) / len(window)
        for index in range(len(losses))
        if (window := losses[max(0, index - half) : index + half + 1])
    ]
    return steps, means


def _curve(panel: Any, curve: Sequence[Sequence[float]], **properties: Any) -> None:
    panel.plot(*_smooth(curve), **properties)


def metric_axis(panel: Any, metric: str, axis: str = "y") -> None:
    """Shares in percent."""
    if metric in SHARES:
        chosen = panel.yaxis if axis == "y" else panel.xaxis
        chosen.set_major_formatter(PercentFormatter(xmax=1))


def legend(sheet: Sheet, rows: Sequence[Labelled], looks: Looks) -> None:
    """Each method's marker and name: beside a single plot, else below."""
    handles = [Line2D([], [], linestyle="none", label=row.label, **looks.marker(row.label)) for row in rows]
    wide_below = len(sheet.figure.axes) > 1 and not sheet.narrow
    if sheet.narrow or wide_below:
        sheet.figure.legend(
            handles=handles,
            loc="outside lower left",
            ncols=2 if sheet.narrow else 4,
            fontsize=8,
            handletextpad=0.2,
            columnspacing=0.8,
        )
    else:
        sheet.figure.legend(handles=handles, loc="outside right upper", handletextpad=0.2)
