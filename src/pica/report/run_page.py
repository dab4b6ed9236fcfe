"""The page of one finished run on texts: the numbers before and after, the loss, the answers, and how to repeat it."""

import dataclasses
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from pica.errors import ConfigError
from pica.experiments.evaluate.evaluation import shown_score
from pica.experiments.recipes.recipe import Recipe
from pica.experiments.results.comparison import COMPARISON
from pica.experiments.results.documents import result_document
from pica.experiments.results.run import METRICS, Candidate, FailedCandidate, Measurement, RunMetrics, Trained
from pica.experiments.uncertainty import finite, loss_change
from pica.files.documents import parse_yaml
from pica.files.output import RESOLVED, json_text, write_text
from pica.foreign_code import FLAG
from pica.report import page as html
from pica.report.answers import Rows, answers_block
from pica.report.curves import loss_figure, measure_figures, run_titles
from pica.report.page import Cell, Column, Page
from pica.report.run_files import read_predictions, read_run

PAGE = "report.html"
_IN_COLUMNS_OF_THEIR_OWN = {"loss_stderr", "perplexity"}
_LOSS = "Held-out loss, in nats a token for tasks that write text."
_LOSSES = {
    "preference": "Held-out loss of direct preference optimisation, in nats a pair.",
    "reward": "Loss on the gold answers in nats a token, which is not trained on.",
}


def is_run(folder: Path) -> bool:
    """Whether a folder is the output of `pica train`, finished or not."""
    return (folder / RESOLVED).is_file() and not (folder / COMPARISON).exists()


def write_run_page(folder: Path, *, page: Path | None = None) -> Path:
    """Write the page of a finished run from what its folder holds.

    Args:
        folder: Output folder of `pica train`.
        page: Where the page goes; report.html in the folder if None.

    Returns:
        Where it is.

    Raises:
        ConfigError: The run is not finished, or a file of it is missing or damaged.
        OutputError: The page can't be written.
    """
    if not (folder / METRICS).is_file():
        raise ConfigError(
            f"The run in {str(folder)!r} is not finished, so there is nothing to report yet; go on with it: "
            f"pica train --resume {shlex.quote(str(folder))}"
        )
    try:
        run = read_run(folder)
        predictions = read_predictions(folder, run.metrics)
        text = _page(run.metrics, run.recipe, parse_yaml(run.recipe), run.curve, predictions)
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError, IndexError) as error:
        told = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ConfigError(f"A file in {str(folder)!r} is missing or damaged ({told}); run pica train again.") from error
    target = page or folder / PAGE
    write_text(target, text)
    return target


def _page(
    metrics: RunMetrics,
    text: str,
    recipe: Mapping[str, Any],
    curve: list[dict[str, str]],
    predictions: Mapping[str, Rows],
) -> str:
    titles = run_titles(metrics, base="base model")
    adapter, counts = metrics.adapter, metrics.problems
    what = {"chat": "conversations", "preference": "pairs"}.get(metrics.task, "problems")
    made = Page(
        metrics.name,
        lead=f"{metrics.model} on task {metrics.task}, before and after training {adapter.title}.",
        facts={
            "Model": metrics.model,
            "Method": adapter.title,
            "Trained parameters": f"{adapter.parameters.trainable:,} of {adapter.parameters.total:,}",
            f"{what} learnt from".capitalize(): f"{counts.train:,}",
            f"{what} held out".capitalize(): f"{counts.test:,}",
            "Steps": f"{adapter.training.steps:,}",
            "Learning rate": f"{adapter.learning_rate:g}",
            "Seed": metrics.seed,
        },
    )
    made.section("Before and after", *_measurements(metrics, titles, predictions))
    if curve:
        caption = "Training loss, the mean since the point before. The table above is of what was held out."
        made.section(
            "Loss", *measure_figures(curve, titles), loss_figure(curve, titles, caption=caption), *_rates(metrics)
        )
    if predictions["adapter"]:
        made.section("Answers", *answers_block(predictions, titles))
    made.section("Repeat it", *_repeating(metrics, recipe, text))
    made.download(RESOLVED, text, kind="text/yaml")
    made.download(METRICS, json_text(result_document(metrics), indent=2), kind="application/json")
    return made.html()


