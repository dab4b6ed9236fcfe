"""PiCa and QLoRA on one 4-bit base model at equally many trainable parameters: held-out loss.

    python -m benchmarks.quantised MODEL_FOLDER TRAIN_FILE [--steps 40]

The model is quantised by bitsandbytes to NF4 (double quantisation). PiCa takes its bases from the dequantised weights, or
from the model's own files (`basis_from`); LoRA adapts the same layers with a rank that gives the same number of
parameters. Every method is trained at each learning rate with the first seed; the rate with the lower loss on
validation problems is then trained with all seeds, and measured on test problems that nothing was chosen by.
Problems are arithmetic ones in the LLM-Adapters form. Each training is a cell in a folder of its own files, so that an
interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from benchmarks.harness import describe_machine, save, table
from benchmarks.models import TARGETS
from pica import PicaConfig
from pica.files.output import write_json
from pica.tasks import get_task
from pica.tasks.base import Example, Source
from pica.tuners.base.quantised import keep_differentiable

RATES = (3e-4, 1e-3, 2e-3, 5e-3, 1e-2)
BATCH, VALIDATION, TEST = 4, 32, 64
METHODS = ("PiCa, dequantised basis", "PiCa, basis_from the unquantised model", "QLoRA")


def config_of(method: str, model: str, rank: int) -> PeftConfig:
    if method == "QLoRA":
        return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    source = model if "basis_from" in method else None
    return PicaConfig(r=rank, target_modules=TARGETS, task_type="CAUSAL_LM", basis_from=source)


def load(folder: str) -> Any:
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantisation)
    keep_differentiable(model)  # for LoRA too: bitsandbytes' CPU kernels for inference have no backward pass
    return model


def batches(examples: list[Example], tokenizer: Any, size: int) -> list[dict[str, torch.Tensor]]:
    """Prompt and solution with an end-of-text token, padded; the loss is taken on the solution."""
    made = []
    for start in range(0, len(examples), size):
        rows = []
        for example in examples[start : start + size]:
            prompt = tokenizer(example.prompt).input_ids
            solution = tokenizer(example.completion).input_ids + [tokenizer.eos_token_id]
            rows.append((prompt + solution, [-100] * len(prompt) + solution))
        longest = max(len(ids) for ids, _ in rows)
        made.append(
            {
                "input_ids": torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows]),
                "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
                "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
            }
        )
    return made


@torch.no_grad()
def loss_on(model: Any, data: list[dict[str, torch.Tensor]]) -> float:
    """Mean over the tokens of all solutions."""
    model.eval()
    total = count = 0.0
    for batch in data:
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total += float(model(**batch).loss) * tokens
        count += tokens
    return total / count


def train(model: Any, data: list[dict[str, torch.Tensor]], rate: float, steps: int) -> list[float]:
    """AdamW with a tenth of warm-up and a cosine to zero, gradients clipped at 1."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + float(torch.cos(torch.tensor((step - warmup) / (steps - warmup) * torch.pi))))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
    losses = []
    for step in range(steps):
        loss = model(**data[step]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


class Study:
    """The problems, and the cells that are done."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.cells = given, Path(given.cells)
        self.tokenizer = AutoTokenizer.from_pretrained(given.model)
        loaded: list[Any] = list(get_task("arithmetic").load("train", Source(given.data)))
        examples = list({example.prompt: example for example in loaded}.values())  # each once
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
        shuffled = [examples[i] for i in order]
        self.validation = batches(shuffled[:VALIDATION], self.tokenizer, 8)
        self.test = batches(shuffled[VALIDATION : VALIDATION + TEST], self.tokenizer, 8)
        self.training = shuffled[VALIDATION + TEST :]

    def cell(self, method: str, rate: float, seed: int) -> dict[str, Any]:
        """One training, or what it gave before."""
        path = self.cells / f"{METHODS.index(method)}-{rate:g}-{seed}-{self.given.steps}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        rank = self.given.lora_rank if method == "QLoRA" else self.given.pica_rank
        torch.manual_seed(seed)
        model = get_peft_model(load(self.given.model), config_of(method, self.given.model, rank))
        drawn = torch.randperm(len(self.training), generator=torch.Generator().manual_seed(1000 + seed)).tolist()
        chosen = [self.training[i] for i in drawn[: BATCH * self.given.steps]]
        begun = time.process_time()
        losses = train(model, batches(chosen, self.tokenizer, BATCH), rate, self.given.steps)
        taken = time.process_time() - begun
        found = {
            "method": method,
            "rank": rank,
            "rate": rate,
            "seed": seed,
            "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "training_losses": losses,
            "cpu_seconds": round(taken, 1),
            "validation": loss_on(model, self.validation),
            "test": loss_on(model, self.test),
        }
        self.cells.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
        print(f"{method}, rate {rate:g}, seed {seed}: validation {found['validation']:.4f}, {taken:.0f} s", flush=True)
        return found

    def base(self) -> dict[str, float]:
        """Test loss of the model without an adapter, quantised and not."""
        path = self.cells / "base.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        full = AutoModelForCausalLM.from_pretrained(self.given.model, dtype=torch.bfloat16)
        found = {"unquantised": loss_on(full, self.test)}
        del full
        found["nf4"] = loss_on(load(self.given.model), self.test)
        self.cells.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
        return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of an unquantised Llama-like model")
    parser.add_argument("data", help="arithmetic problems, a .json file")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--pica-rank", type=int, default=135, help="with --lora-rank 2 as many parameters on SmolLM2-135M"
    )
    parser.add_argument("--lora-rank", type=int, default=2)
    parser.add_argument("--cells", default="quantised-cells", help="folder of the trainings that are done")
    parser.add_argument("--name", default="quantised", help="of the result files")
    given = parser.parse_args(argv)
    given.model = str(Path(given.model).expanduser().resolve())
    study, result = Study(given), describe_machine()
    base = study.base()
    rows: list[list[Any]] = [["none", "–", "–", "–", f"{base['nf4']:.4f}", "–"]]
    result |= {"base": base, "steps": given.steps, "batch": BATCH, "cells": []}
    for method in METHODS:
        first = {rate: study.cell(method, rate, 0) for rate in RATES}
        rate = min(first, key=lambda r: first[r]["validation"])
        cells = [first[rate], *(study.cell(method, rate, seed) for seed in range(1, given.seeds))]
        result["cells"] += [first[r] for r in first if r != rate] + cells
        losses = [cell["test"] for cell in cells]
        spread = ", ".join(f"{loss:.4f}" for loss in losses)
        seconds = statistics.mean(cell["cpu_seconds"] for cell in cells) / given.steps
        shown = [method, cells[0]["rank"], f"{cells[0]['parameters']:,}", f"{rate:g}"]
        rows.append([*shown, f"{statistics.mean(losses):.4f} ({spread})", f"{seconds:.2f}"])
    title = Path(given.model).name
    markdown = (
        f"{title} in NF4 with double quantisation, {given.steps} steps of {BATCH} problems, bfloat16, one core; test loss "
        f"a token over {TEST} problems (each seed in brackets). The unquantised model without an adapter: "
        f"{base['unquantised']:.4f}.\n\n"
    )
    markdown += table(["method", "r", "trained", "rate", "test loss", "CPU seconds a step"], rows)
    save(given.name, result, markdown)
    print(markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
