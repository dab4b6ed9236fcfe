"""What a basis holds of the gradient while it trains, and whether that says who will learn best.

    python -m benchmarks.diagnostics --setting embedded --work /tmp/candidates       after benchmarks.candidates there
    python -m benchmarks.diagnostics --setting smollm2 --model smollm2-135m --data arithmetic --work /tmp/candidates

The rows, their rates and their test losses are those that `benchmarks.candidates` has noted in the folder; each is trained
once more with the first seed, and looked at before the first step, before the eleventh and at the end. What is looked at is
the gradient G (out, in) of each adapted layer's weight, of the loss on 64 training problems:

- cap: the share of G's energy, over all layers, that lies in the directions that a layer reads (R^T R, R its rows made
  orthonormal), or writes where those are the frozen ones. For LoRA they are those of A as it is by then.
- coherence: |sum of G_i R_i^T|^2 over sum of |G_i R_i^T|^2, over the layers that share a matrix, the mean over matrices: 1
  where the layers' gradients have nothing to do with one another, the number of layers where they are all the same.

Spearman's correlation of each with the rows' test losses stands below the table, without LoRA, whose directions move.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.candidates import SETTINGS, Looked, LowRank, candidates, put_on
from benchmarks.short_runs import Records, begin, mean, setting_parser, train, weight_gradients

EARLY = 10
LOOKS = ("first", "early", "last")


def captured(
    gradients: Mapping[str, Tensor], made: Mapping[str, LowRank], shared: Sequence[nn.Parameter]
) -> dict[str, float]:
    """Cap and coherence.

    Args:
        gradients: G (out, in) of each layer.
        made: The adapted layers.
        shared: What is trained.
    Returns:
        `cap` and, where something frozen stands beside what is shared, `coherence`.
    """
    held = energy = 0.0
    sums: dict[int, Tensor] = {}
    single: dict[int, float] = {}
    trained = {id(one) for one in shared}
    for path, layer in made.items():
        if id(layer.write) in trained:  # what it reads is frozen, or LoRA's A
            rows, gradient, key = layer.read, gradients[path].T, id(layer.write)
        else:
            rows, gradient, key = layer.write.T, gradients[path], id(layer.read)
        rows = rows.detach().float()
        held += float((torch.linalg.qr(rows.T).Q.T @ gradient).double().square().sum())
        energy += float(gradient.double().square().sum())
        brought = rows @ gradient  # of the shared matrix's gradient
        sums[key] = sums.get(key, torch.zeros_like(brought)) + brought
        single[key] = single.get(key, 0.0) + float(brought.double().square().sum())
    found = {"cap": held / energy}
    if not any({id(layer.read), id(layer.write)} <= trained for layer in made.values()):
        found["coherence"] = float(np.mean([float(sums[key].double().square().sum()) / single[key] for key in sums]))
    return found


def watched(label: str, looked: Looked, record: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Train a row of `benchmarks.candidates` again, with its rate, and look three times."""
    task = looked.task
    layers = max(len(paths) for paths in looked.roles.values())
    model, (made, trained) = task.fresh(), candidates(layers)[label](looked, record["r"], 0)
    put_on(model, made)
    bases: dict[str, Any] = {path: layer.base for path, layer in made.items()}
    found: dict[str, dict[str, float]] = {}

    def look(name: str) -> None:
        gradients = weight_gradients(model, bases, looked.rows)
        found[name] = captured(gradients, made, trained)

    def before_step(step: int) -> None:
        if step in (0, EARLY):
            look("first" if step == 0 else "early")

    train(model, trained, task, rate=record["rate"], seed=0, before_step=before_step)
    look("last")
    return found


def _spearman(one: Sequence[float], other: Sequence[float]) -> float:
    result: Any = spearmanr(one, other)
    return float(result.statistic)


def report(name: str, records: Records, layers: int) -> tuple[dict[str, Any], str]:
    """Rows that were looked at, as numbers and as a table."""
    numbers: dict[str, Any] = {}
    for label in candidates(layers):
        found, record = records.done(f"{name}/{label}/diagnostics"), records.done(f"{name}/{label}")
        if found and record:
            losses = [mean(rows) for rows in record["test"].values() if rows]
            numbers[label] = {**found, "loss": float(np.mean(losses))}
    lines = []
    for label, found in numbers.items():
        cells = [f"{found[look]['cap']:.2f}" for look in LOOKS]
        cells += [f"{found[look]['coherence']:.1f}" if "coherence" in found[look] else "–" for look in LOOKS]
        lines.append([label, *cells, f"{found['loss']:.4f}"])
    header = ["row", *(f"{what}, {look}" for what in ("cap", "coherence") for look in LOOKS), "test loss"]
    frozen = [found for found in numbers.values() if "coherence" in found["first"]]
    correlations = {
        f"{what}, {look}": _spearman([f[look][what] for f in frozen], [f["loss"] for f in frozen])
        for what in ("cap", "coherence")
        for look in LOOKS
        if len(frozen) > 2
    }
    shown = "; ".join(f"{what} {value:+.2f}" for what, value in correlations.items())
    text = (
        f"{harness.table(header, lines)}\nSpearman's correlation with the test loss over {len(frozen)} rows: {shown}.\n"
    )
    return {"rows": numbers, "correlations": correlations}, text


def main(argv: Sequence[str] | None = None) -> int:
    """Look at what is not looked at yet, and write the table."""
    parser = setting_parser(__doc__, "folder with train.json and AddSub.json")
    given = parser.parse_args(argv)
    task, records = begin(parser, given, SETTINGS[given.setting], "candidates")
    looked, layers = Looked(task), int(task.model.config.num_hidden_layers)
    for label in candidates(layers):
        record = records.done(f"{given.setting}/{label}")
        if record is None:
            print(f"{label}: benchmarks.candidates has not finished it", flush=True)
            continue
        found = records.get(
            f"{given.setting}/{label}/diagnostics", lambda label=label, record=record: watched(label, looked, record)
        )
        print(label, {look: {k: round(v, 3) for k, v in found[look].items()} for look in found}, flush=True)
    numbers, shown = report(given.setting, records, layers)
    text = f"{task.steps} steps of {task.batch}; early: before step {EARLY + 1}.\n\n{shown}"
    print(text)
    harness.save(f"diagnostics_{given.setting}", numbers, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
