"""Time and memory of a training step beside PEFT's LoRA and the frozen-base floor, on the same batch, in one run.

    python -m benchmarks.step_time --model ~/.cache/pica-models/smollm2-135m

Time: forward and backward of one batch, methods taking turns, medians, as ratios to the floor (the same model with no
adapter, gradients flowing through its activations). Memory: the peak of a process of its own for each method, above what
the loaded model takes, as ratios to the floor's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import pica
from benchmarks.harness import describe_machine, interleaved, ratios, save, table
from pica.experiments.measuring import PeakMemory

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
METHODS: dict[str, Callable[[], Any]] = {
    "floor": lambda: None,
    "PiCa r=32": lambda: pica.PicaConfig(r=32, target_modules=TARGETS),
    "PiCa r=64": lambda: pica.PicaConfig(r=64, target_modules=TARGETS),
    "PiCa r=128": lambda: pica.PicaConfig(r=128, target_modules=TARGETS),
    "LoRA r=1": lambda: LoraConfig(r=1, target_modules=TARGETS),
    "LoRA r=8": lambda: LoraConfig(r=8, target_modules=TARGETS),
}


def adapted(folder: str, method: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model with one method's adapter, in training mode."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = METHODS[method]()
    if config is None:
        model.requires_grad_(False)
        model.enable_input_require_grads()  # the floor: gradients go through every layer, and into no weight
        return model.train()
    return get_peft_model(model, config).train()


def step(model: torch.nn.Module, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)


def measure_memory(folder: str, method: str, dtype: torch.dtype, ids: torch.Tensor) -> float:
    """MiB above the loaded model at the peak of a step."""
    model = adapted(folder, method, dtype)
    before = PeakMemory().read()["host"]
    peak = PeakMemory()
    for _ in range(2):
        step(model, ids)
    return peak.read()["host"] - before


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a causal language model")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--name", default="step_time", help="of the result files")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    folder, dtype = str(Path(given.model).expanduser()), getattr(torch, given.dtype)
    ids = torch.randint(10, 1000, (given.batch, given.length), generator=torch.Generator().manual_seed(0))
    if given.memory_of:
        print(json.dumps(measure_memory(folder, given.memory_of, dtype, ids)))
        return 0

    result = describe_machine()
    memory = {}
    for method in METHODS:
        command = [sys.executable, "-m", "benchmarks.step_time", "--memory-of", method, "--model", folder]
        command += ["--dtype", given.dtype, "--batch", str(given.batch), "--length", str(given.length)]
        memory[method] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    models = {method: adapted(folder, method, dtype) for method in METHODS}
    cases = {method: (lambda m=model: step(m, ids)) for method, model in models.items()}
    taken = interleaved(cases, repetitions=given.repetitions)
    time_ratio = ratios(taken, "floor")
    rows = []
    for method, model in models.items():
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        r = time_ratio[method]
        spread = f"{r['lower']:.2f} to {r['upper']:.2f}"
        rows.append([method, f"{count:,}", f"{r['ratio']:.3f}", spread, f"{memory[method] / memory['floor']:.3f}"])
    shape = f"{given.batch} x {given.length} tokens, {given.dtype}, {result['machine']['cores']} cores"
    header = ["method", "trainable", "step time / floor", "middle half", "step memory / floor"]
    markdown = f"Training step of {Path(folder).name}, {shape}. Medians of {given.repetitions} rounds.\n\n" + table(
        header, rows
    )
    result |= {"batch": [given.batch, given.length], "dtype": given.dtype, "model": Path(folder).name}
    result |= {"seconds": taken, "time_ratio": time_ratio, "memory_mib": memory}
    save(given.name, result, markdown)
    print(markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
