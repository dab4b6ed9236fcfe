"""Does a basis that looks at data win? The rows that settle it, at equal parameters, with their rates and seeds.

    python -m benchmarks.method --data ../shared/data --models ~/.cache/pica-models --work /work/method-runs
    python -m benchmarks.method ... --stage smollm2-arithmetic-1        one stage only
    python -m benchmarks.method ... --shard 2/4                         every fourth row, for a job array
    python -m benchmarks.method ... --report                            what there is so far, as a table

`pica compare` runs underneath: a cell is a method with one seed, finished cells are never run again, and several of these
commands may share one folder. The same command goes on where another one was stopped. Stages come in the order in which
they settle most; each is a folder of its own, with its page.

What counts as a win, written down before the runs
--------------------------------------------------
The quantity is the loss on the gold answers of the held-out test problems, in nats a token (SST-2 and digits: nats an
example), at the rate that the validation problems choose, paired over seeds and problems: the difference of two methods'
losses on the same seed and problem. Its 95% interval is a bootstrap that draws seeds and, within each, problems.

1. A method wins over another in a setting if that interval lies below zero, and the mean difference is at least 0.005
   (SmolLM2) or 0.005 (SST-2, digits): less is a tie in practice, whatever the interval says.
2. A method wins over another if it wins in at least two of the four settings (arithmetic, GSM8K, SST-2, digits) and loses
   in none. A win in one setting is reported as that.
3. Activation directions are "better than the paper's" if they win so over `principal`, and "better than LoRA" if they win
   so over LoRA r=1 AND over EVA, at no more parameters than those. Winning over LoRA but not over EVA says that the start is
   what helps, not the sharing.
   "Gradient" (added before any of its runs) likewise: better than LoRA if it wins over LoRA r=1 and over EVA. A LoRA that
   begins with the same gradient is in the screen only (`benchmarks.candidates`).
4. Sharing helps if `activation` wins over `activation, not shared` at equal parameters.
5. Text of another kind is good enough if `activation, other text` is not beaten by more than 0.005 by `activation`.
6. Accuracy is reported beside the loss and decides nothing: 150 problems tell nothing below eight points.

A rate at the edge of its grid is no result: such a row gets a grid that goes on from there (`rates.json` in the stage's
folder), and only rows whose best rate has neighbours on both sides count. Three seeds; the first chooses the rate. Training
in bfloat16 with sequences cut at 256 tokens, the same for all rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import pica.cli
from benchmarks.harness import table
from benchmarks.short_runs import paired_difference
from pica.cli.compare import parse_shard
from pica.experiments.compare.cells import read_record
from pica.experiments.results.comparison import INDEX, CellIndex, DoneCell
from pica.experiments.results.documents import read_result
from pica.experiments.results.run import Candidate
from pica.files.output import write_json, write_text

SEEDS = (0, 1, 2)
TIE = 0.005
"""A smaller mean difference of two losses is a tie in practice."""
SMOLLM2 = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
MINILM = ["query", "key", "value", "intermediate.dense", "output.dense"]

Row = tuple[str, dict[str, Any], list[float]]


def pica_row(label: str, r: int, rates: list[float], **more: Any) -> Row:
    """A row of PiCa."""
    return f"{label} r={r}", {"method": "pica", "r": r, **more}, rates


PRINCIPAL = [1e-3, 3e-3, 1e-2]
ACTIVATION = [5e-4, 1e-3, 2e-3, 4e-3]
LORA = [2.5e-3, 5e-3, 1e-2]


def first(r: int, gradient: int) -> list[Row]:
    """The six rows that settle most, the most telling pairs first; `gradient` is the r of directions of the gradient."""
    return [
        pica_row("principal", r, PRINCIPAL),
        pica_row("activation", r, ACTIVATION, projection="activation"),
        ("LoRA r=1", {"method": "lora", "r": 1}, LORA),
        pica_row("gradient", gradient, ACTIVATION, projection="gradient"),
        pica_row("random", r, PRINCIPAL, projection="random"),
        ("EVA r=1", {"method": "eva", "r": 1}, LORA),
    ]


def scaled(rows: Sequence[Row], factor: float) -> list[Row]:
    """The rows with other rates: smaller models want larger ones, trained classifiers smaller ones."""
    return [(label, adapter, [float(f"{rate * factor:.2g}") for rate in rates]) for label, adapter, rates in rows]


def second(r: int, unshared: int, other: str, vera: int) -> list[Row]:
    """What makes it so: other data, other bases, no sharing, frozen or random A, more parameters."""
    return [
        pica_row("activation, other text", r, ACTIVATION, projection="activation", calibration=other),
        pica_row("activation, embedded text", r, ACTIVATION, projection="activation", calibration="embedded"),
        pica_row("weighted", r, PRINCIPAL, projection="weighted"),
        pica_row("activation, not shared", unshared, PRINCIPAL, projection="activation", share="none"),
        pica_row("principal, not shared", unshared, PRINCIPAL, share="none"),
        # LoRA with a frozen random A: what LoRA-FA trains
        pica_row("random, not shared (LoRA-FA)", unshared, PRINCIPAL, projection="random", share="none"),
        pica_row("minor", r, PRINCIPAL, projection="minor"),
        (f"VeRA r={vera}", {"method": "vera", "r": vera}, [3e-3, 1e-2, 3e-2]),
        ("LoRA r=8", {"method": "lora", "r": 8}, [5e-4, 1e-3, 3e-3]),
        ("full", {"method": "full"}, [1e-5, 3e-5, 1e-4]),
    ]


def quarter(r: int, gradient: int) -> list[Row]:
    """A quarter of the parameters, below which LoRA has no rank."""
    return [
        pica_row("principal", r, PRINCIPAL),
        pica_row("activation", r, ACTIVATION, projection="activation"),
        pica_row("gradient", gradient, ACTIVATION, projection="gradient"),
        pica_row("random", r, PRINCIPAL, projection="random"),
    ]


@dataclass(frozen=True)
class Stage:
    """Some rows of one setting.

    Attributes:
        setting: Which model and data.
        rows: In the order in which they are run.
    """

    setting: str
    rows: Sequence[Row]


def settings(data: Path, models: Path, vit: Path | None) -> dict[str, dict[str, Any]]:
    """What all cells of a setting share, by its name."""
    language = {
        "model": {"path": str(models / "smollm2-135m")},
        "adapter": {"target_modules": SMOLLM2},
        "trainer": {
            "max_steps": 100,
            "batch_size": 8,
            "max_length": 256,
            "precision": "bfloat16",
            "log_steps": 5,
            "threads": 1,
            "eval_batch_size": 16,
            "group_by_length": False,
        },
    }
    arithmetic = {
        "data": {
            "train": str(data / "arithmetic" / "train.json"),
            "test": str(data / "arithmetic" / "AddSub.json"),
            "validation_limit": 64,
            "test_limit": 150,
        },
        "task": {"name": "arithmetic", "template": "alpaca", "max_new_tokens": 64},
    }
    gsm8k = {
        "data": {
            "train": str(data / "gsm8k" / "train.jsonl"),
            "test": str(data / "gsm8k" / "test.jsonl"),
            "train_limit": 2000,
            "validation_limit": 64,
            "test_limit": 150,
        },
        "task": {"name": "math", "template": "alpaca", "max_new_tokens": 128},
    }
    sst2 = {
        "model": {"path": str(models / "minilm")},
        "data": {"train": str(data / "sst2"), "validation_limit": 512},
        "task": {"name": "sentiment"},
        "adapter": {"target_modules": MINILM},
        "trainer": {
            "epochs": 1,
            "batch_size": 32,
            "max_length": 64,
            "precision": "bfloat16",
            "threads": 1,
            "head_learning_rate": 3e-3,
            "group_by_length": True,
            "log_steps": 10,
            "eval_batch_size": 64,
        },
    }
    found = {"smollm2-arithmetic": language | arithmetic, "smollm2-gsm8k": language | gsm8k, "minilm-sst2": sst2}
    if vit is not None:
        found["digits"] = {
            "model": {"path": str(vit / "model")},
            "data": {"train": str(vit / "pictures"), "validation_limit": 200, "test_limit": 797},
            "task": {"name": "images"},
            "adapter": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]},
            "trainer": {"epochs": 6, "batch_size": 32, "head_learning_rate": 3e-3, "log_steps": 5, "threads": 1},
        }
    return {name: {"evaluate_base": False, **shared} for name, shared in found.items()}


def stages(data: Path) -> dict[str, Stage]:
    """All stages in their order. At most 207,360 parameters on SmolLM2, 165,888 on MiniLM, and a quarter of each."""
    sentences, problems = str(data / "sst2" / "train.tsv"), str(data / "arithmetic" / "train.json")
    return {
        "smollm2-arithmetic-1": Stage("smollm2-arithmetic", first(67, 72)),
        "minilm-sst2-1": Stage(
            "minilm-sst2", [*scaled(first(48, 86), 0.4), ("LoRA r=4", {"method": "lora", "r": 4}, [3e-4, 1e-3, 3e-3])]
        ),
        "smollm2-gsm8k-1": Stage("smollm2-gsm8k", first(67, 72)),
        "smollm2-arithmetic-2": Stage("smollm2-arithmetic", second(67, 2, sentences, 760)),
        "minilm-sst2-2": Stage("minilm-sst2", scaled(second(48, 8, problems, 256), 0.4)),
        "smollm2-arithmetic-quarter": Stage("smollm2-arithmetic", quarter(17, 18)),
        "minilm-sst2-quarter": Stage("minilm-sst2", scaled(quarter(12, 21), 0.4)),
        "smollm2-gsm8k-2": Stage("smollm2-gsm8k", second(67, 2, sentences, 760)),
        "digits-1": Stage("digits", scaled(first(12, 18)[:5], 5)),
        "digits-2": Stage("digits", scaled(second(12, 2, "train", 64)[2:], 5)),
    }


def run_stage(name: str, stage: Stage, shared: Mapping[str, Any], work: Path, shard: tuple[int, int]) -> None:
    """Run what is left of a stage; where a rate lies at the edge of its grid, with a grid that goes on from there."""
    folder = work / name
    for _ in range(4):
        grids = _grids(folder)
        file = folder.with_suffix(".yaml")
        methods = [
            {"label": label, "adapter": adapter, "learning_rates": grids.get(label, rates)}
            for label, adapter, rates in stage.rows
        ]
        content = {"name": name, "title": f"Which basis: {name}", "seeds": list(SEEDS), "base": dict(shared)}
        write_text(file, yaml.safe_dump({**content, "methods": methods}, sort_keys=False))
        arguments = ["compare", str(file), "--output", str(folder), "--shard", f"{shard[0]}/{shard[1]}"]
        if status := pica.cli.main(arguments):
            raise SystemExit(status)
        if not _widen(folder, {label: grids.get(label, rates) for label, _, rates in stage.rows}):
            return


def _grids(folder: Path) -> dict[str, list[float]]:
    """Grids that took the place of the first ones, by row."""
    try:
        return json.loads((folder / "rates.json").read_text(encoding="utf-8"))["grids"]
    except (OSError, ValueError, KeyError):
        return {}


def _widen(folder: Path, grids: Mapping[str, list[float]]) -> bool:
    """Give rows whose best rate has no neighbour on one side a grid that goes on there; whether there were any."""
    place = folder / "rates.json"
    known = json.loads(place.read_text(encoding="utf-8")) if place.is_file() else {"grids": {}, "losses": {}}
    changed = False
    for label, records in read_cells(folder).items():
        chooser = next((record for record in records if record.seed == SEEDS[0]), None)
        if chooser is None:
            continue
        tried = known["losses"].setdefault(label, {})
        for candidate in chooser.result.candidates:
            tried[repr(candidate.learning_rate)] = (
                candidate.validation_loss if isinstance(candidate, Candidate) else None
            )
        rates = sorted(float(rate) for rate in tried)
        best = chooser.result.learning_rate
        if best not in (rates[0], rates[-1]):
            continue
        step = 0.4 if best == rates[0] else 2.5
        known["grids"][label] = sorted(float(f"{best * step**power:.2g}") for power in range(3))
        known["grids"][label][0 if step > 1 else -1] = best
        changed = changed or known["grids"][label] != grids.get(label)
    write_json(place, known)
    return changed


def read_cells(folder: Path) -> dict[str, list[DoneCell]]:
    """Finished cells by row, of those that the folder's index lists."""
    try:
        index = read_result(CellIndex, folder / INDEX)
    except (OSError, ValueError):
        return {}
    found: dict[str, list[DoneCell]] = {}
    for entry in index.cells:
        record = read_record(folder, entry.key)
        if isinstance(record, DoneCell):
            found.setdefault(entry.label, []).append(record)
    return found


