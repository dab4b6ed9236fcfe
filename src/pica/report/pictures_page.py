"""The page of one DreamBooth run: pictures before and after, what was measured, the loss, and the recipe."""

import base64
import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pica.documents import read_json
from pica.errors import ConfigError
from pica.experiments.output import RESOLVED, json_text, write_text
from pica.report import page as html
from pica.report.figures import INK, Sheet, figure, style
from pica.report.page import Column, Page

GRID, PAGE = "grid.png", "report.html"
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
        metrics = read_json(folder / "metrics.json")
        recipe = (folder / RESOLVED).read_text(encoding="utf-8")
        with open(folder / "loss_curve.csv", encoding="utf-8", newline="") as file:
            curve = list(csv.DictReader(file))
        picture = (folder / GRID).read_bytes() if (folder / GRID).is_file() else None
        text = _page(metrics, recipe, curve, picture)
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
    titles = {name: model.get("title", "before") for name, model in models.items()}
    if titles.get("baseline") == titles["adapter"]:
        titles |= {name: f"{titles[name]} ({name})" for name in ("adapter", "baseline")}
    made.section("Measurements", *_measurements(metrics, models, titles))
    if curve:
        made.section("Loss", _curves(curve, titles))
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


def _curves(curve: list[dict[str, str]], titles: Mapping[str, str]) -> Markup:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in (row for row in curve if row["loss"]):  # at some steps only the validation loss was measured
        run = row["run"].removesuffix("-refit")
        label = f"{titles.get(run, row['method'])}, rate {float(row['peak_rate']):g}" + (
            " (refit)" if "refit" in row["run"] else ""
        )
        series.setdefault(label, []).append((int(row["step"]), float(row["loss"])))

    def draw(sheet: Sheet) -> None:
        panel = sheet.figure.subplots()
        for index, (label, points) in enumerate(series.items()):
            look = style(index)
            panel.plot(*zip(*points), color=look.color, linestyle=look.linestyle, label=label)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("optimizer step", color=INK)
        panel.set_ylabel("training loss", color=INK)
        panel.legend()

    return figure(
        "loss-plot",
        draw,
        caption="Training loss, mean since the point before. It jumps with the noise levels that are drawn; the "
        "measurements above are at fixed ones. With prior preservation it is the sum of two losses.",
        alt=f"Training loss against optimizer steps, {len(series)} curves.",
        height=3.6,
    )
