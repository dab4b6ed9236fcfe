"""A user's own job on a real chat model: conversations in, held-out loss and right answers before and after.

    python -m benchmarks.own_job --model smollm2-135m --data ../shared/data --work /tmp/own-job
    python -m benchmarks.own_job ... --only "gsm8k/PiCa r=32;gsm8k/LoRA r=1"      these runs
    python -m benchmarks.own_job ... --report                                    what there is so far

GSM8K as conversations of a question and a worked answer, and the arithmetic problems of LLM-Adapters as instructions
(Alpaca), each by `pica train` as a user would, task chat, with packing and the model's own chat template. Every method takes
the best of its rates by the loss on 64 conversations of the training file; 150 test problems are measured before and after:
the loss on the gold answers, and how many of the answers that `pica generate` writes (the likeliest words) have the right
final number. The same command goes on where another one was stopped. One seed, so differences between methods that are
smaller than the test problems' intervals are ties.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pica.cli
from benchmarks import harness
from pica.experiments.results.documents import read_result
from pica.experiments.results.run import RunMetrics
from pica.experiments.uncertainty import score_interval, shown_interval
from pica.tasks import get_task

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
PROBLEMS, VALIDATION, TRAIN = 150, 64, 2000
METHODS: dict[str, tuple[dict[str, Any], list[float]]] = {
    "PiCa r=32": ({"method": "pica", "r": 32}, [1e-3, 3e-3, 1e-2]),
    "LoRA r=1": ({"method": "lora", "r": 1}, [3e-3, 1e-2, 3e-2]),
    "PiCa r=128": ({"method": "pica", "r": 128}, [3e-4, 1e-3, 3e-3]),
    "LoRA r=8": ({"method": "lora", "r": 8}, [1e-3, 3e-3, 1e-2]),
}
JOBS = {"gsm8k": "math", "arithmetic": "arithmetic"}
"""Each job's task, which finds the final number of an answer."""
FIELDS: dict[str, Any] = {
    "task.name": "chat",
    "task.answers": 1,
    "trainer.packing": "true",
    "trainer.max_length": 512,
    "trainer.batch_size": 4,
    "trainer.max_steps": 24,
    "trainer.precision": "bfloat16",
    "model.dtype": "bfloat16",
    "trainer.save_steps": 12,
    "trainer.eval_batch_size": 8,
    "data.validation_limit": VALIDATION,
}


def write_data(data: Path, folder: Path) -> None:
    """The two files of each job, in the form that it is about."""

    def conversation(question: str, answer: str) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}

    def instruction(row: dict[str, str]) -> dict[str, str]:
        return {name: row[name].strip() for name in ("instruction", "input", "output")}

    folder.mkdir(parents=True, exist_ok=True)
    for split, limit in (("train", TRAIN), ("test", PROBLEMS)):
        pairs = [tuple(row.values()) for row in _lines(data / "gsm8k" / f"{split}.jsonl")[:limit]]  # named in two ways
        _write(folder / f"gsm8k-{split}.jsonl", [conversation(*pair) for pair in pairs])
        name = "train" if split == "train" else "AddSub"
        rows = json.loads((data / "arithmetic" / f"{name}.json").read_text(encoding="utf-8"))
        rows = [row for row in rows if row["output"].strip()][:limit]
        _write(folder / f"arithmetic-{split}.jsonl", [instruction(row) for row in rows])
        if split == "test":
            _write(folder / "arithmetic-gold.jsonl", [str(row["answer"]) for row in rows])
            _write(folder / "gsm8k-gold.jsonl", [answer.rpartition("####")[2].strip() for _, answer in pairs])


