"""Time and memory of the bases beside the reference's full SVD (torch.linalg.svd in float32 of each target weight).

python -m benchmarks.basis [--quick]
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["PICA_CACHE_DIR"] = ""  # solving is what is measured

import psutil
import torch
from torch import Tensor

from benchmarks.harness import describe_machine, interleaved, ratios, save, table
from pica.basis import BasisRequest, Side, solve_many
from pica.experiments.measuring import PeakMemory

# q, k, v, up, down of one block: (out, in)
BLOCKS: dict[str, tuple[list[tuple[int, int]], int, int]] = {
    "SmolLM2-135M": ([(576, 576), (192, 576), (192, 576), (1536, 576), (576, 1536)], 128, 6),
    "Gemma-2B": ([(2048, 2048), (256, 2048), (256, 2048), (16384, 2048), (2048, 16384)], 256, 1),
}


def weight(out: int, inn: int, seed: int) -> Tensor:
    """Random, with singular values that decay slowly, as those of trained weights do."""
    w = torch.randn(out, inn, generator=torch.Generator().manual_seed(seed))
    decay = (1 + torch.arange(min(out, inn))).float() ** -0.3
    return w * decay if inn <= out else w * decay[:, None]


Load = Callable[[BasisRequest], tuple[Tensor, Side]]


def task(shapes: list[tuple[int, int]], rank: int, blocks: int) -> tuple[list[Tensor], list[BasisRequest], Load]:
    """The weights, and what `solve_many` takes to solve them."""
    weights = [weight(out, inn, seed) for seed in range(blocks) for out, inn in shapes]
    by_name = {str(i): w for i, w in enumerate(weights)}

    def load(request: BasisRequest) -> tuple[Tensor, Side]:
        w = by_name[request.name]
        return w, "in" if w.shape[1] <= len(w) else "out"

    return weights, [BasisRequest(name, min(rank, *w.shape)) for name, w in by_name.items()], load


def measure(shapes: list[tuple[int, int]], rank: int, blocks: int, repetitions: int, warmup: int) -> dict[str, Any]:
    weights, requests, load = task(shapes, rank, blocks)

    def pica() -> None:
        solve_many(requests, load)

    def reference() -> None:
        for w in weights:
            torch.linalg.svd(w, full_matrices=False)

    taken = interleaved({"full SVD": reference, "pica": pica}, repetitions=repetitions, warmup=warmup)
    return {"seconds": taken, "ratio": ratios(taken, "full SVD")["pica"]}


def beyond_gram(shapes: list[tuple[int, int]], rank: int) -> float:
    """Peak MiB of solving one block beyond its largest Gram matrix; the bases themselves are counted in.

    Measured on the second solve: the buffers that BLAS keeps for each thread are there before, once for the process.
    """
    _, requests, load = task(shapes, rank, 1)
    solve_many(requests, load)
    gc.collect()
    resting = psutil.Process().memory_info().rss / 2**20
    peak = PeakMemory()
    bases = solve_many(requests, load)
    assert len(bases) == len(shapes)
    return peak.read()["host"] - resting - max(min(s) for s in shapes) ** 2 * 4 / 2**20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, without Gemma-2B's two large weights")
    parser.add_argument("--name", default="basis", help="of the result files")
    given = parser.parse_args(argv)
    result: dict[str, Any] = describe_machine()
    rows = []
    for name, (shapes, rank, blocks) in BLOCKS.items():
        large = max(max(s) for s in shapes) > 4096
        used = [s for s in shapes if max(s) <= 4096] if given.quick else shapes
        repetitions = 1 if given.quick else 3 if large else 5
        found = measure(used, rank, blocks, repetitions, warmup=1)
        memory = beyond_gram(used, rank)
        result[name] = found | {"beyond_gram_mib": memory, "shapes": used, "rank": rank, "blocks": blocks}
        rows.append([f"{name}, {blocks} block(s)", rank, f"{found['ratio']['ratio']:.3f}", f"{max(0.0, memory):.0f}"])
    markdown = f"Bases of q k v up down, random weights, {result['machine']['cores']} cores.\n\n" + table(
        ["weights", "r", "time / full SVD", "peak MiB beyond the Gram matrix"], rows
    )
    save(given.name, result, markdown)
    print(markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
