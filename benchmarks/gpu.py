"""PiCa beside its rivals on an accelerator: one command, at most ten minutes, nothing downloaded.

    python -m benchmarks.gpu [--models gemma-2b,llama-3-8b] [--seconds 560]

Builds models of published shapes with random weights on the device and measures, in bfloat16: the time of the bases
(beside the full SVD of one block's weights, which is what the reference does to every block) and of a basis of activations
on 16,384 tokens, a training step's time, tokens a second and peak memory (also with Liger's kernels, where they can be
imported), and mixed batches. Whatever no longer fits in the given time is left out, and listed as left out. Needs only
torch, transformers, peft and this project.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["PICA_CACHE_DIR"] = ""  # solving is measured

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

import pica
from benchmarks.harness import describe_machine, save, table
from benchmarks.methods import FLOOR, adapt, trainable
from benchmarks.models import SHAPES, TARGETS, load
from pica.calibration.making import directions, target_layers
from pica.calibration.texts import Calibration

METHODS = [
    FLOOR,
    "PiCa r=32",
    "PiCa r=128",
    "PiCa r=256",
    "reference PiCa r=32",
    "reference PiCa r=256",
    "LoRA r=1",
    "LoRA r=8",
    "LoRA r=32",
    "DoRA r=16",
    "VeRA r=256",
]
MIXED = [1, 4, 16, 64, 256]
LIGER = " with Liger kernels"
WITH_LIGER = [FLOOR, "PiCa r=32", "LoRA r=32"]
CALIBRATION = (32, 512)
"""Sequences and their tokens that a basis of activations looks at."""
LAST_START = 20.0  # seconds before the end after which nothing new is begun


class Clock:
    """Waits for the device before it reads the time, and knows when the time is up."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.end = device, time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    def seconds(self, call: Callable[[], Any]) -> float:
        self._wait()
        begun = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - begun

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.accelerator.synchronize()


def peak_memory(device: str, call: Callable[[], Any]) -> float:
    """Peak MiB of the device's allocator during `call`; 0 on a CPU."""
    if device != "cuda":
        call()
        return 0.0
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 2**20


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def training(name: str, method: str, device: str, clock: Clock, batch: int, length: int) -> dict[str, float]:
    """Seconds of a step (median of five after two), tokens a second, peak MiB, seconds to attach the adapter."""
    model = load(name, torch.bfloat16, device)
    if method.endswith(LIGER):
        apply_liger_kernel(model, {})
        method = method.removesuffix(LIGER)
    attached: list[nn.Module] = []
    attach = clock.seconds(lambda: attached.append(adapt(model, method)))
    adapted = attached[0]
    ids = torch.randint(10, 1000, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)

    def step() -> None:
        adapted(input_ids=ids, labels=ids).loss.backward()
        adapted.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    taken = [clock.seconds(step) for _ in range(5)]
    median = statistics.median(taken)
    found = {
        "trainable": trainable(adapted),
        "attach_seconds": attach,
        "step_seconds": median,
        "step_spread": (max(taken) - min(taken)) / median,
        "tokens_per_second": batch * length / median,
        "peak_mib": peak_memory(device, step),
    }
    return found


def bases(name: str, device: str, clock: Clock) -> dict[str, float]:
    """Seconds of all bases at r=256, and of the full SVD of the first block's weights times the number of blocks."""
    model = load(name, torch.bfloat16, device)
    blocks = model.config.get_text_config().num_hidden_layers
    first = [
        m.weight.detach().float()
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and ".0." in n and n.rpartition(".")[2] in TARGETS
    ]

    def svd() -> None:
        for w in first:
            torch.linalg.svd(w, full_matrices=False)

    rank = min(256, *(min(w.shape) for w in first))
    torch.linalg.eigh(torch.eye(8, device=device))  # the solver's library is loaded before anything is timed
    pica_seconds = clock.seconds(lambda: get_peft_model(model, pica.PicaConfig(r=rank, target_modules=TARGETS)))
    svd_block = clock.seconds(svd)
    return {"pica_seconds": pica_seconds, "svd_seconds": svd_block * blocks, "svd_measured_blocks": 1, "blocks": blocks}


def activation_basis(name: str, device: str, clock: Clock) -> dict[str, float]:
    """Seconds to make the basis of activations of all layers at r=256."""
    model = load(name, torch.bfloat16, device)
    linear = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith(tuple(TARGETS))]
    rank = min(256, *(min(m.weight.shape) for m in linear))
    config = pica.PicaConfig(r=rank, target_modules=TARGETS, projection="activation")
    count, length = CALIBRATION
    ids = torch.randint(10, 1000, (count, length), generator=torch.Generator().manual_seed(0)).to(device)
    read = Calibration([{"input_ids": row[None]} for row in ids], {})
    with target_layers(model, config) as layers:
        return {"seconds": clock.seconds(lambda: directions(model, layers, config, read)), "tokens": count * length}