def _measurements(
    metrics: RunMetrics, titles: Mapping[str, str], predictions: Mapping[str, Rows]
) -> list[Markup | str]:
    adapter, models = metrics.adapter, metrics.models
    metric = adapter.metric
    more = [
        name
        for name, value in adapter.scores.items()
        if math.isfinite(value)
        and name not in {*_IN_COLUMNS_OF_THEIR_OWN, metric}
        and name.removesuffix("_stderr") not in adapter.scores.keys() - {name}
    ]
    columns = [
        Column("model", "model", numeric=False),
        Column("score", metric.replace("_", " "), "± standard error; in brackets the 95% interval."),
        Column("loss", "loss", _LOSSES.get(metrics.task, _LOSS), lower_first=True),
        *(
            [Column("perplexity", "perplexity", "exp(loss).", lower_first=True)]
            if "perplexity" in adapter.scores
            else []
        ),
        *(Column(key, key.replace("_", " ")) for key in more),
        Column("parameters", "trained parameters", lower_first=True),
    ]
    rows = [
        {
            "model": titles[name],
            "score": Cell(shown_score(metric, model.score, model.stderr, model.examples), finite(model.score)),
            "loss": _with_error(finite(model.loss), model.loss_stderr, 4),
            "perplexity": _perplexity(model),
            "parameters": model.parameters.trainable if isinstance(model, Trained) else 0,
            **{
                key: Cell(
                    shown_score(
                        "accuracy" if key == "exact_match" else key, value, model.scores.get(f"{key}_stderr", math.nan)
                    ),
                    value,
                )
                for key in more
                if math.isfinite(value := model.scores.get(key, math.nan))
            },
        }
        for name, model in models.items()
    ]
    caption = f"Measured on the same {adapter.examples:,} examples, from which nothing was learnt. One seed."
    blocks: list[Markup | str] = [html.table(columns, rows, caption=caption, sortable=False)]
    if metrics.standing is not None:
        blocks.append(metrics.standing.statement)
    if "base" in predictions and metric == "token_accuracy":
        blocks.append(loss_change(predictions["base"], predictions["adapter"]))
    if adapter.groups:
        blocks.append(_groups(models, titles))
    return blocks


def _with_error(value: float | None, error: float | None, digits: int) -> Cell:
    if value is None or error is None:
        return Cell("undefined" if value is None else f"{value:.{digits}f}", value)
    return Cell(f"{value:.{digits}f} ± {error:.{digits}f}", value)


def _perplexity(model: Measurement) -> Cell | None:
    value, error = model.scores.get("perplexity", math.nan), model.loss_stderr
    if not math.isfinite(value):
        return None
    digits = 2 if value < 100 else 0
    around = "" if error is None else f" ± {value * error:,.{digits}f}"  # the error of a logarithm is a relative one
    return Cell(f"{value:,.{digits}f}{around}", value)


def _groups(models: Mapping[str, Measurement], titles: Mapping[str, str]) -> Markup:
    names = list(models["adapter"].groups)
    columns = [Column("set", "set", numeric=False), *(Column(name, titles[name]) for name in models)]
    rows = []
    for group in names:
        row: dict[str, Any] = {"set": group}
        for name, model in models.items():
            found = model.groups[group]
            row[name] = Cell(
                shown_score("accuracy", found.accuracy, found.stderr, found.examples), finite(found.accuracy)
            )
        rows.append(row)
    return html.table(columns, rows, caption="Accuracy on each set; each counts the same.")


def _rates(metrics: RunMetrics) -> list[Markup]:
    """The learning rates that were tried, where there were several."""
    tables = []
    for trained in metrics.trained.values():
        tried = trained.candidates
        if len(tried) < 2:
            continue
        columns = [
            Column("rate", "learning rate", numeric=False),
            Column("loss", "validation loss", lower_first=True),
            Column("score", "validation score"),
            Column("failed", "", numeric=False),
        ]
        rows = [
            {
                "rate": f"{one.learning_rate:g}",
                "loss": one.validation_loss if isinstance(one, Candidate) else None,
                "score": one.validation_score if isinstance(one, Candidate) else None,
                "failed": one.failed if isinstance(one, FailedCandidate) else None,
            }
            for one in tried
        ]
        chosen = [place for place, one in enumerate(tried) if one.learning_rate == trained.learning_rate]
        caption = f"Learning rates tried for {trained.title}; the marked one was chosen on the validation part."
        used = [column for column in columns if any(row[column.key] is not None for row in rows)]
        tables.append(html.table(used, rows, caption=caption, marked=chosen))
    return tables


def _repeating(metrics: RunMetrics, recipe: Mapping[str, Any], text: str) -> list[Markup | str]:
    trust = f" {FLAG}" if recipe["model"]["trust_remote_code"] else ""
    machine = metrics.versions | {key: value for key, value in vars(metrics.machine).items() if value}
    return [
        f"With the recipe below, saved as `{RESOLVED}`:",
        html.preformatted(f"pica train {RESOLVED} -o again{trust}"),
        "Or with what differs from the defaults:",
        html.preformatted(command_of(recipe)),
        html.details("The whole recipe", html.preformatted(text)),
        html.details("Versions and machine", html.preformatted("\n".join(f"{k}: {v}" for k, v in machine.items()))),
    ]


def command_of(recipe: Mapping[str, Any]) -> str:
    """The `pica train` command for a recipe, given as its file holds it: the fields that differ from their defaults."""
    usual = dataclasses.asdict(Recipe())
    options = []
    for name, value in recipe.items():
        section = usual.get(name)
        inner = value.items() if isinstance(section, dict) else [("", value)]
        for field, given in inner:
            key = f"{name}.{field}" if field else name
            default = section.get(field) if isinstance(section, dict) else section
            # without a model, the command would be that of the built-in recipe
            if key == "model.path" or (given != default and key not in ("output", "model.trust_remote_code")):
                text = _yaml(given)
                options.append(f"--{key}{'=' if text.startswith('-') else ' '}{shlex.quote(text)}")
    trust = [FLAG] if recipe["model"]["trust_remote_code"] else []
    return " \\\n  ".join(["pica train", *options, *trust, "-o again"])


def _yaml(value: Any) -> str:
    """A value as it is written on a command line."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf).split("\n...")[0].strip()
