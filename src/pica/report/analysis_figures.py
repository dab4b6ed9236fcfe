"""The figures of `pica analyze`, drawn for the page (in its own colours) and as PNG and SVG files (light)."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pica.experiments.analyze.analysis import HISTOGRAM_BINS, Analysis, Layer
from pica.experiments.analyze.summary import curve, iterate_updates, short_names
from pica.report import figures
from pica.report.figures import Sheet, log_axis, quantity

MOST_ROLES = 12  # panels of one figure; the roles with the largest updates are shown


class Palette(NamedTuple):
    """Colours of a figure: the page's stand-ins, or real ones for a file."""

    ink: str
    muted: str
    series: tuple[str, ...]


PAGE = Palette(figures.INK, figures.MUTED, figures.SERIES)
LIGHT = Palette(
    "#1b1d20",
    "#5b626b",
    ("#0067a5", "#c94f00", "#00835f", "#b0417f", "#8a6d00", "#6a4fb3", "#2c9ecf", "#6f6f6f"),
)
_FILE_COLOURS = {
    figures.INK: LIGHT.ink,
    figures.MUTED: LIGHT.muted,
    figures.GRID: "#e6e4de",
    "none": "#ffffff",
}

Draw = Callable[[Sheet, Palette], None]


class Plate(NamedTuple):
    """One figure: name, how it is drawn, its words, and its heights in inches."""

    name: str
    draw: Draw
    caption: str
    alt: str
    height: float
    narrow_height: float

    def inline(self) -> Markup:
        """As an element of the page."""
        return figures.figure(
            f"figure-{self.name}",
            partial(_on_page, self.draw),
            caption=self.caption,
            alt=self.alt,
            height=self.height,
            narrow_height=self.narrow_height,
        )

    def save(self, folder: Path) -> list[Path]:
        """As NAME.png and NAME.svg."""
        settings: dict[Any, Any] = {
            k: _FILE_COLOURS.get(v, v) if isinstance(v, str) else v for k, v in figures._SETTINGS.items()
        }
        with matplotlib.rc_context({**settings, "svg.hashsalt": self.name, "svg.fonttype": "path"}):
            drawing = Figure(figsize=(figures.WIDTHS["wide"], self.height), layout="constrained")
            FigureCanvasAgg(drawing)
            self.draw(Sheet(drawing, narrow=False), LIGHT)
            drawing.savefig(folder / f"{self.name}.png", dpi=120, metadata={"Software": None})
            drawing.savefig(folder / f"{self.name}.svg", metadata={"Date": None, "Creator": None})
        return [folder / f"{self.name}.png", folder / f"{self.name}.svg"]


def _on_page(draw: Draw, sheet: Sheet) -> None:
    draw(sheet, PAGE)


def plates(analysis: Analysis) -> list[Plate]:
    """The figures that an analysis gives: four of a pair of models, one of a base model alone."""
    roles = _largest_roles(analysis)
    rows = math.ceil(len(roles) / 3)
    tall, narrow = 1.0 + 2.0 * rows, 0.9 + 2.1 * len(roles)
    left_out = len(analysis.roles()) - len(roles)
    some = f" The {MOST_ROLES} roles with the largest updates; {left_out} more are in the data." if left_out > 0 else ""
    spectra = Plate(
        "spectra",
        partial(_draw_spectra, roles=roles),
        "Singular values by their place: median over a role's layers, band from the smallest to the largest." + some,
        "Singular value spectra of base weights and updates, one panel a role.",
        tall,
        narrow,
    )
    if not analysis.paired:
        return [spectra]
    depth = len({layer.index for layer in analysis.layers})
    return [
        Plate(
            "energy",
            partial(_draw_energy, roles=roles),
            "Share of the update's energy held by r directions. Above the dotted line r/n, the column space holds more than "
            "one chosen by chance; the update's own best directions are what Theorem 1 compares with." + some,
            "Captured energy against rank for column space, row space, minor space, a random space and the optimum.",
            tall,
            narrow,
        ),
        Plate(
            "angles",
            partial(_draw_angles, analysis=analysis),
            "Mean principal angle, in degrees, between the top-r column spaces of the base and of the fine-tuned weight.",
            "Heat map of principal angles by layer and role.",
            max(2.4, 1.5 + 0.18 * depth),
            max(2.4, 1.8 + 0.18 * depth),
        ),
        Plate(
            "perturbations",
            partial(_draw_entries, analysis=analysis),
            "First: entries of E_P and E_Q off the diagonal (Figure 2 of the paper), beside those of two weights that have "
            "nothing to do with each other. Second: how far each singular direction has stayed itself; unrelated weights "
            "give nearly 0.",
            "Histograms of the entries of the perturbations and of the cosines between corresponding singular vectors.",
            3.6,
            6.6,
        ),
        spectra,
    ]


