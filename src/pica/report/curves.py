"""Training curves of one run."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

from pica.experiments.results.run import RunMetrics
from pica.report.figures import INK, Sheet, figure, style

HELD_OUT = "validation_loss"
"""The column of loss_curve.csv with the loss on held-out examples, where it was measured while training went on."""
_MEASURES = {
    "reward": (
        "mean reward",
        "Mean reward of the answers that were sampled in training, the mean since the point before.",
    ),
    "reward_accuracy": (
        "reward accuracy",
        "Share of training pairs whose chosen answer has the higher reward, the mean since the point before.",
    ),
}
"""Columns that have a figure of their own, with their axis and caption."""


def run_titles(metrics: RunMetrics, *, base: str) -> dict[str, str]:
    """What adapter and baseline of a run are called, and its `base`, if they were measured; no two alike."""
    titles = {name: trained.title for name, trained in metrics.trained.items()}
    titles = ({"base": base} if metrics.base is not None else {}) | titles
    if titles.get("baseline") == titles.get("adapter"):
        titles |= {name: f"{titles[name]} ({name})" for name in ("adapter", "baseline") if name in titles}
    return titles


def loss_figure(rows: Iterable[Mapping[str, str]], titles: Mapping[str, str], *, caption: str) -> Markup:
    """Draw the losses of loss_curve.csv against steps, a curve for each training; held-out ones with marks.

    Args:
        rows: Of the file.
        titles: What the trained models are called, by `run`.
        caption: Below the figure.
    Returns:
        An HTML `figure`.
    Raises:
        KeyError: A column is missing.
        ValueError: A value is no number.
    """
    trained: dict[str, list[tuple[int, float]]] = {}
    held_out: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        label = _label(row, titles)
        for found, column in ((trained, "loss"), (held_out, HELD_OUT)):
            if value := row.get(column):
                found.setdefault(label, []).append((int(row["step"]), float(value)))

    def draw(sheet: Sheet) -> None:
        panel = sheet.figure.subplots()
        names = list(dict.fromkeys([*trained, *held_out]))
        for index, name in enumerate(names):
            look = style(index)
            if name in trained:
                alone = look.marker if len(trained[name]) == 1 else ""  # one point makes no line
                points = _points(trained[name])
                panel.plot(*points, color=look.color, linestyle=look.linestyle, marker=alone, label=name)
            if name in held_out:
                label = f"{name}, held out"
                panel.plot(*_points(held_out[name]), color=look.color, linestyle=":", marker=look.marker, label=label)
        panel.set_ylim(bottom=0)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if sheet.narrow else 10))
        panel.set_xlabel("optimizer step", color=INK)
        panel.set_ylabel("loss", color=INK)
        panel.legend()

    count = len(trained) + len(held_out)
    alt = f"Loss against optimizer steps, {count} curve{'' if count == 1 else 's'}."
    return figure("loss-plot", draw, caption=caption, alt=alt, height=3.6)


def _label(row: Mapping[str, str], titles: Mapping[str, str]) -> str:
    run = row["run"].removesuffix("-refit")
    again = " (refit)" if "refit" in row["run"] else ""
    return f"{titles.get(run, row['method'])}, rate {float(row['peak_rate']):g}{again}"


def measure_figures(rows: Iterable[Mapping[str, str]], titles: Mapping[str, str]) -> list[Markup]:
    """Draw what was rewarded or preferred as training went on, a figure for each measure of loss_curve.csv that has one.

    Args:
        rows: Of the file.
        titles: What the trained models are called, by `run`.
    Returns:
        HTML `figure` elements, perhaps none.
    Raises:
        KeyError: A column is missing.
        ValueError: A value is no number.
    """
    rows = list(rows)
    return [
        _measure_figure(rows, titles, name, *said) for name, said in _MEASURES.items() if any(map(_has(name), rows))
    ]


def _has(name: str) -> Callable[[Mapping[str, str]], bool]:
    return lambda row: bool(row.get(name))


def _measure_figure(
    rows: Sequence[Mapping[str, str]], titles: Mapping[str, str], name: str, label: str, caption: str
) -> Markup:
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in filter(_has(name), rows):
        curves.setdefault(_label(row, titles), []).append((int(row["step"]), float(row[name])))

    def draw(sheet: Sheet) -> None:
        panel = sheet.figure.subplots()
        for index, (title, points) in enumerate(curves.items()):
            look = style(index)
            alone = look.marker if len(points) == 1 else ""  # one point makes no line
            panel.plot(*_points(points), color=look.color, linestyle=look.linestyle, marker=alone, label=title)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if sheet.narrow else 10))
        panel.set_xlabel("optimizer step", color=INK)
        panel.set_ylabel(label, color=INK)
        panel.legend()

    count = len(curves)
    alt = f"{label.capitalize()} against optimizer steps, {count} curve{'' if count == 1 else 's'}."
    return figure(f"{name}-plot", draw, caption=caption, alt=alt, height=3.2)


def _points(pairs: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in pairs], [loss for _, loss in pairs]
