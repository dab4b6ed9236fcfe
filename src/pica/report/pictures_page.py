"""The page of one DreamBooth run: pictures before and after, what was measured, the loss, and the recipe."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pica.errors import ConfigError
from pica.files.documents import read_json
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
        return read_json(folder / "metrics.json")["task"] == "dreambooth"
    except (OSError, ValueError, KeyError, TypeError):
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


def _page(metrics: Mapping[str, Any], recipe: str, curve: list[dict[str, str]], picture: bytes | None) -> str:
    models = {name: metrics[name] for name in ("base", "adapter", "baseline") if name in metrics}
    made = Page(
        metrics["name"],
        lead="DreamBooth: a text-to-image model before and after it has learnt a subject.",
        facts={
            "Model": metrics["model"],
            "Pictures learnt from": metrics["problems"]["train"],
            "Steps": metrics["adapter"]["training"]["steps"],
            "Seed": metrics["seed"],
        },
    )
    if picture is not None:
        data = base64.b64encode(picture).decode("ascii")
        alt = "Drawn pictures in a column for each model, a row for each prompt and noise, the subject above."
        grid = '<figure><img alt="{}" src="data:image/png;base64,{}"><figcaption>{}</figcaption></figure>'
        made.section("Pictures", Markup(grid).format(alt, data, "In each row every model starts from the same noise."))
    titles = run_titles(models)
    made.section("Measurements", *_measurements(metrics, models, titles))
    if curve:
        made.section("Loss", loss_figure(curve, titles, caption=_CAPTION))
    made.section("Recipe", html.preformatted(recipe))
    made.download("metrics.json", json_text(metrics, indent=2), kind="application/json")
    made.download(RESOLVED, recipe, kind="text/yaml")
    return made.html()


def _measurements(
    metrics: Mapping[str, Any], models: Mapping[str, Any], titles: Mapping[str, str]
) -> list[Markup | str]:
    found = [name for name in _NAMES if name in metrics["adapter"]]
    columns = [Column("model", "model", numeric=False), Column("parameters", "trained parameters", lower_first=True)]
    columns += [Column(name, _NAMES[name]) for name in found]
    rows = [
        {
            "model": titles[kind],
            "parameters": model["parameters"]["trainable"] if "parameters" in model else None,
            **{name: model[name] for name in found},
        }
        for kind, model in models.items()
    ]
    caption = (
        f"Denoising loss over {metrics['adapter']['examples']} pictures at fixed noise (lower is better); all else: "
        "higher is better."
    )
    blocks: list[Markup | str] = [html.table(columns, rows, caption=caption, sortable=False)]
    if missing := metrics.get("not_measured"):
        blocks.append(html.bullets(f"{_NAMES[name]}: not measured: {reason}" for name, reason in missing.items()))
    return blocks