def _largest_roles(analysis: Analysis) -> dict[str, list[Layer]]:
    roles = analysis.roles()
    if analysis.paired:
        roles = {role: changed for role, layers in roles.items() if (changed := [la for la in layers if la.changed])}
    names = short_names(list(roles))
    energy = {role: sum(u["energy"] for _, u in iterate_updates(layers)) for role, layers in roles.items()}
    kept = sorted(roles, key=lambda role: -energy[role])[:MOST_ROLES]
    return {names[role]: layers for role, layers in roles.items() if role in kept}


def _panels(sheet: Sheet, count: int) -> list[Any]:
    columns = 1 if sheet.narrow else min(3, count)
    rows = math.ceil(count / columns)
    axes = list(sheet.figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.set_axis_off()
    return axes[:count]


def _draw_energy(sheet: Sheet, palette: Palette, *, roles: dict[str, list[Layer]]) -> None:
    kinds = (
        ("best", "the update's own best", palette.ink, "-"),
        ("column", "column space (PiCa)", palette.series[0], "-"),
        ("row", "row space", palette.series[1], (0, (5, 2))),
        ("minor", "minor space", palette.series[2], (0, (6, 2, 1, 2))),
        ("random", "random space", palette.series[7], (0, (1, 1.3))),
    )
    lines = []
    axes = _panels(sheet, len(roles))
    for place, (axis, (role, layers)) in enumerate(zip(axes, roles.items())):
        most = min(len(layers[0].base), layers[0].inn)
        lines = []
        for kind, label, colour, dash in kinds:
            values = curve(layers, kind)[:most].tolist()
            lines += axis.plot(
                range(len(values) + 1), [0.0, *values], color=colour, linestyle=dash, linewidth=1.6, label=label
            )
        lines += axis.plot(
            [0, most], [0, most / layers[0].inn], color=palette.muted, linestyle=":", linewidth=1.0, label="chance, r/n"
        )
        axis.set_title(f"{role} ({layers[0].out}×{layers[0].inn})", fontsize=9)
        axis.set_ylim(0, 1.02)
        axis.set_xlim(0, most)
        axis.locator_params(axis="x", nbins=4)
        _label(axis, place, len(axes), sheet.narrow, "r", "share of energy")
    sheet.figure.legend(handles=lines, loc="outside lower center", ncols=2 if sheet.narrow else 3, fontsize=8)


def _label(axis: Any, place: int, count: int, narrow: bool, x: str, y: str) -> None:
    columns = 1 if narrow else min(3, count)
    if place >= count - columns:
        axis.set_xlabel(x)
    if place % columns == 0:
        axis.set_ylabel(y)


def _draw_angles(sheet: Sheet, palette: Palette, *, analysis: Analysis) -> None:
    found = list(iterate_updates(analysis.layers))
    names = short_names(list(dict.fromkeys(layer.role for layer, _ in found)))
    roles = list(names)
    indices = sorted({layer.index for layer, _ in found}, key=lambda i: -1 if i is None else i)
    grid = np.full((len(indices), len(roles)), np.nan)
    for layer, update in found:
        grid[indices.index(layer.index), roles.index(layer.role)] = update["angle_mean"]["in"]
    axis = sheet.figure.subplots()
    axis.grid(False)
    mesh = axis.pcolormesh(np.ma.masked_invalid(grid), cmap="viridis", vmin=0, edgecolors="face", linewidth=0.3)
    axis.invert_yaxis()
    axis.set_xticks(
        [i + 0.5 for i in range(len(roles))], [names[r] for r in roles], rotation=30, ha="right", fontsize=8
    )
    shown = range(0, len(indices), max(1, len(indices) // 15))
    axis.set_yticks([i + 0.5 for i in shown], ["–" if indices[i] is None else str(indices[i]) for i in shown])
    axis.set_ylabel("layer")
    if len(indices) <= 12 and not sheet.narrow:
        middle = float(np.nanmax(grid)) / 2
        for (row, column), value in np.ndenumerate(grid):
            if not math.isnan(value):
                colour = "#ffffff" if value < middle else "#000000"
                axis.text(column + 0.5, row + 0.5, f"{value:.2g}", ha="center", va="center", fontsize=8, color=colour)
    bar = sheet.figure.colorbar(mesh, ax=axis, label="degrees")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def _draw_entries(sheet: Sheet, palette: Palette, *, analysis: Analysis) -> None:
    left, right = sheet.figure.subplots(2, 1) if sheet.narrow else sheet.figure.subplots(1, 2)
    edges = np.linspace(-1, 1, HISTOGRAM_BINS + 1)
    expected, total = np.zeros(HISTOGRAM_BINS), 0
    sides = (("in", "E_P (input side)", palette.series[0], "-"), ("out", "E_Q (output side)", palette.series[1], "--"))
    for side, label, colour, dash in sides:
        counts, stayed, weights = np.zeros(HISTOGRAM_BINS), [], []
        for layer, update in iterate_updates(analysis.layers):
            entries = update["entries"][side]
            counts += np.asarray(entries["histogram"])
            deviation = 1 / math.sqrt(layer.inn if side == "in" else layer.out)
            cumulative = np.asarray([0.5 * math.erfc(-edge / deviation / math.sqrt(2)) for edge in edges])
            off = len(entries["diagonal"]) * (len(entries["diagonal"]) - 1)
            expected += off * np.diff(cumulative)
            total += off
            stayed += [min(1.0, abs(value)) for value in entries["diagonal"]]
            weights += [100 / len(entries["diagonal"])] * len(entries["diagonal"])
        left.stairs(counts / counts.sum(), edges, color=colour, linestyle=dash, linewidth=1.4, label=label)
        layers = sum(1 for _ in iterate_updates(analysis.layers))
        bins = np.linspace(0, 1, 21)
        heights, _ = np.histogram(stayed, bins, weights=np.asarray(weights) / layers)
        right.stairs(heights, bins, color=colour, linestyle=dash, linewidth=1.6, label=label)
    left.stairs(expected / total, edges, color=palette.muted, linestyle=":", linewidth=1.4, label="unrelated weights")
    left.set_yscale("log")
    left.yaxis.set_major_formatter(quantity)
    left.set_ylim(1e-7, 2)
    left.set_xticks([-1, -0.5, 0, 0.5, 1])
    left.set_xlabel("entry off the diagonal")
    left.set_ylabel("share of entries, log")
    left.legend(fontsize=8, loc="upper right")
    right.set_xlabel("|cosine| of a direction before and after")
    right.set_ylabel("% of directions")
    right.legend(fontsize=8, loc="upper left")


def _draw_spectra(sheet: Sheet, palette: Palette, *, roles: dict[str, list[Layer]]) -> None:
    lines: list[Any] = []
    axes = _panels(sheet, len(roles))
    for place, (axis, (role, layers)) in enumerate(zip(axes, roles.items())):
        groups: list[tuple[list[list[float]], str, str, Any]] = [
            ([layer.base for layer in layers], "base weight", palette.series[0], "-")
        ]
        updates = [update["values"] for _, update in iterate_updates(layers)]
        if updates:
            groups.append((updates, "update", palette.series[1], (0, (5, 2))))
        lines = []
        for spectra, label, colour, dash in groups:
            k = min(map(len, spectra))
            stacked = np.asarray([values[:k] for values in spectra])
            stacked = np.where(stacked > 0, stacked, np.nan)
            places = np.arange(1, k + 1)
            lines += axis.plot(
                places, np.nanmedian(stacked, axis=0), color=colour, linestyle=dash, linewidth=1.6, label=label
            )
            low, high = np.nanmin(stacked, axis=0), np.nanmax(stacked, axis=0)
            axis.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
        log_axis(axis.yaxis)
        axis.set_title(f"{role} ({layers[0].out}×{layers[0].inn})", fontsize=9)
        axis.locator_params(axis="x", nbins=4)
        _label(axis, place, len(axes), sheet.narrow, "place", "singular value")
    sheet.figure.legend(handles=lines, loc="outside lower center", ncols=2, fontsize=8)
