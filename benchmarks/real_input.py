"""SmolLM2-135M on real word problems: PiCa beside LoRA, each at the best of at least three learning rates.

    python -m benchmarks.real_input --model ./smollm2-135m --data ./data

Each cell is one `pica train` with a shipped recipe. Learning rates are chosen by the loss on problems taken out of the
training file, accuracy and loss are then measured once on the test file. A finished cell is not run again.
"""

from __future__ import annotations

import argparse
import csv
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import RESULTS, describe_machine, save, table
from pica.experiments.results.documents import read_result, result_document
from pica.experiments.results.run import CURVE, METRICS, Measurement, RunMetrics

METHODS = {
    "PiCa r=64": ("pica", 64, [1e-3, 3e-3, 1e-2]),
    "LoRA r=1": ("lora", 1, [1e-3, 3e-3, 1e-2]),
    "LoRA r=8": ("lora", 8, [3e-4, 1e-3, 3e-3]),
}
TASKS = {
    "arithmetic": ("smollm2-arithmetic", "arithmetic/train.json", "arithmetic/AddSub.json"),
    "gsm8k": ("smollm2-gsm8k", "gsm8k/train.jsonl", "gsm8k/test.jsonl"),
}


class Cell(NamedTuple):
    """What one method did on one task: the run's metrics, and the points of its adapter's training."""

    metrics: RunMetrics
    curve: list[dict[str, str]]

    def document(self) -> dict[str, Any]:
        """As it is kept; where the model lies on this machine is nobody's business."""
        model = Path(self.metrics.model).name
        return result_document(self.metrics) | {"model": model, "curve": self.curve}


def run_cell(task: str, method: str, given: argparse.Namespace) -> Cell:
    """One method on one task, from its output folder if it is finished."""
    recipe, train, test = TASKS[task]
    name, rank, rates = METHODS[method]
    folder = Path(given.work) / f"{task}-{name}-r{rank}"
    if not (folder / METRICS).is_file():
        arguments = [
            "train",
            recipe,
            f"--model.path={given.model}",
            f"--model.dtype={given.dtype}",
            f"--output={folder}",
        ]
        arguments += [f"--data.train={given.data}/{train}", f"--data.test={given.data}/{test}"]
        arguments += [f"--adapter.method={name}", f"--adapter.r={rank}", f"--trainer.learning_rates={rates}"]
        arguments += [f"--evaluate_base={str(name == 'pica').lower()}", *given.override]
        unfinished = (folder / "recipe.resolved.yaml").is_file()
        command = ["train", "--resume", str(folder)] if unfinished else arguments
        # a process of its own for each cell: its peak memory is then its own
        subprocess.run([sys.executable, "-m", "pica", *command], check=True)
    with open(folder / CURVE, encoding="utf-8", newline="") as file:
        curve = [row for row in csv.DictReader(file) if row["run"] == "adapter"]
    return Cell(read_result(RunMetrics, folder / METRICS), curve)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M")
    parser.add_argument("--data", required=True, help="folder with arithmetic/ and gsm8k/")
    parser.add_argument("--work", default="outputs/real-input", help="folder for the runs")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("override", nargs="*", help="overrides for every run, e.g. -- --trainer.max_steps=60")
    given = parser.parse_args(argv)
    result = describe_machine() | {"tasks": {}}
    markdown = ""
    for task in given.tasks:
        cells = {method: run_cell(task, method, given) for method in METHODS}
        first = cells["PiCa r=64"].metrics
        assert first.base is not None
        reference = cells["LoRA r=8"].metrics.adapter.training
        rows = [["no adapter", "0", "", f"{first.base.loss:.4f}", percent(first.base), "", "", "", ""]]
        for method, cell in cells.items():
            a = cell.metrics.adapter
            chosen = f"{a.learning_rate:g} of {', '.join(f'{c.learning_rate:g}' for c in a.candidates)}"
            time = (a.training.step_seconds or math.nan) / (reference.step_seconds or math.nan)
            memory = a.training.peak_memory["host"] / reference.peak_memory["host"]
            measured = [f"{a.loss:.4f}", percent(a), f"{a.file_bytes:,}", f"{time:.2f}", f"{memory:.2f}"]
            rows.append([method, f"{a.parameters.trainable:,}", chosen, *measured, str(a.training.steps)])
        header = ["method", "trainable", "learning rate", "held-out loss", "accuracy", "adapter bytes"]
        header += ["step time / LoRA r=8", "peak memory / LoRA r=8", "steps"]
        markdown += (
            f"## {task}: SmolLM2-135M, {first.problems.test} test problems, seed 0\n\n" + table(header, rows) + "\n"
        )
        result["tasks"][task] = {method: cell.document() for method, cell in cells.items()}
        plot(task, cells)
    save("real_input", result, markdown)
    print(markdown)
    return 0


def percent(measured: Measurement) -> str:
    return f"{measured.score:.1%} ± {measured.stderr:.1%}"


def plot(task: str, cells: dict[str, Cell]) -> None:
    """Loss curves of the chosen learning rates, as PNG beside the tables."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for (method, cell), style in zip(cells.items(), ("-", "--", ":")):
        adapter = cell.metrics.adapter
        points = [p for p in cell.curve if float(p["peak_rate"]) == adapter.learning_rate]
        steps, losses = [int(p["step"]) for p in points], [float(p["loss"]) for p in points]
        count = adapter.parameters.trainable
        axes.plot(steps, losses, style, label=f"{method} ({count:,} parameters)", linewidth=1.8)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss")
    axes.set_title(f"SmolLM2-135M on {task}, each at its chosen learning rate", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(RESULTS / f"real_input-{task}.png", dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
