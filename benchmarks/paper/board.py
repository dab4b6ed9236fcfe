"""PEFT's MetaMathQA board (Llama-3.2-3B, GSM8K test), by PEFT's own runner in a clone of its repository.

PiCa with the paper's directions and with activation directions, r = 64, 128 and 256 on q, k, v, up and down: 1.0, 2.1 and
4.2 million parameters. Steps, batch, prompt and test are the board's own. The rate is the paper's for PiCa on Gemma-2B,
without weight decay. The clone needs its own requirements installed beside pica.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import pica
import pica.cli
from benchmarks.harness import table
from benchmarks.paper.tables import FIVE
from pica._devices import accelerator
from pica.errors import ConfigError
from pica.files.output import write_json, write_text

NAME = "peft-board"
MODEL = "meta-llama/Llama-3.2-3B"
FOLDER = Path("method_comparison/MetaMathQA")
RANKS = (64, 128, 256)
RATE = 1e-3
MINUTES = 60
"""Of one experiment, at most: the board's own of this size took 15 to 25 on an L40S, and a start with its bases."""
_RUN = (
    "import sys, runpy, pica; sys.argv = ['run.py', '-v', sys.argv[1]]; runpy.run_path('run.py', run_name='__main__')"
)


def experiments(basis: Path | None) -> dict[str, pica.PicaConfig]:
    """The configurations by experiment, as PEFT's runner names them: method/name."""
    found = {}
    for projection in ("principal", "activation"):
        for r in RANKS:
            more: dict[str, Any] = {}
            if projection == "activation":
                more = {"projection": "activation", "basis_from": None if basis is None else str(basis)}
            name = f"pica/llama-3.2-3B-{projection}-rank{r}"
            found[name] = pica.PicaConfig(task_type="CAUSAL_LM", r=r, target_modules=list(FIVE), **more)
    return found


def write_experiments(clone: Path, basis: Path | None) -> list[str]:
    """Write each experiment's two files into the clone; returns their names."""
    made = experiments(basis)
    for name, config in made.items():
        folder = clone / FOLDER / "experiments" / name
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        write_json(folder / "training_params.json", {"optimizer_kwargs": {"lr": RATE, "weight_decay": 0.0}})
    return list(made)


def finished(clone: Path) -> Iterator[Mapping[str, Any]]:
    """What the clone's runner has written, its own board included; cancelled runs are not."""
    for kind in ("results", "temporary_results"):
        for file in sorted((clone / FOLDER / kind).glob("*.json")):
            record = json.loads(file.read_text(encoding="utf-8"))
            if record.get("train_info", {}).get("status") == "success":
                yield record


def board_table(clone: Path) -> str:
    """All finished experiments, the best test accuracy first; of several runs of one experiment the last."""
    last = {record["run_info"]["experiment_name"]: record for record in finished(clone)}
    lines = []
    for name, record in last.items():
        trained = record["train_info"]
        accuracy = trained["metrics"][-1].get("test accuracy")
        if accuracy is None:
            continue
        memory = trained["accelerator_memory_max"] / 2**30
        cells = [name, f"{trained['num_trainable_params']:,}", f"{accuracy:.1%}", f"{trained['train_time']:,.0f}"]
        lines.append((accuracy, [*cells, f"{memory:.1f}", f"{trained['file_size'] / 2**20:.1f}"]))
    header = ["experiment", "parameters", "GSM8K test", "seconds", "GiB", "file, MiB"]
    return table(header, [cells for _, cells in sorted(lines, key=lambda line: -line[0])])


def check(clone: Path, work: Path) -> list[str]:
    """What is missing before the board's runs can begin, a sentence each."""
    wrong = []
    if accelerator() is None:
        wrong.append("PEFT's runner measures an accelerator's memory, and there is none here.")
    elif torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        wrong.append("The board's runs take up to 24 GiB at this size; use a GPU with 32 GiB or more.")
    if shutil.disk_usage(work).free < 20 * 2**30:
        wrong.append("The model, MetaMathQA and the bases take 12 GiB of disk; leave 20 free.")
    if not (clone / FOLDER / "run.py").is_file():
        wrong.append(f"{str(clone)!r} is no clone of PEFT: it has no {FOLDER / 'run.py'}.")
    return wrong


def miniature(clone: Path) -> str:
    """Each experiment as PEFT reads it, put on a tiny model of the same kind: its parameters. Trains nothing."""
    lines = []
    for name in write_experiments(clone, None):
        config = PeftConfig.from_pretrained(str(clone / FOLDER / "experiments" / name))
        assert isinstance(config, pica.PicaConfig)
        if config.projection == "activation":  # whose basis is made of the real model
            continue
        shape: dict[str, Any] = {
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
        }
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                LlamaConfig(num_hidden_layers=1, vocab_size=64, head_dim=128, **shape)
            )
            parameters = get_peft_model(model, config).num_parameters(only_trainable=True)
        lines.append([name, f"{parameters:,}"])
    return table(["experiment", "parameters"], lines)


def run(given: argparse.Namespace) -> int:
    """Check, make the basis, run what is left of the experiments, and write the table."""
    if given.peft is None:
        raise ConfigError("peft-board needs --peft, a clone of https://github.com/huggingface/peft.")
    clone, work = given.peft.expanduser().resolve(), given.work / NAME
    if given.miniature:
        print(miniature(clone))
        return 0
    work.mkdir(parents=True, exist_ok=True)
    if (wrong := check(clone, work)) and not given.no_check:
        raise ConfigError(" ".join(wrong))
    hours = 2 * len(RANKS) * MINUTES / 60
    print(f"{2 * len(RANKS)} experiments, {hours:.0f} hours at most.", flush=True)
    if given.check:
        return 0
    basis = work / "basis"
    if not basis.exists():
        made = ["basis", given.model or MODEL, "-o", str(basis), "--projection", "activation", "--r", str(max(RANKS))]
        made += ["--data", given.train or "hub:meta-math/MetaMathQA", "--target-modules", *FIVE]
        if status := pica.cli.main(made):
            return status
    done = {record["run_info"]["experiment_name"] for record in finished(clone)}
    for name in write_experiments(clone, basis):
        if name in done:
            continue
        command = [sys.executable, "-c", _RUN, str(Path("experiments") / name)]
        if status := subprocess.run(command, cwd=clone / FOLDER, check=False).returncode:
            print(f"{name} ended with {status}; the same command goes on with it.", file=sys.stderr)
            return status
    text = board_table(clone)
    write_text(work / "results.md", text)
    print(f"{text}\ntable: {work / 'results.md'}")
    return 0
