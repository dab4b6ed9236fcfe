"""Trained tokens a second with and without packing: PiCa as `pica train` trains it, beside TRL's SFTTrainer with LoRA.

    OMP_NUM_THREADS=1 python -m benchmarks.packing [--model FOLDER] [--conversations 32] [--rounds 3]

All train on the same conversations, as the same tokens, with the same loss on the assistant's words: generated word
problems, one to six in a conversation, so that lengths differ as those of real ones do. Without packing a batch is BATCH
conversations, filled up to the longest; with packing it is ROWS rows of `--length` tokens, about as many. Each contestant is
trained over all conversations in each round, and they take turns; the time is the processor's in the training loop, without
making models and rows. That of one thread is the time which it takes on a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import peft
import transformers
from transformers import PrinterCallback, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.harness import describe_machine, ratios, save, table
from benchmarks.models import TARGETS
from pica.experiments.chat.packing import as_dataset
from pica.experiments.encoding import IGNORED
from pica.experiments.pipelines.chat import ChatPipeline
from pica.experiments.recipes.recipe import AdapterSection, ModelSection, Recipe, TaskSection, TrainerSection
from pica.experiments.train.trainers import Steps
from pica.tasks import get_task
from pica.tasks.chat import Conversation
from pica.tasks.wordproblems import generate

BATCH, ROWS, RANK = 8, 4, 32
PICA, LORAS = f"PiCa r={RANK}", {"TRL, LoRA r=1": 1, "TRL, LoRA r=8": 8}
REFERENCE = "TRL, LoRA r=8"


def conversations(count: int, *, seed: int = 0) -> list[Conversation]:
    """Word problems with their solutions, one to six in a conversation."""
    rng = random.Random(seed)
    turns = [rng.randint(1, 6) for _ in range(count)]
    problems = iter(generate("train", sum(turns), seed=seed))
    made = []
    for each in turns:
        messages: list[dict[str, Any]] = []
        for _ in range(each):
            problem = next(problems)
            messages += [{"role": "user", "content": problem.question}]
            messages += [{"role": "assistant", "content": problem.solution}]
        made.append(Conversation(tuple(messages)))
    return made


class Clock(TrainerCallback):
    """How long the processor was busy with the training loop."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        self.seconds = -time.process_time()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        self.seconds += time.process_time()


def with_pica(recipe: Recipe, talks: list[Conversation], folder: Path, clock: Clock, *, packing: bool) -> Trainer:
    """The trainer of `pica train`."""
    section = dataclasses.replace(recipe.trainer, packing=packing, batch_size=ROWS if packing else BATCH)
    pipeline = ChatPipeline(dataclasses.replace(recipe, trainer=section), get_task("chat"))
    model = pipeline.adapt(recipe.adapter, seed=0)
    return pipeline.trainer(model, pipeline.encode(talks), Steps(section, 1e-3, folder, callbacks=[clock]))


