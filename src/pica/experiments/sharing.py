"""Giving an adapter to others: its card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pica.adapters.card import write_card
from pica.experiments.evaluation import shown_score
from pica.experiments.recipe import Recipe


def write_run_card(adapter: Path, recipe: Recipe, metrics: Mapping[str, Any], described: Sequence[str] = ()) -> None:
    """Write the card of the adapter that a run has trained and measured.

    Args:
        adapter: Its folder.
        recipe: Of the run.
        metrics: What becomes metrics.json.
        described: Sentences on the training data.
    """
    trained, counts, task = metrics["adapter"], metrics["problems"], metrics["task"]
    what = "conversations" if task == "chat" else "pictures" if task == "dreambooth" else "examples"
    subset = f", {recipe.task.subset}" if recipe.task.subset else ""
    place = recipe.data.train or ""
    name = place if place.startswith("hub:") or place == "embedded" else Path(place).name
    learnt = [text.removeprefix("Training data: ") for text in described] or [f"{counts['train']:,} {what} learnt from"]
    facts = {
        "task": f"{task}{subset}",
        "data": f"`{name}`: {'; '.join(learnt)}; {counts['test']:,} held out",
        "training": f"{trained['training']['steps']:,} steps, learning rate {trained['learning_rate']:g}, seed "
        f"{metrics['seed']}",
        "base in training": f"quantised ({recipe.model.quantization})" if recipe.model.quantization else "",
        "classes": ", ".join(map(str, recipe.task.labels or ())),
        "chat template": "in `chat_template.jinja`" if task == "chat" else "",
        "system prompt": recipe.task.system or "" if task == "chat" else "",
    }
    models = {title: metrics[name] for name, title in (("base", "before"), ("adapter", "after")) if name in metrics}
    metric = trained["metric"]
    rows = [
        ["", *models],
        [
            metric.replace("_", " "),
            *(shown_score(metric, one["score"], one["stderr"], one["examples"]) for one in models.values()),
        ],
        ["held-out loss", *(_with_error(one["loss"], one.get("loss_stderr")) for one in models.values())],
    ]
    if "perplexity" in trained:
        rows.append(["perplexity", *(f"{one['perplexity']:,.2f}" for one in models.values())])
    note = f"On {trained['examples']:,} held-out {what}, one seed; ± is the standard error, brackets the 95% interval."
    write_card(
        adapter, title=f"{metrics['name']}: {trained['title']}", facts=facts, measures=rows, note=note, tags=[task]
    )


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
