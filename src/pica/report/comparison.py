"""The page of a comparison: plots, tables and recipes from the records of its cells."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pica.experiments.results.comparison import COMPARISON, INDEX, NUMBERS, CellEntry, DoneCell, FailedCell
from pica.experiments.results.documents import result_document, to_document
from pica.experiments.results.run import Candidate
from pica.experiments.uncertainty import listed, shown, shown_interval
from pica.files.output import json_text, write_text
from pica.report import page as html
from pica.report.comparison_figures import Looks, ablation_figure, against_figure, curves_figure, rates_figure
from pica.report.page import Cell, Column, Page
from pica.report.summary import (
    WITHOUT_TRAINING,
    RowSummary,
    Summary,
    result_of,
    shown_mean,
    shown_row,
    summarise,
)
from pica.text import in_words

PAGE, TABLE = "report.html", "results.csv"


def write_report(folder: Path, *, page: Path | None = None) -> Summary:
    """Write report.html, results.csv and results.json of a comparison from what its folder holds.

    Args:
        folder: Output folder of `pica compare`.
        page: Where the page goes; report.html in the folder if None.
    Returns:
        What the report says.
    Raises:
        ConfigError: The folder is no such folder, or holds no finished cell.
        OutputError: A file can't be written.
    """
    summary = summarise(folder)
    result = result_of(summary)
    rows = [to_document(row) for row in result.rows]
    csv = html.csv_text(rows, list(max(rows, key=len)))
    numbers = json_text(result_document(result), indent=2) + "\n"
    write_text(folder / TABLE, csv)
    write_text(folder / NUMBERS, numbers)
    write_text(page or folder / PAGE, comparison_page(summary, csv, numbers))
    return summary


def comparison_page(summary: Summary, csv: str, numbers: str) -> str:
    """The whole page; `csv` and `numbers` are offered as downloads."""
    rows = [row for row in summary.rows if row.done]
    looks = Looks(rows)
    made = Page(summary.title, lead=summary.description, facts=_facts(summary, rows))
    made.section("Result, one seed" if summary.one_seed else "Result", *_result(summary, rows, looks))
    if rows:
        made.section("Cost", *_costs(summary, rows, looks))
        if groups := _ablations(summary, rows, looks):
            made.section("Ablations", *groups)
        made.section("Learning rates", *_rates(summary, rows, looks))
        made.section("Loss curves", curves_figure(rows, looks))
    if sets := _sets(rows):
        made.section("Sets", sets)
    made.section("Table", *_table(summary))
    made.section("Recipes", *_recipes(summary))
    made.section("How this was measured", *_protocol(summary, rows))
    made.download(TABLE, csv, kind="text/csv")
    made.download(NUMBERS, numbers, kind="application/json")
    cells = [dict(vars(record)) for record in summary.records]
    for cell in cells:
        cell.pop("recipe_yaml", None)
    made.download(INDEX, json_text(to_document(cells), indent=1), kind="application/json")
    made.download(COMPARISON, summary.text, kind="text/yaml")
    return made.html()


def _facts(summary: Summary, rows: Sequence[RowSummary]) -> dict[str, object]:
    base = summary.content.get("base") or {}
    model = str((base.get("model") or {}).get("path", "embedded"))
    failed = sum(len(row.failures) for row in summary.rows)
    done = sum(len(row.done) for row in rows)
    facts: dict[str, object] = {
        "Model": Path(model).name,
        "Task": (base.get("task") or {}).get("name", "arithmetic"),
        "Methods": len(summary.rows),
        "Seeds": ", ".join(map(str, summary.content["seeds"])),
        "Cells": f"{done} done" + (f", {failed} failed" if failed else ""),
    }
    if rows:
        problems = vars(rows[0].done[0].problems)
        facts["Problems"] = ", ".join(f"{count:,} {name}" for name, count in problems.items())
    return facts


def _result(summary: Summary, rows: Sequence[RowSummary], looks: Looks) -> list[Markup | str]:
    blocks: list[Markup | str] = []
    if not rows:
        return [
            html.notice("No cell has finished, so there is nothing to show; the reasons are in the table.", "warning")
        ]
    fewest = min(row.parameters for row in rows)
    smallest = listed([row.label for row in rows if row.parameters == fewest])
    reached = listed([shown_row(summary.metric, row) for row in rows if row.parameters == fewest])
    text = f"Fewest trained parameters: {smallest}, {fewest:,}, at {reached}."
    if summary.base is not None:
        text += f" The model without training: {shown(summary.metric, summary.base.score)}."
    if summary.standing:
        blocks.append(summary.standing.statement())
        if len(rows) > 1 and summary.standing.place(WITHOUT_TRAINING):
            blocks.append(html.notice("The best method is not told apart from the model without training.", "warning"))
    blocks.append(text)
    if any(row.failures for row in summary.rows):
        names = listed([row.label for row in summary.rows if row.failures])
        blocks.append(html.notice(f"Cells failed: {names}. The reasons are below the table.", "warning"))
    if missing := [row.label for row in summary.rows if not row.done and not row.failures]:
        blocks.append(html.notice(f"Not run yet: {listed(missing)}.", "warning"))
    blocks.append(
        against_figure(
            "parameters",
            rows,
            looks,
            summary.metric,
            [("trained parameters", lambda row: row.parameters)],
            caption=f"{in_words(summary.metric).capitalize()} on the test problems against the number of trained "
            f"parameters. Bars are {_bars(summary)}. Up and to the left is better. Markers that would hide each other stand "
            "side by side.",
        )
    )
    return blocks


def _bars(summary: Summary) -> str:
    """What the bars of a score are."""
    return f"95% intervals of the test problems{', one seed' if summary.one_seed else ' and seeds'}"


def _costs(summary: Summary, rows: Sequence[RowSummary], looks: Looks) -> list[Markup | str]:
    axes: list[tuple[str, Callable[[RowSummary], float]]] = [
        ("seconds of one training", lambda row: row.seconds.mean),
        ("peak memory, MiB", lambda row: row.memory.mean),
        ("adapter file, bytes", lambda row: float(row.file_bytes)),
    ]
    caption = (
        f"{in_words(summary.metric).capitalize()} against what it costs; bars are {_bars(summary)}. Time and memory "
        "depend on the machine; see the end."
    )
    return [against_figure("costs", rows, looks, summary.metric, axes, caption=caption)]


def _ablations(summary: Summary, rows: Sequence[RowSummary], looks: Looks) -> list[Markup | str]:
    known = {row.label: row for row in rows}
    blocks: list[Markup | str] = []
    groups = []
    for group in summary.content.get("ablations") or []:
        members = [known[label] for label in group["methods"] if label in known]
        if len(members) > 1:
            groups.append((group["title"], members))
            lines = [
                f"{row.label}: {shown_row(summary.metric, row)}, loss {row.loss.mean:.4f}, "
                f"{row.parameters:,} parameters"
                for row in members
            ]
            blocks += [
                Markup("<h3>{}</h3>").format(group["title"]),
                str(group.get("question") or ""),
                html.bullets(lines),
            ]
    if groups:
        blocks.insert(0, ablation_figure(groups, looks, summary.metric))
    return blocks


def _rates(summary: Summary, rows: Sequence[RowSummary], looks: Looks) -> list[Markup | str]:
    blocks: list[Markup | str] = [
        "Each method's rate is the best of its grid on the validation problems, with the first seed: by the task's "
        "metric where that costs no more than the loss (classification), else by the loss. The test problems choose nothing."
    ]
    for edge, direction in (("highest", "higher"), ("lowest", "lower")):
        if names := [f"{row.label} ({row.rate:g})" for row in rows if row.edge == edge]:
            text = f"The best rate is the {edge} of its grid, so that a {direction} one may do better: {listed(names)}."
            blocks.append(html.notice(text, "warning"))
    blocks.append(rates_figure(rows, looks))
    lines = []
    for row in rows:
        for candidate in row.candidates:
            trained = isinstance(candidate, Candidate)
            chosen = "chosen" if candidate.learning_rate == row.rate else ""
            lines.append(
                {
                    "label": row.label,
                    "rate": Cell(f"{candidate.learning_rate:g}", candidate.learning_rate),
                    "loss": candidate.validation_loss if trained else None,
                    "score": candidate.validation_score if trained else None,
                    "chosen": chosen if trained else candidate.failed,
                }
            )
    columns = [
        Column("label", "method", numeric=False),
        Column("rate", "learning rate", lower_first=True),
        Column("loss", "validation loss", lower_first=True),
        Column("score", f"validation {in_words(summary.metric)}"),
        Column("chosen", "", numeric=False),
    ]
    if all(line["score"] is None for line in lines):
        columns = [column for column in columns if column.key != "score"]
    columns[-1] = Column("chosen", "outcome", numeric=False)
    blocks.append(
        html.details("All rates tried", html.table(columns, lines, caption="Every learning rate that was tried."))
    )
    return blocks


def _sets(rows: Sequence[RowSummary]) -> Markup | None:
    """Each method on each of several test sets."""
    names = list(dict.fromkeys(name for row in rows for name in row.sets))
    if not names:
        return None
    columns = [Column("label", "method", numeric=False), *(Column(f"set {name}", name) for name in names)]
    lines: list[dict[str, Any]] = [
        {"label": row.label}
        | {f"set {name}": Cell(shown_mean("accuracy", stat), stat.mean) for name, stat in row.sets.items()}
        for row in rows
    ]
    caption = "Mean ± standard deviation over seeds of the accuracy on each test set; each counts the same."
    return html.table(columns, lines, caption=caption)


def _table(summary: Summary) -> list[Markup | str]:
    columns = [
        Column("label", "method", numeric=False),
        Column("place", "best", help="The highest score, and those not told apart from it.", numeric=False),
        Column("score", in_words(summary.metric), help="Mean ± standard deviation over seeds, on the test problems."),
        Column("interval", "95% interval", help="Of the score, over test problems and seeds; Wilson's for a share."),
        Column("loss", "test loss", help="Mean over seeds; lower is better.", lower_first=True),
        Column(
            "parameters",
            "trained parameters",
            help="Of the method; a new classification head is not counted.",
            lower_first=True,
        ),
        Column("rate", "learning rate", help="* best rate at the edge of its grid.", lower_first=True),
        Column("seconds", "seconds a training", lower_first=True),
        Column("step", "ms a step", help="Median over the steps.", lower_first=True),
        Column("memory", "peak MiB", lower_first=True),
        Column(
            "bytes",
            "adapter bytes",
            help="The saved file, with a classification head if there is one.",
            lower_first=True,
        ),
        Column("seeds", "seeds"),
    ]
    marked = []
    lines: list[dict[str, Any]] = []
    for row in summary.rows:
        if not row.done:
            lines.append({"label": row.label, "score": Cell("failed" if row.failures else "not run"), "seeds": 0})
            continue
        place = summary.standing.place(row.label) if summary.standing else ""
        marked += [len(lines)] * bool(place)
        lines.append(
            {
                "label": row.label,
                "place": place,
                "score": Cell(shown_mean(summary.metric, row.score), row.score.mean),
                "interval": Cell(shown_interval(summary.metric, row.interval), row.interval[0]),
                "loss": Cell(f"{row.loss.mean:.4f}", row.loss.mean),
                "parameters": row.parameters,
                "rate": Cell(f"{row.rate:g}" + ("*" if row.edge else ""), row.rate),
                "seconds": Cell(f"{row.seconds.mean:.1f}", row.seconds.mean),
                "step": None if math.isnan(row.step) else Cell(f"{1000 * row.step:.1f}", row.step),
                "memory": Cell(f"{row.memory.mean:,.0f}", row.memory.mean),
                "bytes": row.file_bytes,
                "seeds": Cell(
                    f"{len(row.done)}" + (f" of {len(row.done) + len(row.failures)}" if row.failures else ""),
                    len(row.done),
                ),
            }
        )
    blocks: list[Markup | str] = [
        html.table(
            columns,
            lines,
            caption="The best method and those not told apart from it stand out. Select a heading to sort. "
            "* best rate at the edge of its grid.",
            marked=marked,
        )
    ]
    failures = [
        Markup("<strong>{}</strong>: {}").format(row.label, html.inline(reason))
        for row in summary.rows
        for reason in _distinct(row)
    ]
    if failures:
        blocks += [Markup("<h3>Failed cells</h3>"), html.bullets(failures)]
    return blocks


def _distinct(row: RowSummary) -> list[str]:
    return list(dict.fromkeys(row.failures))


def _recipes(summary: Summary) -> list[Markup | str]:
    blocks: list[Markup | str] = [
        "The complete recipe of every cell. Saved as a file, each is what `pica train` takes; the first seed's has the "
        "grid of learning rates, the others' the chosen one."
    ]
    for record in summary.records:
        if isinstance(record, CellEntry):
            continue
        state = "" if isinstance(record, DoneCell) else ", failed"
        body: list[Markup | str] = [html.preformatted(record.recipe_yaml)]
        if isinstance(record, FailedCell) and record.log:
            body.append(html.preformatted(record.log))
        blocks.append(html.details(f"{record.label}, seed {record.seed}{state}", *body))
    return blocks


def _protocol(summary: Summary, rows: Sequence[RowSummary]) -> list[Markup | str]:
    workers = summary.workers
    gpu = bool(rows and "gpu" in rows[0].done[0].result.training.peak_memory)
    memory = (
        "the highest use of PyTorch's GPU allocator during training"
        if gpu
        else "the highest resident memory of the cell's own process during training, libraries and model included; of seeds "
        "whose process trained once, where there are any"
    )
    lines = [
        "Same data, same order of the data for the same seed, same number of steps and same evaluation for every method.",
        "The first seed tries each learning rate of a method's grid and keeps the best on the validation problems; the "
        "other seeds take that rate. Test problems are looked at once, with the chosen rate.",
        "Mean and standard deviation (n - 1) are over seeds. They say nothing about the choice of test problems; the 95% "
        "intervals hold both.",
        "Which methods tie with the best is decided by 95% intervals of the differences: where the outcome of each test "
        "problem was kept, by a paired bootstrap over problems and common seeds, else by both methods' own intervals. Each "
        "method is held against the best alone; among twenty that are alike, one may be found behind by chance.",
        f"Each cell ran in a process of its own, {'one' if workers == 1 else workers} at a time"
        + (
            "; cells that run together slow each other down, so times are comparable only roughly."
            if workers > 1
            else "."
        ),
        f"Peak memory is {memory}.",
        "Seconds are those of the optimizer steps of the chosen rate's training, without loading and evaluation "
        "(the processor's, where a cell has one thread and no accelerator).",
        "Full fine-tuning trains all weights of the target modules, not embeddings or norms. Its frozen originals stay in "
        "memory, which makes its memory higher than it need be.",
    ]
    blocks: list[Markup | str] = [html.bullets(lines)]
    if rows:
        machine = rows[0].done[0].machine
        used = ", ".join(machine.accelerators) or f"CPU, {machine.threads} thread(s) a cell"
        versions = ", ".join(f"{name} {version}" for name, version in rows[0].done[0].versions.items())
        blocks.append(f"Machine: {machine.system}; {used}. Versions: {versions}.")
    return blocks


__all__ = ["NUMBERS", "PAGE", "TABLE", "comparison_page", "shown_mean", "write_report"]
