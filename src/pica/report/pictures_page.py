"""The page of one DreamBooth run: pictures before and after, what was measured, the loss, and the recipe."""

import base64
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from pica.errors import ConfigError
from pica.experiments.results.documents import read_result, result_document
from pica.experiments.results.run import METRICS, RunMetrics, Trained
from pica.experiments.uncertainty import finite
from pica.files.output import RESOLVED, json_text, write_text
from pica.report import page as html
from pica.report.curves import loss_figure, run_titles
from pica.report.page import Column, Page
from pica.report.run_files import read_run

GRID, PAGE = "grid.png", "report.html"
_CAPTION = (
    "Training loss, mean since the point before. It jumps with the noise levels that are drawn; the measurements above are "
    "at fixed ones. With prior preservation it is the sum of two losses."
)
_NAMES = {
    "loss": "denoising loss",
    "r2": "explained share of the target's variance",
    "dino": "DINO",
    "clip_i": "CLIP-I",
    "clip_t": "CLIP-T",
}


def is_picture_run(folder: Path) -> bool:
    """Whether a folder holds a finished run of task dreambooth."""
    try:
        return read_result(RunMetrics, folder / METRICS).task == "dreambooth"
    except (OSError, ValueError):
        return False


def write_picture_page(folder: Path, *, page: Path | None = None) -> Path:
    """Write the page of a finished run from what its folder holds.

    Args:
        folder: Output folder of `pica train`.
        page: Where the page goes; report.html in the folder if None.

    Returns:
        Where it is.

    Raises:
        ConfigError: A file of the run is missing or damaged.
        OutputError: The page can't be written.
    """
    try:
        run = read_run(folder)
        picture = (folder / GRID).read_bytes() if (folder / GRID).is_file() else None
        text = _page(run.metrics, run.recipe, run.curve, picture)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"A file in {str(folder)!r} is missing or damaged ({error}); run pica train again."
        ) from error
    target = page or folder / PAGE
    write_text(target, text)
    return target


def _page(metrics: RunMetrics, recipe: str, curve: list[dict[str, str]], picture: bytes | None) -> str:
    made = Page(
        metrics.name,
        lead="DreamBooth: a text-to-image model before and after it has learnt a subject.",
        facts={
            "Model": metrics.model,
            "Pictures learnt from": metrics.problems.train,
            "Steps": metrics.adapter.training.steps,
            "Seed": metrics.seed,
        },
    )
    if picture is not None:
        data = base64.b64encode(picture).decode("ascii")
        alt = "Drawn pictures in a column for each model, a row for each prompt and noise, the subject above."
        grid = '<figure><img alt="{}" src="data:image/png;base64,{}"><figcaption>{}</figcaption></figure>'
        made.section("Pictures", Markup(grid).format(alt, data, "In each row every model starts from the same noise."))
    titles = run_titles(metrics, base="before")
    made.section("Measurements", *_measurements(metrics, titles))
    if curve:
        made.section("Loss", loss_figure(curve, titles, caption=_CAPTION))
    made.section("Recipe", html.preformatted(recipe))
    made.download(METRICS, json_text(result_document(metrics), indent=2), kind="application/json")
    made.download(RESOLVED, recipe, kind="text/yaml")
    return made.html()


def _measurements(metrics: RunMetrics, titles: Mapping[str, str]) -> list[Markup | str]:
    values = {kind: {"loss": model.loss, **model.scores} for kind, model in metrics.models.items()}
    found = [name for name in _NAMES if name in values["adapter"]]
    columns = [Column("model", "model", numeric=False), Column("parameters", "trained parameters", lower_first=True)]
    columns += [Column(name, _NAMES[name]) for name in found]
    rows = [
        {
            "model": titles[kind],
            "parameters": model.parameters.trainable if isinstance(model, Trained) else None,
            **{name: finite(values[kind][name]) for name in found},
        }
        for kind, model in metrics.models.items()
    ]
    caption = (
        f"Denoising loss over {metrics.adapter.examples} pictures at fixed noise (lower is better); all else: "
        "higher is better."
    )
    blocks: list[Markup | str] = [html.table(columns, rows, caption=caption, sortable=False)]
    if metrics.not_measured:
        lines = (f"{_NAMES[name]}: not measured: {reason}" for name, reason in metrics.not_measured.items())
        blocks.append(html.bullets(lines))
    return blocks