def difference(one: Sequence[DoneCell], other: Sequence[DoneCell]) -> tuple[float, float, float, int]:
    """`paired_difference` of two rows' cells."""
    return paired_difference(*({record.seed: record.losses for record in rows} for rows in (one, other)))


def report(work: Path, names: Sequence[str]) -> str:
    """What is there, as Markdown: each row's loss, and how far it is from the first one's."""
    parts = []
    for name in names:
        cells = {label: rows for label, rows in read_cells(work / name).items() if all(row.losses for row in rows)}
        if not cells:
            continue
        widened = _grids(work / name)
        reference = next(iter(cells))
        lines = []
        for label, rows in cells.items():
            losses = [row.result.loss for row in rows]
            rate, size = rows[0].result.learning_rate, rows[0].result.parameters
            against = ""
            if label != reference:
                off, low, high, _ = difference(rows, cells[reference])
                verdict = "tie" if low <= 0 <= high or abs(off) < TIE else "better" if off < 0 else "worse"
                against = f"{off:+.4f} ({low:+.4f} to {high:+.4f}), {verdict}"
            spread = f" ± {np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""
            lines.append(
                [
                    label,
                    f"{size.trainable - size.head:,}",
                    f"{rate:g}{' (grid went on)' if label in widened else ''}",
                    f"{np.mean(losses):.4f}{spread}",
                    f"{np.mean([row.result.score for row in rows]):.1%}",
                    against,
                    str(len(rows)),
                ]
            )
        header = ["row", "parameters", "rate", "test loss", "score", f"against {reference}", "seeds"]
        parts.append(f"## {name}\n\n{table(header, lines)}")
    return "\n\n".join(parts) or "No cell is finished yet."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages in order, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with arithmetic, gsm8k and sst2")
    parser.add_argument("--models", type=Path, required=True, help="folder with smollm2-135m and minilm")
    parser.add_argument("--digits", type=Path, help="folder that benchmarks.digits --prepare-only has made")
    parser.add_argument("--work", type=Path, required=True, help="where the runs go, and go on")
    parser.add_argument("--stage", action="append", help="only this one; may be given several times")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="every N-th row, from the I-th on")
    parser.add_argument("--report", action="store_true", help="run nothing; print what there is")
    given = parser.parse_args(argv)
    data, models = given.data.expanduser().resolve(), given.models.expanduser().resolve()
    found = settings(data, models, given.digits and given.digits.expanduser().resolve())
    planned = {name: stage for name, stage in stages(data).items() if stage.setting in found}
    if unknown := set(given.stage or ()) - set(planned):
        parser.error(f"no stage {', '.join(sorted(unknown))}; stages: {', '.join(planned)}")
    chosen = given.stage or list(planned)
    if given.report:
        print(report(given.work, chosen))
        return 0
    for name in chosen:
        run_stage(
            name,
            planned[name],
            found[planned[name].setting],
            given.work.expanduser().resolve(),
            parse_shard(given.shard),
        )
    print(report(given.work, chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main())