def mixed(name: str, device: str, clock: Clock, tokens: int) -> dict[int, float]:
    """Throughput of a batch with N adapters over that of the same batch with one."""
    config = pica.PicaConfig(r=32, target_modules=TARGETS, init_weights=False)
    model = get_peft_model(load(name, torch.bfloat16, device), config, adapter_name="a0")
    assert isinstance(model, PeftModel)
    for adapter in range(1, MIXED[-1]):
        model.add_adapter(f"a{adapter}", config)
    model.eval()
    found = {}
    with torch.no_grad():
        for count in MIXED:
            ids = torch.randint(10, 1000, (count, tokens), generator=torch.Generator().manual_seed(0)).to(device)
            names = [f"a{i}" for i in range(count)]
            one, many = [], []
            for _ in range(4):
                one.append(clock.seconds(lambda ids=ids: model(input_ids=ids, logits_to_keep=1)))
                many.append(
                    clock.seconds(lambda ids=ids, n=names: model(input_ids=ids, adapter_names=n, logits_to_keep=1))
                )
            found[count] = statistics.median(one[1:]) / statistics.median(many[1:])
    return found


def measure_model(name: str, given: argparse.Namespace, clock: Clock) -> tuple[dict[str, Any], dict[str, str]]:
    """(what was measured, {what was left out: why})."""
    cases: dict[str, Callable[[], Any]] = {"bases": lambda: bases(name, given.device, clock)}
    cases["activation basis"] = lambda: activation_basis(name, given.device, clock)
    for method in METHODS + [f"{method}{LIGER}" for method in WITH_LIGER if is_liger_kernel_available()]:
        cases[method] = partial(training, name, method, given.device, clock, given.batch, given.length)
    cases["mixed prefill"] = lambda: mixed(name, given.device, clock, 128)
    cases["mixed decode"] = lambda: mixed(name, given.device, clock, 1)
    found: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for what, call in cases.items():
        if clock.left() < LAST_START:
            left_out[what] = "no time left"
            continue
        try:
            found[what] = call()
        except (RuntimeError, ValueError) as error:  # out of memory is a RuntimeError
            left_out[what] = str(error).splitlines()[0][:200]
        free()
        print(name, what, found.get(what, left_out.get(what)), flush=True)
    return found, left_out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="gemma-2b,llama-3-8b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=560.0, help="time for everything")
    parser.add_argument("--name", default="gpu", help="of the result files")
    parser.add_argument("--output", help="folder to write to instead of benchmarks/results")
    given = parser.parse_args(argv)
    clock, result, texts = Clock(given.device, given.seconds), describe_machine(), []
    device_name = torch.cuda.get_device_name() if given.device == "cuda" else given.device
    for name in given.models.split(","):
        found, left_out = measure_model(name, given, clock)
        result[name] = found | {"left_out": left_out}
        texts.append(_text(name, found, left_out, given.batch, given.length))
    markdown = f"{device_name}, bfloat16, random weights.\n\n" + "\n".join(texts)
    save(given.name, result, markdown, folder=Path(given.output) if given.output else None)
    print(markdown)
    return 0


def _text(name: str, found: dict[str, Any], left_out: dict[str, str], batch: int, length: int) -> str:
    text = f"## {name}\n\n"
    if "bases" in found:
        b = found["bases"]
        text += f"All bases at r=256 take {b['pica_seconds'] / b['svd_seconds']:.3f} of the full SVDs' time "
        text += f"(one block's measured, of {b['blocks']}).\n\n"
    if "activation basis" in found:
        b = found["activation basis"]
        text += f"The basis of activations at r=256 takes {b['seconds']:.1f} s on {b['tokens']:,} tokens.\n\n"
    floor = found.get(FLOOR)
    rows = []
    for method in METHODS + [f"{method}{LIGER}" for method in WITH_LIGER]:
        if method in found and floor:
            f = found[method]
            time_ratio = f"{f['step_seconds'] / floor['step_seconds']:.3f}"
            memory = f"{f['peak_mib'] / floor['peak_mib']:.3f}" if floor["peak_mib"] else "–"
            rows.append([method, f"{f['trainable']:,}", time_ratio, memory, f"{f['tokens_per_second']:,.0f}"])
    if rows:
        text += f"Training step, {batch} x {length} tokens.\n\n"
        text += table(["method", "trainable", "step time / frozen base", "peak memory / frozen base", "tokens/s"], rows)
    for kind in ("mixed prefill", "mixed decode"):
        if kind in found:
            shares = ", ".join(f"{n}: {share:.2f}" for n, share in found[kind].items())
            text += f"\n{kind}: throughput of N adapters (r=32) over one, by N: {shares}.\n"
    if left_out:
        text += "\nLeft out: " + "; ".join(f"{what} ({why})" for what, why in left_out.items()) + ".\n"
    return text


if __name__ == "__main__":
    sys.exit(main())
