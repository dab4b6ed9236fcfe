"""What a table would take, before it begins: memory and disk by `pica plan`, hours by timing some of the model's layers.

A layer more or less takes as long as any other, so a model of one layer and one of three, with the real widths and the real
vocabulary but random weights, tell what the whole one takes. Nothing is downloaded for that but a configuration.
"""

from __future__ import annotations

import copy
import gc
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from benchmarks.harness import table
from pica.experiments.methods import configuration
from pica.experiments.models import load_config
from pica.experiments.plan.planning import Question, estimate
from pica.experiments.recipes.recipe import AdapterSection, ModelSection

FEW, MORE = 1, 3
"""Layers of the two models that are timed."""
REPETITIONS = 3
GIB = 2**30
_SPARE = 1.15
"""Memory beyond what is planned: work space of kernels, and what an allocator wastes."""


@dataclass(frozen=True)
class Work:
    """What a row does, in numbers.

    Attributes:
        steps: Forward and backward passes of one training.
        batch, tokens: Of each.
        answer_batches, answer_batch: Of the test problems.
        answer_tokens: Longest answer; a batch goes on until its last one ends.
    """

    steps: int
    batch: int
    tokens: int
    answer_batches: int
    answer_batch: int
    answer_tokens: int


def work_of(shared: Mapping[str, Any], train_examples: int, test_examples: int, tokens: int) -> Work:
    """From a comparison's shared fields; one tenth of the training problems, 1,000 at most, chooses the rates."""
    trainer, task = shared["trainer"], shared["task"]
    learnt = train_examples - min(1000, train_examples // 10)
    steps = trainer.get("max_steps", math.inf) * trainer.get("accumulation", 1)
    return Work(
        steps=int(min(steps, math.ceil(trainer.get("epochs", 1) * learnt / trainer["batch_size"]))),
        batch=trainer["batch_size"],
        tokens=min(tokens, trainer["max_length"]),
        answer_batches=math.ceil(test_examples / trainer["eval_batch_size"]),
        answer_batch=trainer["eval_batch_size"],
        answer_tokens=task["max_new_tokens"],
    )


@dataclass(frozen=True)
class Timed:
    """Seconds of one forward and backward pass, and of one token for each answer of a batch, of the whole model."""

    step: float
    token: float

    def hours(self, work: Work, trainings: int) -> float:
        """Of one cell: its trainings, and the answers to the test problems."""
        answers = work.answer_batches * work.answer_tokens * self.token
        return (trainings * work.steps * self.step + answers) / 3600


def time_row(config: PreTrainedConfig, adapter: Mapping[str, Any], work: Work, device: torch.device) -> Timed:
    """Time a method on `FEW` and on `MORE` of a model's layers, and say what all of them would take."""
    few, more = (_slice_seconds(config, layers, adapter, work, device) for layers in (FEW, MORE))
    layers = config.get_text_config().num_hidden_layers
    return Timed(*(a + max(0.0, b - a) * (layers - FEW) / (MORE - FEW) for a, b in zip(few, more)))


def _slice_seconds(
    config: PreTrainedConfig, layers: int, adapter: Mapping[str, Any], work: Work, device: torch.device
) -> tuple[float, float]:
    gc.collect()  # what was timed before
    if device.type != "cpu":
        torch.accelerator.empty_cache()
    cut = copy.deepcopy(config)
    cut.update({"num_hidden_layers": layers})
    if getattr(cut, "layer_types", None):
        cut.update({"layer_types": cut.layer_types[:layers]})
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(cut, dtype=torch.bfloat16)
    # a basis that looks at data takes as long in a step as any other
    section = AdapterSection(**{name: value for name, value in adapter.items() if value != "activation"})
    model: Any = get_peft_model(base, configuration(section))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    ids = torch.randint(3, config.get_text_config().vocab_size, (work.batch, work.tokens), device=device)

    def step() -> None:
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    cache: Any = DynamicCache(config=cut)
    asked = ids[:1, :1].expand(work.answer_batch, work.tokens)
    model.eval()
    with torch.no_grad():
        model(input_ids=asked, past_key_values=cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def token() -> None:
        model.eval()
        model(input_ids=asked[:, :1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-1)

    return _median_seconds(step, device), _median_seconds(token, device)


def _median_seconds(call: Callable[[], None], device: torch.device) -> float:
    taken = []
    for _ in range(REPETITIONS + 1):
        begun = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[1:])


@dataclass(frozen=True)
class Need:
    """Bytes that are needed and bytes that are there.

    Attributes:
        what: In words.
    """

    what: str
    needed: int
    available: int

    @property
    def lacking(self) -> bool:
        return self.needed > self.available


def needs(
    model: str, rows: Sequence[Mapping[str, Any]], work: Work, *, length: int, work_folder: Path, device: torch.device
) -> list[Need]:
    """Memory of the largest PiCa and the largest LoRA among the rows, and disk for the model, the bases and the runs."""
    ranks = {
        method: max((row["r"] for row in rows if row["method"] == method), default=1) for method in ("pica", "lora")
    }
    planned = estimate(
        Question(
            model,
            r=ranks["pica"],
            lora_rank=ranks["lora"],
            target_modules=next(list(row["target_modules"]) for row in rows if row["method"] == "pica"),
            batches=[work.batch],
            lengths=[length],
            dtype="bfloat16",
            checkpointing=True,
        )
    )
    found = [
        Need(
            f"memory to train {memory.method} r={memory.rank}",
            int(_SPARE * memory.steps[0].total),
            _memory(device),
        )
        for memory in planned.memory
        if memory.steps[0].total is not None
    ]
    weights = 0 if Path(model).is_dir() else planned.memory[0].weights
    runs = len(rows) * 4 * planned.adapter_bytes + planned.cache_bytes
    home = Path(os.environ.get("HF_HOME", Path.home()))
    return [
        *found,
        Need("disk for the model's files", weights, _free(home)),
        Need("disk for bases, adapters and checkpoints", runs, _free(work_folder)),
    ]


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().available


def _free(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def needs_table(found: Sequence[Need]) -> str:
    """As Markdown, in GiB."""
    rows = [
        [need.what, f"{need.needed / GIB:.1f}", f"{need.available / GIB:.1f}", "too little" if need.lacking else ""]
        for need in found
    ]
    return table(["what", "needed, GiB", "there, GiB", ""], rows)


def hours_table(
    model: str,
    rows: Mapping[str, Mapping[str, Any]],
    grids: Mapping[str, int],
    work: Work,
    seeds: int,
    device: torch.device,
) -> str:
    """Time every row's layers here, and say in Markdown how many hours it would take.

    Args:
        model: Whose configuration has the widths.
        rows: The adapter section of each row.
        grids: How many rates each row has: the first seed trains with all of them.
        work: What a training and its test are.
        seeds: How many.
        device: Where.
    """
    config = load_config(ModelSection(path=model, dtype="bfloat16"))
    lines, total = [], 0.0
    for label, adapter in rows.items():
        timed = time_row(config, adapter, work, device)
        hours = timed.hours(work, grids[label]) + (seeds - 1) * timed.hours(work, 1)
        total += hours
        lines.append([label, f"{1000 * timed.step:,.0f}", f"{1000 * timed.token:,.1f}", f"{hours:,.1f}"])
    lines.append(["all", "", "", f"{total:,.1f}"])
    return table(["row", "ms a step", "ms a token of all answers", "hours at most"], lines)
