"""The page of a run that is under way, written anew as it goes on, and looked at again by the browser that shows it."""

from collections.abc import Sequence

from pica.experiments.recipes.parsing import dump_recipe
from pica.experiments.train.progress import Progress
from pica.files.output import RESOLVED, write_text
from pica.report import page as html
from pica.report.curves import loss_figure
from pica.report.page import Column, Page
from pica.report.run_page import PAGE

_REFRESH = 5  # seconds
_NEWEST = 6  # samples that are shown at once, the others on a click


def write_live_page(progress: Progress, doing: str, said: Sequence[str], *, ended: bool = False) -> None:
    """Write report.html into the run's folder, whole or not at all.

    Args:
        progress: What there is to show.
        doing: What goes on, or why nothing does.
        said: Notes of the run so far.
        ended: Whether nothing more will come.

    Raises:
        OutputError: It can't be written.
    """
    recipe = progress.recipe
    learns = progress.titles["adapter"]
    state = "stopped before it was complete" if ended else "under way; this page is written anew as it goes on"
    made = Page(
        recipe.name,
        lead=f"{recipe.model.path} learns {recipe.task.name} with {learns}: {state}.",
        facts={"Model": recipe.model.path, "Task": recipe.task.name, "Method": learns, "Seed": recipe.trainer.seed},
        refresh=None if ended else _REFRESH,
    )
    notes = [html.details("What was said so far", html.preformatted("\n".join(said)))] if said else []
    made.section("Now", html.notice(doing, "warning") if ended else html.paragraph(doing), *notes)
    rows = [{name: "" if value is None else str(value) for name, value in point.items()} for point in progress.curve]
    if rows:
        made.section(
            "Loss", loss_figure(rows, progress.titles, caption="Training loss, the mean since the point before.")
        )
    if progress.samples:
        made.section("Answers so far", *_samples(progress))
    text = dump_recipe(recipe)
    made.section("Recipe", html.details("Every setting", html.preformatted(text)))
    made.download(RESOLVED, text, kind="text/yaml")
    write_text(progress.folder / PAGE, made.html())


def _samples(progress: Progress) -> list[html.Markup]:
    """The newest answers first."""
    several = len({row["run"] for row in progress.samples}) > 1
    columns = [
        Column("step", "step", numeric=False),
        *([Column("run", "training", numeric=False)] if several else []),
        Column("prompt", "question", numeric=False, wraps=True),
        Column("answer", "answer", numeric=False, wraps=True),
    ]
    last = progress.samples[-1]
    newest = [row for row in progress.samples[-_NEWEST:] if (row["run"], row["step"]) == (last["run"], last["step"])]
    tables = [html.table(columns, newest, caption="The newest answers.", sortable=False)]
    if older := progress.samples[: -len(newest)]:
        listed = html.table(columns, older[::-1], caption="Earlier ones, the last first.", sortable=False)
        tables.append(html.details(f"{len(older):,} earlier answers", listed))
    return tables
