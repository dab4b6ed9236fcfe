"""The page of several sets of VTAB-1K: the groups' means, and every set."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pica.experiments.uncertainty import standing
from pica.files.output import write_text
from pica.report import page as html
from pica.report.comparison_figures import Drawn, Looks, legend, metric_axis, side_by_side
from pica.report.figures import MUTED, Sheet, figure, quantity
from pica.report.page import Cell, Column, Page
from pica.report.summary import shown_mean
from pica.report.vtab import WHAT, VtabMethod, columns_of, flat_vtab, overall_standing
from pica.tasks.vtab import GROUPS, VtabTask


def write_vtab_page(methods: Sequence[VtabMethod], path: Path) -> None:
    """Write the page of what `pica.report.vtab.read_vtab` has found.

    Raises:
        OutputError: The file can't be written.
    """
    write_text(path, vtab_page(methods))


def vtab_page(methods: Sequence[VtabMethod]) -> str:
    """The whole page."""
    there = [name for name in VtabTask.subsets if any(name in method.stats for method in methods)]
    looks = Looks(methods)
    made = Page(
        "VTAB-1K",
        lead="Top-1 accuracy on the sets of VTAB-1K and the means of its groups.",
        facts={"Methods": len(methods), "Sets": f"{len(there)} of {len(VtabTask.subsets)}"},
    )
    made.section("Groups", *_groups(methods, looks))
    made.section("Sets", *_sets(methods, there, looks))
    made.section("How the means are made", html.bullets(_rules()))
    made.download("vtab.csv", html.csv_text(flat_vtab(methods), columns_of(methods)), kind="text/csv")
    return made.html()


def _groups(methods: Sequence[VtabMethod], looks: Looks) -> list[Markup | str]:
    blocks: list[Markup | str] = []
    means = list(methods[0].means)
    whole = [mean for mean in means if any(method.means[mean] is not None for method in methods)]
    lacking = {
        group: sorted(sets.keys() - _measured_by_all(methods))
        for group, sets in GROUPS.items()
        if not sets.keys() <= _measured_by_all(methods)
    }
    found = overall_standing(methods)
    if found:
        blocks.append(found.statement(WHAT))
    if lacking:
        listed = "; ".join(f"{group}: {', '.join(sets)}" for group, sets in lacking.items())
        blocks.append(
            html.notice(
                f"Not every method has been measured on every set. A mean is only shown where all its sets are there. "
                f"Missing with at least one method: {listed}.",
                "warning",
            )
        )
    if whole:
        blocks.append(_groups_figure(methods, whole, looks))
    columns = [
        Column("method", "method", numeric=False),
        Column(
            "parameters",
            "trained parameters",
            help="Of the method; the new classification head is not counted.",
            lower_first=True,
        ),
        Column("sets", "sets"),
        *(Column(mean, mean, help=_help(mean)) for mean in means),
    ]
    lines: list[dict[str, Any]] = [
        {
            "method": method.label,
            "parameters": method.parameters,
            "sets": len(method.stats),
            **{name: _share(mean) for name, mean in method.means.items()},
        }
        for method in methods
    ]
    marked = [place for place, method in enumerate(methods) if found and found.place(method.label)]
    caption = "Means over sets. Select a heading to sort."
    if marked:
        caption += " The highest mean of all sets, and those not told apart from it, stand out."
    blocks.append(html.table(columns, lines, caption=caption, marked=marked))
    return blocks


def _measured_by_all(methods: Sequence[VtabMethod]) -> set[str]:
    return set.intersection(*(set(method.stats) for method in methods))


def _groups_figure(methods: Sequence[VtabMethod], means: Sequence[str], looks: Looks) -> Markup:
    """One small panel a mean, the methods below each other in the same order."""
    names = [
        method.label + ("" if method.parameters is None else f" ({quantity(method.parameters)})") for method in methods
    ]

    def draw(sheet: Sheet) -> None:
        shape = (len(means), 1) if sheet.narrow else (1, len(means))
        panels = sheet.figure.subplots(*shape, squeeze=False, sharey=True).ravel()
        for panel, mean in zip(panels, means):
            for place, method in enumerate(methods):
                value = method.means[mean]
                if value is not None:
                    below, above = method.reaches()[mean]
                    if math.isfinite(below + above):
                        ends = [value - below, value + above]
                        panel.plot(ends, [-place, -place], color=looks.color(method.label), linewidth=1.3, zorder=1.5)
                    point = panel.plot([value], [-place], linestyle="none", **looks.marker(method.label))[0]
                    sheet.tip(point, f"{method.label}, {mean}: {value:.1%}")
            panel.set_title(mean)
            panel.set_ylim(-len(methods) + 0.4, 0.6)
            panel.margins(x=0.15)
            panel.xaxis.set_major_locator(MaxNLocator(5 if sheet.narrow else 2))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
            if sheet.narrow:
                panel.set_yticks([])
            else:
                panel.set_yticks([-place for place in range(len(methods))], names, fontsize=8)
        if sheet.narrow:
            legend(sheet, methods, looks)

    return figure(
        "groups-plot",
        draw,
        caption="Mean top-1 accuracy of each group of sets; every panel has an axis of its own. Lines are 95% intervals of "
        "test problems and seeds, where they are known. In brackets the trained parameters.",
        alt=f"Group means of {len(methods)} methods; the numbers are in the table.",
        height=1.0 + 0.28 * len(methods),
        narrow_height=(0.9 + 0.17 * len(methods)) * len(means) + 0.12 * len(methods) + 0.4,
    )


def _sets(methods: Sequence[VtabMethod], there: Sequence[str], looks: Looks) -> list[Markup | str]:
    columns = [Column("set", "set", numeric=False), Column("group", "group", numeric=False)]
    columns += [Column(f"method {index}", method.label) for index, method in enumerate(methods)]
    lines: list[dict[str, Any]] = []
    for group, sets in GROUPS.items():
        for name in (name for name in sets if name in there):
            line: dict[str, Any] = {"set": name, "group": group}
            held = standing("accuracy", [one.contenders[name] for one in methods if name in one.contenders])
            for index, method in enumerate(methods):
                if stat := method.stats.get(name):
                    text = shown_mean("accuracy", stat)
                    top = held is not None and bool(held.place(method.label))
                    line[f"method {index}"] = Cell(Markup("<b>{}</b>").format(text) if top else text, stat.mean)
            lines.append(line)
    seeds = any(stat.deviation is not None for method in methods for stat in method.stats.values())
    caption = "Top-1 accuracy on each set" + (", mean ± standard deviation over seeds." if seeds else ", one seed.")
    caption += " Bold: the highest of a set, and those not told apart from it."
    return [_sets_figure(methods, there, looks), html.table(columns, lines, caption=caption)]


def _sets_figure(methods: Sequence[VtabMethod], there: Sequence[str], looks: Looks) -> Markup:
    """One line a set, grouped, a marker for each method."""
    groups = [(group, [name for name in sets if name in there]) for group, sets in GROUPS.items()]
    groups = [(group, sets) for group, sets in groups if sets]

    def draw(sheet: Sheet) -> None:
        heights = [len(sets) + 0.6 for _, sets in groups]
        places: list[tuple[Any, list[Drawn]]] = []
        panels = sheet.figure.subplots(len(groups), 1, squeeze=False, sharex=True, height_ratios=heights).ravel()
        for panel, (group, sets) in zip(panels, groups):
            drawn: list[Drawn] = []
            for place, name in enumerate(reversed(sets)):
                found = {method.label: method.stats[name] for method in methods if name in method.stats}
                values = [stat.mean for stat in found.values()]
                panel.plot([min(values), max(values)], [place, place], color=MUTED, linewidth=0.8, zorder=1)
                for label, stat in found.items():
                    point = panel.plot([stat.mean], [place], linestyle="none", markersize=6, **looks.marker(label))[0]
                    sheet.tip(point, f"{name}, {label}: {shown_mean('accuracy', stat)}")
                    drawn.append((stat.mean, place, [point]))
            panel.set_yticks(range(len(sets)), list(reversed(sets)), fontsize=8)
            panel.set_ylim(-0.6, len(sets) - 0.4)
            panel.set_title(group)
            places.append((panel, drawn))
        metric_axis(panels[-1], "accuracy", axis="x")
        panels[-1].set_xlabel("top-1 accuracy")
        for panel, drawn in places:  # the axis that they share is settled now
            side_by_side(panel, drawn, vertical=True)
        legend(sheet, methods, looks)

    rows = len(methods)
    return figure(
        "sets-plot",
        draw,
        caption="Top-1 accuracy of every method on every set; lines join the lowest and the highest.",
        alt=f"Accuracy of {rows} methods on {len(there)} sets; the numbers are in the table below.",
        height=0.6 * len(groups) + 0.27 * len(there) + 0.06 * rows + 0.6,
        narrow_height=0.6 * len(groups) + 0.27 * len(there) + 0.12 * rows + 0.6,
    )


def _share(mean: float | None) -> Cell | None:
    return None if mean is None else Cell(f"{mean:.1%}", mean)


def _help(mean: str) -> str:
    explained: Mapping[str, str] = {
        "all sets": "Each of the nineteen sets counts the same.",
        "all groups": "Each of the three groups counts the same.",
    }
    return explained.get(mean) or f"Mean of {', '.join(GROUPS[mean])}."


def _rules() -> list[str]:
    return [
        "A group's mean counts each of its sets the same; it is left empty where a set is missing, never a mean of what is "
        "there.",
        "Papers call either of two means the overall score: that of all nineteen sets, or that of the three groups' means. "
        "Both are shown.",
        "Each set's own page or folder says how learning rates were chosen there. Of a comparison the mean over its seeds "
        "counts.",
    ]