def with_lora(
    recipe: Recipe, talks: list[Conversation], folder: Path, clock: Clock, *, packing: bool, rank: int
) -> Trainer:
    """TRL's own trainer with PEFT's LoRA, on the tokens that ours is given."""
    pipeline = ChatPipeline(recipe, get_task("chat"))
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    return SFTTrainer(
        model=peft.get_peft_model(pipeline.load_base(), config),
        args=SFTConfig(
            output_dir=str(folder),
            max_length=recipe.trainer.max_length,
            packing=packing,
            per_device_train_batch_size=ROWS if packing else BATCH,
            num_train_epochs=1,
            learning_rate=1e-3,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=as_dataset(pipeline.rows(talks)),
        processing_class=pipeline.tokenizer,
        callbacks=[clock],
    )


def measure(model: str, count: int, length: int, rounds: int, template: str | None) -> dict[str, Any]:
    """Train all contestants in turn.

    Returns:
        Tokens, seconds of each round by contestant, and their ratios to `REFERENCE` without packing.
    """
    recipe = Recipe(
        model=ModelSection(path=model),
        task=TaskSection(name="chat", chat_template=template),
        adapter=AdapterSection(r=RANK, target_modules=TARGETS),
        trainer=TrainerSection(max_length=length),
    )
    talks = conversations(count)
    rows = ChatPipeline(recipe, get_task("chat")).rows(talks)
    taken: dict[str, list[float]] = {}
    steps: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        trainers: dict[str, tuple[Trainer, Clock]] = {}
        for packing in (False, True):
            for label, rank in {PICA: 0, **LORAS}.items():
                folder, clock = Path(name) / str(len(trainers)), Clock()
                made = (
                    with_lora(recipe, talks, folder, clock, packing=packing, rank=rank)
                    if rank
                    else with_pica(recipe, talks, folder, clock, packing=packing)
                )
                if counted(made.train_dataset["labels"]) != counted(rows.labels):  # pyright: ignore[reportOptionalSubscript, reportIndexIssue]
                    raise RuntimeError(f"{label} is given other tokens than the others.")
                made.remove_callback(PrinterCallback)
                trainers[f"{label}, packed" if packing else label] = made, clock
        names = list(trainers)
        for at in range(rounds + 1):  # the first one warms up
            for label in names[at % len(names) :] + names[: at % len(names)]:
                trainer, clock = trainers[label]
                trainer.train()
                steps[label] = trainer.state.global_step
                if at:
                    taken.setdefault(label, []).append(clock.seconds)
        taken = {label: taken[label] for label in names}
        parameters = {label: trainable(trainer.model) for label, (trainer, _) in trainers.items()}
    learnt = counted(rows.labels)
    lengths = sorted(len(ids) for ids in rows.input_ids)
    return {
        "model": Path(model).name,
        "conversations": count,
        "length": length,
        "rounds": rounds,
        "tokens": sum(lengths),
        "trained_tokens": learnt,
        "lengths": [lengths[0], statistics.median(lengths), lengths[-1]],
        "steps": steps,
        "parameters": parameters,
        "seconds": taken,
        "ratios": ratios(taken, REFERENCE),
    }


def counted(labels: Iterable[Sequence[int]]) -> int:
    """Tokens that a loss is taken on."""
    return sum(one != IGNORED for row in labels for one in row)


def trainable(model: Any) -> int:
    """Numbers that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def shown(result: dict[str, Any]) -> str:
    """The measurement as Markdown."""
    lines = []
    for label, seconds in result["seconds"].items():
        found = result["ratios"][label]
        per_second = [result["trained_tokens"] / each for each in seconds]
        speed = f"{1 / found['ratio']:.2f}"
        between = f"{1 / found['upper']:.2f} to {1 / found['lower']:.2f}"
        lines.append(
            [label, f"{result['parameters'][label]:,}", result["steps"][label]]
            + [f"{statistics.median(per_second):,.0f}", speed, between]
        )
    low, middle, high = result["lengths"]
    title = (
        f"{result['model']}: {result['conversations']} conversations of {low} to {high} tokens (median {middle:.0f}), "
        f"{result['tokens']:,} tokens, of which {result['trained_tokens']:,} are learnt; rows of at most "
        f"{result['length']} tokens, float32, threads: {result['machine']['threads']}; medians of {result['rounds']} rounds."
    )
    header = [
        "contestant",
        "trainable",
        "steps",
        "trained tokens a processor second",
        f"over {REFERENCE} unpacked",
        "middle half",
    ]
    return f"{title}\n\n{table(header, lines)}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="folder of a chat model (default: the embedded one)")
    parser.add_argument("--conversations", type=int, default=32)
    parser.add_argument("--length", type=int, default=512, help="tokens of a packed row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="packing", help="of the result files")
    given = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    template = "plain" if given.model == "embedded" else None
    found = measure(given.model, given.conversations, given.length, given.rounds, template)
    result = describe_machine() | found
    text = shown(result)
    save(given.name, result, text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
