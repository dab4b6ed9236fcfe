"""Time and memory of a training step beside PEFT's methods, the reference formulation and the frozen-base floor.

    python -m benchmarks.step_time [--quick] [--model FOLDER]
    python -m benchmarks.step_time --compile --layers 4 --name step_time_compiled
    python -m benchmarks.step_time --model gemma-2b --layers 1 --length 128 --quick --repetitions 9 --name step_time_gemma

Time: forward and backward of one batch, methods taking turns on it, medians, as ratios to the floor (the same model
with no adapter, gradients flowing through its activations). Memory: the peak of a process of its own for each method,
above what the loaded and adapted model takes, as ratios to the floor's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import psutil
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from benchmarks.harness import describe_machine, interleaved, ratios, save, table
from benchmarks.methods import ALL, FEWEST, FLOOR, REFERENCE, adapt, trainable
from benchmarks.models import load, title
from pica.experiments.measuring import PeakMemory


def step(model: nn.Module, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)


def _load(given: argparse.Namespace) -> PreTrainedModel:
    return load(given.model, getattr(torch, given.dtype), layers=given.layers)


def _compiled_step(model: nn.Module, ids: torch.Tensor) -> Callable[[], None]:
    """A step of the model compiled whole, on embeddings that want a gradient: a hook that asks for one breaks the graph."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if getattr(base, "_require_grads_hooks", None):
        base.disable_input_require_grads()
    embeddings = base.get_input_embeddings()(ids).detach().requires_grad_()
    compiled = torch.compile(model, fullgraph=True)

    def run() -> None:
        compiled(inputs_embeds=embeddings, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)
        embeddings.grad = None

    return run


def tokens(batch: int, length: int, device: str = "cpu") -> torch.Tensor:
    return torch.randint(10, 1000, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)


def measure_memory(given: argparse.Namespace, ids: torch.Tensor) -> float:
    """MiB above the loaded and adapted model at the peak of a step."""
    model = adapt(_load(given), given.memory_of)
    for _ in range(2):  # the allocator's pools are filled before anything is measured
        step(model, ids)
    resting = psutil.Process().memory_info().rss / 2**20
    peak = PeakMemory()
    step(model, ids)
    return peak.read()["host"] - resting


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="folder, or a name in benchmarks/models.py")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repetitions", type=int)
    parser.add_argument("--layers", type=int, help="of the model's shapes, with a small vocabulary")
    parser.add_argument("--compile", action="store_true", help="torch.compile of each whole model; no memory")
    parser.add_argument("--methods", help="names, separated by semicolons")
    parser.add_argument("--quick", action="store_true", help="five methods, four rounds, no memory")
    parser.add_argument("--name", default="step_time", help="of the result files")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    ids = tokens(given.batch, given.length)
    if given.memory_of:
        print(json.dumps(measure_memory(given, ids)))
        return 0

    methods = [FLOOR, *(given.methods.split(";") if given.methods else FEWEST if given.quick or given.compile else ALL)]
    repetitions = given.repetitions or (4 if given.quick else 9)
    result: dict[str, Any] = describe_machine()
    memory = {} if given.quick or given.compile else {method: _memory_in_a_process(given, method) for method in methods}
    models = {method: adapt(_load(given), method) for method in methods}
    counts = {method: trainable(model) for method, model in models.items()}
    if given.compile:
        torch._dynamo.config.recompile_limit = 64  # pyright: ignore[reportPrivateImportUsage] - one graph a method
        cases = {method: _compiled_step(model, ids) for method, model in models.items()}
    else:
        cases = {method: (lambda m=model: step(m, ids)) for method, model in models.items()}
    taken = interleaved(cases, repetitions=repetitions)
    time_ratio = ratios(taken, FLOOR)
    rows = []
    for method in methods:
        r = time_ratio[method]
        row = [method, f"{counts[method]:,}", f"{r['ratio']:.3f}", f"{r['lower']:.2f} to {r['upper']:.2f}"]
        rows.append(row + ([f"{memory[method] / memory[FLOOR]:.3f}"] if memory else []))
    header = ["method", "trainable", "step time / frozen base", "middle half", "step memory / frozen base"]
    shape = f"{given.batch} x {given.length} tokens, {given.dtype}, {result['machine']['cores']} cores"
    what = "Training step, compiled whole," if given.compile else "Training step,"
    markdown = f"{what} {title(given.model, given.layers)}, {shape}; medians of {repetitions} rounds.\n\n"
    markdown += table(header[: len(rows[0])], rows)
    beside = {rank: f"{REFERENCE}{rank}" for rank in (8, 32, 128, 256) if f"{REFERENCE}{rank}" in methods}
    beside_reference = {
        rank: ratios({name: taken[f"PiCa r={rank}"], "ref": taken[name]}, "ref")[name]
        for rank, name in beside.items()
        if f"PiCa r={rank}" in methods
    }
    if beside_reference:
        shown = [
            f"{r['ratio']:.3f} ({r['lower']:.2f} to {r['upper']:.2f}) at r={n}" for n, r in beside_reference.items()
        ]
        markdown += f"\nPiCa's step over that of the reference formulation: {', '.join(shown)}.\n"
    result |= {"over_reference": beside_reference}
    result |= {"batch": [given.batch, given.length], "dtype": given.dtype, "model": title(given.model, given.layers)}
    result |= {"compiled": given.compile}
    result |= {"seconds": taken, "time_ratio": time_ratio, "memory_mib": memory, "trainable": counts}
    save(given.name, result, markdown)
    print(markdown)
    return 0


def _memory_in_a_process(given: argparse.Namespace, method: str) -> float:
    command = [sys.executable, "-m", "benchmarks.step_time", "--memory-of", method, "--model", given.model]
    command += ["--dtype", given.dtype, "--batch", str(given.batch), "--length", str(given.length)]
    command += ["--layers", str(given.layers)] if given.layers else []
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


if __name__ == "__main__":
    sys.exit(main())
