"""Many adapters on one base model: batches that mix them, the memory of one more, and loading hundreds from disk.

    python -m benchmarks.many_adapters [--quick] [--model FOLDER]

Throughput: one forward pass over a batch of N samples, each with its own adapter, against the same batch with one
adapter for all. "prefill" samples have 32 tokens, "decode" samples one. LoRA is measured at equal rank, and at its
smallest, which is still more parameters than PiCa's. PEFT adds LoRA adapters in a time that grows with those already
there, so N stops earlier for them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel, get_peft_model

from benchmarks.harness import describe_machine, interleaved, ratios, save, table
from benchmarks.methods import CONFIGS
from benchmarks.models import load, title
from pica.tuners.pica.layer import PicaLinear

COUNTS = [1, 4, 16, 64, 256]
LORA_LIMIT = 16


def resident() -> float:
    """MiB, without what was freed and is still held by malloc: it would hide as much of what is taken next."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
    return psutil.Process().memory_info().rss / 2**20


def with_adapters(model_name: str, method: str, count: int, dtype: torch.dtype) -> tuple[PeftModel, dict[str, float]]:
    """A model with adapters a0, a1, ... of different values, and what one more took: MiB, and seconds for the last."""
    model = get_peft_model(load(model_name, dtype), CONFIGS[method](), adapter_name="a0")
    assert isinstance(model, PeftModel)
    for adapter in range(1, 2):
        model.add_adapter(f"a{adapter}", CONFIGS[method]())
    before, seconds = resident(), 0.0
    for adapter in range(2, count):
        begun = time.perf_counter()
        model.add_adapter(f"a{adapter}", CONFIGS[method]())
        seconds = time.perf_counter() - begun
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "pica_M" in name or "lora_B" in name:
            parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    more = max(1, count - 2)
    return model.eval(), {"mib": (resident() - before) / more, "seconds_of_last": seconds}


def mixed(model: PeftModel, counts: list[int], tokens: int, repetitions: int) -> dict[int, dict[str, float]]:
    """For each N the time of a mixed batch of N samples over that of the same batch with adapter a0 for all."""
    found = {}
    for count in counts:
        ids = torch.randint(10, 1000, (count, tokens), generator=torch.Generator().manual_seed(0))
        names = [f"a{i}" for i in range(count)]
        model.set_adapter("a0")
        with torch.no_grad():
            cases: dict[str, Callable[[], Any]] = {
                "one": lambda ids=ids: model(input_ids=ids, logits_to_keep=1),
                "mixed": lambda ids=ids, names=names: model(input_ids=ids, adapter_names=names, logits_to_keep=1),
            }
            found[count] = ratios(interleaved(cases, repetitions=repetitions), "one")["mixed"]
    return found


def loading(model_name: str, method: str, count: int, dtype: torch.dtype) -> dict[str, float]:
    """Load one saved adapter under `count` names: seconds of the first, of a later one, MiB for each."""
    with tempfile.TemporaryDirectory() as folder:
        saved = get_peft_model(load(model_name, dtype), CONFIGS[method]())
        saved.save_pretrained(folder)
        del saved
        base = load(model_name, dtype)
        begun = time.perf_counter()
        model = PeftModel.from_pretrained(base, folder, adapter_name="a0")
        first = time.perf_counter() - begun
        model.load_adapter(folder, adapter_name="a1")
        before, taken = resident(), []
        for adapter in range(2, count):
            begun = time.perf_counter()
            model.load_adapter(folder, adapter_name=f"a{adapter}")
            taken.append(time.perf_counter() - begun)
        size = sum(p.stat().st_size for p in Path(folder).iterdir()) / 2**20
        tail = sorted(taken[-8:])
        bases = sum(b.nbytes for m in model.modules() if isinstance(m, PicaLinear) for b in m.buffers()) / 2**20
        return {
            "first_seconds": first,
            "last_seconds": tail[len(tail) // 2],
            "mib": (resident() - before) / max(1, count - 2),
            "file_mib": size,
            "bases_mib": bases,
        }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="folder, or a name in benchmarks/models.py")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--most", type=int, default=COUNTS[-1], help="adapters at most (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="up to 16 adapters of each method")
    parser.add_argument("--name", default="many_adapters", help="of the result files")
    parser.add_argument("--loading-of", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    dtype, result = getattr(torch, given.dtype), describe_machine()
    if given.loading_of:
        print(json.dumps(loading(given.model, given.loading_of, given.most, dtype)))
        return 0
    limit = 16 if given.quick else given.most
    rows, load_rows = [], []
    for method in ("PiCa r=32", "LoRA r=1", "LoRA r=32"):
        most = min(limit, limit if method.startswith("PiCa") else LORA_LIMIT)
        counts = [n for n in COUNTS if n <= most]
        model, more = with_adapters(given.model, method, most, dtype)
        repetitions = 2 if given.quick else 3
        found = {"prefill": mixed(model, counts, 32, repetitions), "decode": mixed(model, counts, 1, repetitions)}
        size = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".a0." in n) / 2**20
        result[method] = found | {"one_more": more, "own_mib": size}
        for count in (n for n in COUNTS if n <= limit):
            shares = [f"{1 / found[kind][count]['ratio']:.2f}" if count in counts else "–" for kind in found]
            rows.append([method, count, *shares])
        del model
        loaded = loading(given.model, method, 8, dtype) if given.quick else _loading_in_a_process(given, method, most)
        result[method]["loading"] = loaded
        ratio = f"{loaded['last_seconds'] / loaded['first_seconds']:.2f}"
        load_rows.append([method, f"{size:.2f}", f"{more['mib']:.2f}", f"{loaded['mib']:.2f}", ratio])
    markdown = (
        f"{title(given.model)}, {given.dtype}, {result['machine']['cores']} cores. Throughput of N mixed adapters "
    )
    markdown += "over that of the same batch with one.\n\n"
    markdown += table(["method", "N", "prefill, 32 tokens", "decode, 1 token"], rows)
    markdown += "\nOne more adapter.\n\n"
    header = ["method", "its matrices, MiB", "added, MiB", "loaded from disk, MiB", "time to load / first load"]
    markdown += table(header, load_rows)
    save(given.name, result, markdown)
    print(markdown)
    return 0


def _loading_in_a_process(given: argparse.Namespace, method: str, count: int) -> dict[str, float]:
    """In a process of its own, since what earlier models left free would hide the memory that is taken."""
    command = [sys.executable, "-m", "benchmarks.many_adapters", "--loading-of", method, "--model", given.model]
    command += ["--dtype", given.dtype, "--most", str(count)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
