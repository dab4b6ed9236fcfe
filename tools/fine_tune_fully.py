"""Full fine-tuning of two small models with transformers' Trainer: what `docs/theory-in-practice.md` is measured on.

    python tools/fine_tune_fully.py sst2 --model ./all-MiniLM-L6-v2 --data ./data/sst2 --output OUT
    python tools/fine_tune_fully.py arithmetic --model ./SmolLM2-135M --data ./data/arithmetic --output OUT

Every weight is trained, in float32, from a fixed seed; no adapter is involved. OUT takes the fine-tuned model and
`fine_tuning.json`: settings, versions, and the quality before and after on problems that were not trained on.
"""

import argparse
import csv
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from pica.experiments.data import take_out
from pica.experiments.encoding import encode
from pica.experiments.measuring import machine, versions
from pica.files.output import atomic_folder, write_json
from pica.tasks import Source, get_task

HELD_OUT = 32  # arithmetic problems that are taken out of the training file to measure the loss on


def sst2(given: argparse.Namespace) -> tuple[PreTrainedModel, Any, datasets.Dataset, datasets.Dataset, Any, Callable]:
    """A sentence classifier: the encoder with a fresh pooler and head; accuracy on the dev sentences."""

    def read(name: str) -> datasets.Dataset:
        with open(given.data / name, encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        encoded = tokenizer([sentence for sentence, _ in rows], truncation=True, max_length=128)
        return datasets.Dataset.from_dict({**encoded, "labels": [int(label) for _, label in rows]})

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForSequenceClassification.from_pretrained(given.model, num_labels=2, dtype=torch.float32)

    def metrics(outcome: Any) -> dict[str, float]:
        return {"accuracy": float((outcome.predictions.argmax(-1) == outcome.label_ids).mean())}

    return model, tokenizer, read("train.tsv"), read("dev.tsv"), DataCollatorWithPadding(tokenizer), metrics


def arithmetic(
    given: argparse.Namespace,
) -> tuple[PreTrainedModel, Any, datasets.Dataset, datasets.Dataset, Any, Callable]:
    """A language model on worked answers: loss on the answers of problems that are left out of training."""
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    examples = get_task("arithmetic").load("train", Source(str(given.data / "train.json"), template="alpaca"))
    train, held_out = take_out(examples, HELD_OUT, seed=0)
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
    return (
        model,
        tokenizer,
        encode(train, tokenizer, max_length=256),
        encode(held_out, tokenizer, max_length=256),
        collator,
        lambda _: {},
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("sst2", "arithmetic"))
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--steps", type=int, help="optimizer steps; one pass over the data if left out")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)

    set_seed(given.seed)  # the fresh classifier head
    prepare = {"sst2": sst2, "arithmetic": arithmetic}[given.task]
    model, tokenizer, train, held_out, collator, metrics = prepare(given)
    arguments = TrainingArguments(
        output_dir=str(given.output) + ".work",
        max_steps=given.steps or -1,
        num_train_epochs=1,
        per_device_train_batch_size=given.batch_size,
        per_device_eval_batch_size=32 if given.task == "sst2" else 8,
        learning_rate=given.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        weight_decay=0.0,
        seed=given.seed,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        prediction_loss_only=given.task != "sst2",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collator,
        compute_metrics=metrics if given.task == "sst2" else None,
    )
    quality = ("eval_loss", "eval_accuracy")
    before = {k: v for k, v in trainer.evaluate().items() if k in quality}
    begun = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - begun
    after = {k: v for k, v in trainer.evaluate().items() if k in quality}
    with atomic_folder(given.output) as partial:
        model.save_pretrained(str(partial))
        tokenizer.save_pretrained(str(partial))
        write_json(
            partial / "fine_tuning.json",
            {
                "task": given.task,
                "steps": trainer.state.global_step,
                "examples_seen": trainer.state.global_step * given.batch_size,
                "training_examples": len(train),
                "held_out_examples": len(held_out),
                "batch_size": given.batch_size,
                "learning_rate": given.learning_rate,
                "schedule": "linear, 10% warm-up",
                "optimizer": "AdamW, no weight decay",
                "seed": given.seed,
                "before": before,
                "after": after,
                "seconds": round(seconds, 1),
                "losses": [entry for entry in trainer.state.log_history if "loss" in entry],
                "machine": vars(machine()),
                "versions": versions(),
            },
        )
    print(f"{given.task}: {before} -> {after}, {trainer.state.global_step} steps in {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
