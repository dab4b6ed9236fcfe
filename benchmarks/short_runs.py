"""Many short trainings of one model in one process: for screens that need hundreds of them, at equal steps and data.

Plain PyTorch on purpose: AdamW, cosine after a warm-up of a tenth, no weight decay, no dropout. What is measured is the loss
on gold answers, problem by problem, so that two runs are compared on the same problems.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pica.experiments.batches import attended, padded
from pica.experiments.data import load_splits
from pica.experiments.encoding import IGNORED
from pica.experiments.models import load_model
from pica.experiments.pipelines import make_pipeline
from pica.experiments.recipes.parsing import load_recipe
from pica.tasks import get_task

DRAWS = 4000
"""Of the bootstrap."""
STEP = 3.0
"""Between neighbouring rates."""
MOST_STEPS_OUT = 3
"""How often a grid goes on beyond its edge."""

TRAININGS: dict[str, dict[str, Any]] = {
    "embedded": {
        "fields": {
            "model.dtype": "float32",
            "data.train_limit": 1500,
            "data.validation_limit": 100,
            "data.test_limit": 200,
        },
        "steps": 60,
        "batch": 16,
    },
    "smollm2": {
        "fields": {
            "model.dtype": "bfloat16",
            "task.template": "alpaca",
            "data.train_limit": 1000,
            "data.validation_limit": 24,
            "data.test_limit": 64,
            "trainer.max_length": 192,
        },
        "steps": 24,
        "batch": 4,
    },
}
"""Fields of a recipe, steps and batch of each setting, the same for all that is screened in it."""

Row = Mapping[str, list[int]]
Losses = list[tuple[float, int]]
"""Of each problem: summed nats, and tokens."""


@dataclass(frozen=True)
class Task:
    """A model with its problems.

    Attributes:
        model: Frozen, in evaluation mode; never changed, since each run takes a copy.
        tokenizer: Of the model.
        train, validation, test: Encoded problems, `input_ids` and `labels`.
        steps, batch: Of a training.
    """

    model: Any
    tokenizer: Any
    train: Sequence[Row]
    validation: Sequence[Row]
    test: Sequence[Row]
    steps: int
    batch: int

    def fresh(self) -> Any:
        """A copy of the model to adapt."""
        return copy.deepcopy(self.model)


def places(model: str, problems: Path) -> dict[str, str]:
    """The fields that say where SmolLM2 and its problems are: a folder with train.json and AddSub.json."""
    return {
        "model.path": model,
        "data.train": str(problems / "train.json"),
        "data.test": str(problems / "AddSub.json"),
    }


def setting_parser(about: str | None, data: str) -> argparse.ArgumentParser:
    """The options that every screen has: which setting, where SmolLM2 and the problems are, and where it notes its runs.

    Args:
        about: What it does.
        data: What `--data` names.
    Returns:
        The parser, for `begin`.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=sorted(TRAININGS), default="embedded")
    parser.add_argument("--model", help="folder of smollm2-135m")
    parser.add_argument("--data", type=Path, help=data)
    parser.add_argument("--work", type=Path, required=True, help="where finished trainings are noted")
    return parser


def begin(
    parser: argparse.ArgumentParser, given: argparse.Namespace, setting: Mapping[str, Any], name: str, within: str = ""
) -> tuple[Task, Records]:
    """The task of a setting, on one thread, and what a screen has noted of it.

    Args:
        parser: Of `setting_parser`, which says what is missing.
        given: What it has read.
        setting: Its fields, steps and batch.
        name: Of the screen.
        within: Folder of the problems inside `--data`.
    Returns:
        Both.
    """
    fields = dict(setting["fields"])
    if given.setting == "smollm2":
        if given.model is None or given.data is None:
            parser.error("--setting smollm2 needs --model and --data")
        fields |= places(given.model, given.data / within)
    torch.set_num_threads(1)
    records = Records(given.work / f"{name}-{given.setting}.jsonl")
    return load_task(fields, steps=setting["steps"], batch=setting["batch"]), records


