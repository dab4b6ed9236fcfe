"""Batches that mix adapters, decoding with a cache of keys and values, beside the least that the machine could take.

    python -m benchmarks.mixed_batches [--quick] [--model FOLDER]

The limit of a step is the time of the frozen model's own step, plus the adapters' matrices read once a layer at the
bandwidth of a plain read of a tensor as large as all of them, plus the products that give h = P x. All of it is measured
in one process, the cases taking turns. "prefill" samples have 32 tokens and no limit of their own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import pica
from benchmarks.harness import describe_machine, interleaved, ratios, save, table
from benchmarks.models import TARGETS, load, title
from pica.tuners.pica.layer import PicaLinear

RANK = 32
CASES = [(16, 16), (64, 64), (256, 256), (64, 4), (256, 4), (256, 16)]
"""(samples, adapters), one token each."""
PREFILL = [(16, 16), (64, 64)]
PREFILL_TOKENS, CONTEXT = 32, 16
STREAM = 2**30
"""Bytes of the tensor whose read gives the bandwidth of memory."""


def with_adapters(name: str, count: int, dtype: torch.dtype) -> PeftModel:
    """A model with adapters a0, a1, ... of different values; none of them is being trained."""
    model = get_peft_model(load(name, dtype), pica.PicaConfig(r=RANK, target_modules=TARGETS), adapter_name="a0")
    assert isinstance(model, PeftModel)
    for adapter in range(1, count):
        model.add_adapter(f"a{adapter}", pica.PicaConfig(r=RANK, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "pica_M" in path:
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def read_seconds(count: int, repetitions: int) -> Callable[[], None]:
    """Read `count` bytes `repetitions` times."""
    held = torch.ones(max(1, count // 4))

    def read() -> None:
        for _ in range(repetitions):
            held.sum()

    return read


class Decoder:
    """One decoding step of a model, from a cache that is as long before each step."""

    def __init__(self, base: PreTrainedModel, samples: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(10, vocabulary, (samples, CONTEXT), generator=generator)
        self.cache, self.token = DynamicCache(config=base.config), prompt[:, -1:]
        base(input_ids=prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    def step(self, model: Any, **kwargs: Any) -> Tensor:
        logits = model(
            input_ids=self.token, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **kwargs
        ).logits
        self.cache.crop(-1)
        return logits


def projections(model: PeftModel, samples: int, dtype: torch.dtype) -> Callable[[], None]:
    """The products h = P x of every layer, and nothing else."""
    work = []
    for layer in (m for m in model.modules() if isinstance(m, PicaLinear)):
        rows = layer.method.first_directions("a0")
        work.append((torch.randn(samples, 1, rows.shape[1], dtype=dtype), rows))

    def project() -> None:
        for x, rows in work:
            F.linear(x, rows)

    return project


def decode(model: PeftModel, base: PreTrainedModel, samples: int, adapters: int, repetitions: int) -> dict[str, Any]:
    """Times of one step over that of the frozen model's."""
    layers = [m for m in model.modules() if isinstance(m, PicaLinear)]
    size = base.dtype.itemsize
    own = sum(p.numel() for n, p in model.named_parameters() if "pica_M.a0." in n) * size
    once_a_layer = sum(layer.matrix("a0").numel() for layer in layers) * size
    names = [f"a{i % adapters}" for i in range(samples)]
    decoder = Decoder(base, samples, 1000)
    model.set_adapter("a0")
    model.requires_grad_(False)
    cases: dict[str, Callable[[], Any]] = {
        "base": lambda: decoder.step(base),
        "one": lambda: decoder.step(model),
        "mixed": lambda: decoder.step(model, adapter_names=names),
        "read": read_seconds(own * adapters, once_a_layer // own),
        "stream": read_seconds(STREAM, 1),
        "projections": projections(model, samples, base.dtype),
    }
    taken = interleaved(cases, repetitions=repetitions, warmup=2)
    bandwidth = statistics.median(STREAM / seconds for seconds in taken["stream"])
    bytes_read = once_a_layer * adapters
    taken["limit"] = [sum(parts) for parts in zip(taken["base"], taken["read"], taken["projections"])]
    taken["stream limit"] = [b + bytes_read / bandwidth + p for b, p in zip(taken["base"], taken["projections"])]
    return {
        "samples": samples,
        "adapters": adapters,
        "bytes_read": bytes_read,
        "stream_gb_s": round(bandwidth / 1e9, 2),
        "read_gb_s": round(statistics.median(bytes_read / s for s in taken["read"]) / 1e9, 2),
        "over_base": ratios(taken, "base"),
        "share_of_limit": _inverse(ratios(taken, "limit")["mixed"]),
        "share_of_stream_limit": _inverse(ratios(taken, "stream limit")["mixed"]),
        "one_share_of_limit": _inverse(ratios(taken, "limit")["one"]),
        "share_of_one": _inverse(ratios(taken, "one")["mixed"]),
        "base_ms": round(1e3 * statistics.median(taken["base"]), 2),
    }


def prefill(model: PeftModel, samples: int, adapters: int, repetitions: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 1000, (samples, PREFILL_TOKENS), generator=generator)
    names = [f"a{i % adapters}" for i in range(samples)]
    model.set_adapter("a0")
    cases: dict[str, Callable[[], Any]] = {
        "one": lambda: model(input_ids=ids, logits_to_keep=1),
        "mixed": lambda: model(input_ids=ids, adapter_names=names, logits_to_keep=1),
    }
    taken = interleaved(cases, repetitions=repetitions)
    return {"samples": samples, "adapters": adapters, "share_of_one": _inverse(ratios(taken, "one")["mixed"])}


def _inverse(found: dict[str, float]) -> dict[str, float]:
    """A ratio of times as one of throughputs."""
    return {
        "ratio": round(1 / found["ratio"], 4),
        "lower": round(1 / found["upper"], 4),
        "upper": round(1 / found["lower"], 4),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="folder, or a name in benchmarks/models.py")
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--most", type=int, default=256, help="adapters and samples at most (%(default)s)")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--no-prefill", action="store_true", help="decoding only")
    parser.add_argument("--quick", action="store_true", help="up to 16 samples, three repetitions")
    parser.add_argument("--name", default="mixed_batches", help="of the result files")
    given = parser.parse_args(argv)
    most, repetitions = (16, 3) if given.quick else (given.most, given.repetitions)
    result, rows = describe_machine(), []
    for dtype in given.dtype:
        decoded_cases = [case for case in CASES if max(case) <= most]
        prefilled_cases = [] if given.no_prefill else [case for case in PREFILL if max(case) <= most]
        count = max(adapters for _, adapters in decoded_cases)
        base = load(given.model, getattr(torch, dtype)).eval()
        model = with_adapters(given.model, count, getattr(torch, dtype))
        with torch.no_grad():
            decoded = [decode(model, base, *case, repetitions) for case in decoded_cases]
            prefilled = [prefill(model, *case, max(3, repetitions // 3)) for case in prefilled_cases]
        result[dtype] = {"decode": decoded, "prefill": prefilled}
        del model, base
        for found in decoded:
            shares = [_shown(found[key]) for key in ("share_of_limit", "share_of_stream_limit", "share_of_one")]
            before = next((p for p in prefilled if _case(p) == _case(found)), None)
            limit = f"{found['over_base']['limit']['ratio']:.2f}"
            ahead = "–" if before is None else _shown(before["share_of_one"])
            rows.append([dtype, *_case(found), limit, *shares, ahead])
            print(rows[-1], found["base_ms"], found["read_gb_s"], found["stream_gb_s"], flush=True)
    header = ["dtype", "samples", "adapters", "limit / base", "share of the limit", "of the limit by memory"]
    header += ["of one adapter", "prefill, of one adapter"]
    markdown = (
        f"{title(given.model)}, r={RANK}, {result['machine']['cores']} cores. Throughput of one decoding step with mixed "
        "adapters. Median, and the middle half of the rounds.\n\n"
    )
    markdown += table(header, rows)
    save(given.name, result, markdown)
    print(markdown)
    return 0


def _case(found: dict[str, Any]) -> tuple[int, int]:
    return found["samples"], found["adapters"]


def _shown(found: dict[str, float]) -> str:
    return f"{found['ratio']:.2f} ({found['lower']:.2f} to {found['upper']:.2f})"


if __name__ == "__main__":
    sys.exit(main())