def _lines(path: Path) -> list[Any]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _write(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def right(job: str, answers: Path, data: Path, field: str) -> list[bool]:
    """Which of the answers in a file of `pica generate` have the gold number."""
    task: Any = get_task(JOBS[job])
    pairs = zip(_lines(answers), _lines(data / f"{job}-gold.jsonl"), strict=True)
    return [task.correct(task.extract(row[field]), gold) for row, gold in pairs]


def run(job: str, label: str, model: Path, work: Path) -> None:
    """Train, and answer the test problems, as far as that is not done."""
    data, folder = work / "data", work / job / label.replace(" ", "-")
    answers = folder.with_suffix(".answers.jsonl")
    if not (folder / "metrics.json").is_file():
        adapter, rates = METHODS[label]
        fields = FIELDS | {f"adapter.{name}": value for name, value in adapter.items()}
        fields |= {
            "model.path": model,
            "data.train": data / f"{job}-train.jsonl",
            "data.test": data / f"{job}-test.jsonl",
        }
        fields |= {"adapter.target_modules": json.dumps(TARGETS), "trainer.learning_rates": json.dumps(rates)}
        words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
        _do(["train", "--resume", str(folder)] if folder.exists() else ["train", *words, "-o", str(folder)])
    if not answers.is_file():
        before = ["--base-answers"] if label == next(iter(METHODS)) else []
        asked = ["--prompts", str(data / f"{job}-test.jsonl"), "-o", str(answers), "--max-new-tokens", "200"]
        _do(["generate", str(folder), *asked, "--dtype", "bfloat16", "--batch-size", "16", *before])


def _do(words: list[str]) -> None:
    if status := pica.cli.main(words):
        raise SystemExit(status)


def report(work: Path) -> tuple[dict[str, Any], str]:
    """Finished runs as numbers and as a table."""
    numbers: dict[str, Any] = {}
    lines: list[list[str]] = []
    for job in JOBS:
        for label in METHODS:
            folder = work / job / label.replace(" ", "-")
            answers = folder.with_suffix(".answers.jsonl")
            if not ((folder / "metrics.json").is_file() and answers.is_file()):
                continue
            metrics = read_result(RunMetrics, folder / "metrics.json")
            cases: list[tuple[str, str, Any, str, str]] = []
            if label == next(iter(METHODS)) and metrics.base is not None:
                cases.append((f"{job}, before", "base_answer", metrics.base, "", ""))
            trained = metrics.adapter
            rates = sorted(one.learning_rate for one in trained.candidates)
            edge = trained.learning_rate in (rates[0], rates[-1])
            rate = f"{trained.learning_rate:g}{' (edge)' if edge else ''}"
            cases.append((f"{job}, {label}", "answer", trained, f"{trained.parameters.trainable:,}", rate))
            for title, field, found, size, rate in cases:
                hits = right(job, answers, work / "data", field)
                share = sum(hits) / len(hits)
                interval = score_interval("accuracy", share, (share * (1 - share) / len(hits)) ** 0.5, len(hits))
                numbers[title] = {
                    "loss": found.loss,
                    "loss_stderr": found.loss_stderr,
                    "token_accuracy": found.score,
                    "right": sum(hits),
                    "problems": len(hits),
                    "rate": rate,
                }
                loss = f"{found.loss:.4f} ± {found.loss_stderr:.4f}" if found.loss_stderr else f"{found.loss:.4f}"
                shown = f"{share:.1%} ({shown_interval('accuracy', interval)})"
                lines.append([title, size, rate, loss, f"{found.score:.1%}", shown])
    header = ["data, method", "parameters", "rate", "loss on gold answers", "tokens right", "answers right"]
    return numbers, harness.table(header, lines) if lines else "Nothing is finished yet."


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is left, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, required=True, help="folder with gsm8k and arithmetic")
    parser.add_argument("--work", type=Path, required=True, help="where the runs go, and go on")
    parser.add_argument("--only", metavar="RUNS", help='JOB/METHOD, separated by ";"')
    parser.add_argument("--report", action="store_true", help="run nothing")
    given = parser.parse_args(argv)
    model, work = given.model.expanduser().resolve(), given.work.expanduser().resolve()
    planned = [f"{job}/{label}" for label in METHODS for job in JOBS]
    chosen = given.only.split(";") if given.only else planned
    if unknown := set(chosen) - set(planned):
        parser.error(f"--only: no {'; '.join(sorted(unknown))}; runs: {'; '.join(planned)}")
    if not given.report:
        if not (work / "data").is_dir():
            write_data(given.data.expanduser().resolve(), work / "data")
        for name in chosen:
            job, label = name.split("/")
            run(job, label, model, work)
    numbers, shown = report(work)
    steps, rows, length = (FIELDS[f"trainer.{name}"] for name in ("max_steps", "batch_size", "max_length"))
    text = f"{steps} steps of {rows} packed rows of {length} tokens, {PROBLEMS} test problems, one seed.\n\n{shown}"
    print(text)
    if not given.report or numbers:
        harness.save("own_job_smollm2", numbers, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