def load_task(overrides: Mapping[str, Any], *, steps: int, batch: int) -> Task:
    """A task of `pica train` by the fields of its recipe, which is arithmetic-tiny but for these."""
    recipe = load_recipe("arithmetic-tiny", list(overrides.items()))
    splits = load_splits(recipe, get_task(recipe.task.name))
    pipeline: Any = make_pipeline(recipe)
    rows = [[dict(row) for row in pipeline.encode(part)] for part in (splits.train, splits.validation, splits.test)]
    model: Any = load_model(recipe.model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return Task(model, pipeline.tokenizer, *rows, steps=steps, batch=batch)


def weight_gradients(model: nn.Module, layers: Mapping[str, nn.Linear], rows: Sequence[Row]) -> dict[str, Tensor]:
    """G (out, in) of each layer's weight, of the mean loss on the rows, float32; the weights are left frozen."""
    weights = {path: layer.weight.requires_grad_(True) for path, layer in layers.items()}
    with torch.enable_grad():
        for start in range(0, len(rows), 8):
            model(**batch_of(rows[start : start + 8])).loss.backward()
    found = {}
    for path, weight in weights.items():
        assert weight.grad is not None
        found[path], weight.grad = weight.grad.float(), None
        weight.requires_grad_(False)
    return found


def batch_of(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Problems of different lengths as one batch."""
    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": padded(ids, 0),
        "attention_mask": attended(ids),
        "labels": padded([row["labels"] for row in rows], IGNORED),
    }


def train(
    model: nn.Module,
    parameters: Iterable[Tensor],
    task: Task,
    *,
    rate: float,
    seed: int,
    before_step: Callable[[int], None] = lambda step: None,
) -> bool:
    """Train these parameters, in place; the seed decides the order of the problems alone.

    `before_step` is told the number of each step before it is done.

    Returns:
        Whether the loss stayed a number.
    """
    trained = list(parameters)
    optimiser = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    warmup = max(1, task.steps // 10)
    order = np.random.default_rng(seed).permutation(len(task.train))
    model.eval()  # no dropout, as the gradients flow all the same
    for step in range(task.steps):
        before_step(step)
        progress = max(0, step - warmup) / max(1, task.steps - warmup)
        share = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimiser.param_groups:
            group["lr"] = rate * share
        chosen = [task.train[order[i % len(order)]] for i in range(step * task.batch, (step + 1) * task.batch)]
        loss = model(**batch_of(chosen)).loss
        if not torch.isfinite(loss):
            return False
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
    return True


@torch.no_grad()
def losses(model: nn.Module, rows: Sequence[Row], *, batch: int = 32) -> Losses:
    """Of each row's labelled tokens."""
    model.eval()
    found: Losses = [(0.0, 0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
    for start in range(0, len(order), batch):
        places = order[start : start + batch]
        read = batch_of([rows[i] for i in places])
        gold = read.pop("labels")[:, 1:]
        logits = model(**read).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), gold.flatten(), reduction="none")
        for place, nats, row in zip(places, each.view_as(gold), gold):
            found[place] = (float(nats.double().sum()), int((row != IGNORED).sum()))
    return found


def mean(of: Losses) -> float:
    """Nats a token."""
    return sum(nats for nats, _ in of) / sum(tokens for _, tokens in of)


class Records:
    """Finished runs in a file of lines, so that the same command goes on where it was stopped."""

    def __init__(self, path: Path) -> None:
        """Args: path: of the file, which is made where there is none."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        whole = [json.loads(line) for line in lines if line.endswith("}")]
        if len(whole) < len(lines):  # a line was cut off
            path.write_text("".join(json.dumps(record) + "\n" for record in whole), encoding="utf-8")
        self._found = {record["key"]: record["value"] for record in whole}

    def done(self, key: str) -> Any:
        """What is noted under the key, or None."""
        return self._found.get(key)

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        """What is noted under the key; made, and noted, where nothing is."""
        if key not in self._found:
            self.put(key, make())
        return self._found[key]

    def put(self, key: str, value: Any) -> None:
        """Note this under the key, in place of what is there."""
        if self._found.get(key) != value:
            self._found[key] = value
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "value": value}) + "\n")


def best_rate(rates: Sequence[float], validation: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """The rate with the lowest validation loss; a grid whose best rate lies at its edge goes on there.

    Args:
        rates: To begin with, rising.
        validation: Trains with a rate and gives the loss; infinite where training broke.

    Returns:
        The rate, and the loss by rate.
    """
    tried = {rate: validation(rate) for rate in rates}
    for _ in range(MOST_STEPS_OUT):
        best = min(tried, key=lambda rate: tried[rate])
        if best not in (min(tried), max(tried)):
            break
        further = float(f"{best / STEP if best == min(tried) else best * STEP:.2g}")
        tried[further] = validation(further)
    return min(tried, key=lambda rate: tried[rate]), dict(sorted(tried.items()))


def paired_difference(one: Mapping[int, Any], other: Mapping[int, Any]) -> tuple[float, float, float, int]:
    """Mean difference of two methods' losses over shared seeds and problems, its 95% interval, and the number of seeds.

    The bootstrap draws seeds with replacement, and within each its problems; a loss is summed nats over summed tokens.

    Args:
        one: By seed, the `Losses` of the same problems.
        other: The same of what it is compared with.

    Returns:
        One minus other, lower and upper end, seeds.
    """
    first, second = ({seed: np.asarray(rows, float) for seed, rows in found.items()} for found in (one, other))
    seeds = sorted(set(first) & set(second))
    generator = np.random.default_rng(0)

    def difference(chosen: Sequence[int], drawn: Sequence[Any]) -> float:
        parts = [[values[seed][rows].sum(axis=0) for seed, rows in zip(chosen, drawn)] for values in (first, second)]
        means = [np.mean([nats / tokens for nats, tokens in part]) for part in parts]
        return float(means[0] - means[1])

    count = len(first[seeds[0]])
    found = difference(seeds, [slice(None)] * len(seeds))
    drawn = []
    for _ in range(DRAWS):
        chosen = [int(seed) for seed in generator.choice(seeds, len(seeds))]
        drawn.append(difference(chosen, [generator.integers(count, size=count) for _ in chosen]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return found, float(low), float(high), len(seeds)
