"""`pica plan`: what an adapter would cost on a model of any size, from its configuration alone."""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pica.cli.options import add_screen, add_trust, check_screen, command_parser, whole
from pica.cli.show import show

if TYPE_CHECKING:
    from pica.experiments.results.plan import Estimate
    from pica.experiments.results.screening import Screen

EPILOG = """examples:
  pica plan embedded
  pica plan ./Llama-3.1-70B --r 64 --batch 1 4 --length 2048     the folder needs a config.json and nothing else
  pica plan ./Llama-3.1-8B --budget 2M                           the largest r with at most 2,000,000 parameters
  pica plan ./Llama-3.1-8B --budget 4MB                          ... whose file has at most 4,000,000 bytes
  pica plan Qwen/Qwen3-8B --target-modules q_proj v_proj --json
  pica plan ./Llama-3.1-70B --quantization nf4 --checkpointing
  pica plan ./Mixtral-8x7B --target-parameters experts.gate_up_proj experts.down_proj
  pica plan ./SmolLM2-135M --screen train.jsonl --calibration train.jsonl     a screen of bases; loads the model

Without --screen nothing is loaded or allocated. Memory is that of one optimizer step after the first, with AdamW;
libraries, the data and what an allocator wastes come on top. docs/plan.md says how each number is found.
"""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = command_parser(
        "plan",
        "What an adapter would cost on a model, from the model's configuration alone: trained parameters, "
        "bytes of adapter, basis and cache, time to solve the basis here, and memory of training beside LoRA.",
        EPILOG,
    )
    made.add_argument("model", metavar="MODEL", help="a folder with config.json, a hub name, or embedded")
    rank = made.add_mutually_exclusive_group()
    rank.add_argument("--r", type=whole, default=32, metavar="R", help="rank (default: 32)")
    rank.add_argument(
        "--budget", metavar="PARAMS|MB", help="the largest rank within it: 500k, 2M parameters; 4MB, 4MiB"
    )
    made.add_argument("--target-modules", nargs="+", metavar="NAME", help="layers to adapt (default: the family's)")
    made.add_argument(
        "--target-parameters",
        nargs="+",
        metavar="NAME",
        help="stacks of experts' weights to adapt, of mixtures of experts",
    )
    made.add_argument(
        "--share", default="role", metavar="HOW", help="role, none, or a number of layers (default: role)"
    )
    made.add_argument("--lora-rank", type=whole, default=16, metavar="R", help="of the LoRA shown beside (default: 16)")
    made.add_argument(
        "--batch", type=whole, nargs="+", default=[1, 8], metavar="N", help="samples a step (default: 1 8)"
    )
    made.add_argument(
        "--length", type=whole, nargs="+", metavar="N", help="tokens a sample (default: 512, if it has them)"
    )
    made.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the frozen weights (default: auto, the configuration's)",
    )
    made.add_argument(
        "--quantization", choices=("nf4", "fp4", "int8"), help="of the frozen weights, as pica train has it"
    )
    made.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing")
    made.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model on the hub")
    add_screen(made)
    add_trust(made)
    made.add_argument("--json", action="store_true", help="print everything as JSON, sizes in bytes")
    return made


def run(arguments: Sequence[str]) -> int:
    """Parse, estimate, and print tables or JSON."""
    given = parser().parse_args(arguments)
    budget, in_bytes = parse_budget(given.budget)
    check_screen(given.screen, given.calibration)

    from pica.cli.console import check_device, quiet_libraries, reporter

    shown = reporter()
    with shown.console.status("Loading libraries") as status:
        from pica.experiments.plan.planning import Question, estimate

        quiet_libraries()
        check_device()
        question = Question(
            model=given.model,
            r=given.r,
            budget=budget,
            budget_in_bytes=in_bytes,
            target_modules=given.target_modules,
            target_parameters=given.target_parameters,
            share=int(given.share) if given.share.isdecimal() else given.share,
            lora_rank=given.lora_rank,
            batches=given.batch,
            lengths=given.length,
            dtype=given.dtype,
            quantization=given.quantization,
            checkpointing=given.checkpointing,
            revision=given.revision,
            trust_remote_code=given.trust_remote_code,
        )
        found = estimate(question, progress=status.update)
        screened = None
        if given.screen is not None:
            status.update("Holding bases against a gradient")
            screened = _screened(given, found.r)
    if given.json:
        from pica.experiments.results.documents import result_document
        from pica.files.output import json_text

        show(json_text(result_document(dataclasses.replace(found, screen=screened)), indent=2))
    else:
        show(as_text(found))
        if screened is not None:
            from pica.report.screening import as_text as screen_text

            show(f"\n{screen_text(screened)}")
    return 0


def _screened(given: argparse.Namespace, r: int) -> "Screen":
    from pica.experiments.recipes.recipe import ModelSection
    from pica.experiments.screening import ScreenQuestion, screen

    section = ModelSection(
        path=given.model, dtype=given.dtype, revision=given.revision, trust_remote_code=given.trust_remote_code
    )
    return screen(ScreenQuestion(section, given.screen, given.calibration, r, given.target_modules))


def parse_budget(text: str | None) -> tuple[int | None, bool]:
    """Read a budget; a unit that ends in B after another letter means bytes.

    Args:
        text: As the user wrote it, for instance "300k" or "2MB"; None where there is none.
    Returns:
        The amount, None where there is none, and whether it is in bytes.
    Raises:
        ConfigError: It is no number with one of the known units.
    """
    from pica.errors import ConfigError

    if text is None:
        return None, False
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip().replace("_", "").replace(",", ""))
    unit = match[2].upper() if match else ""
    in_bytes = unit not in _UNITS
    factor = _BYTES.get(unit) if in_bytes else _UNITS[unit]
    if match is None or factor is None or not 1 <= (amount := float(match[1]) * factor) < 1e18:
        raise ConfigError(
            f"--budget {text!r} must be a number of parameters (500000, 500k, 2M) or of bytes (800kB, 4MB, 4MiB)."
        )
    return int(amount), in_bytes


def as_text(found: "Estimate") -> str:
    """Tables for people."""
    groups = [["group", "layers", "in", "out", "r", "parameters", "basis"]]
    for g in found.groups:
        widths = ", ".join(map(str, g.in_features))
        cells = [g.name, g.layers, widths, g.out_features, g.rank, f"{g.parameters:,}", size(g.basis_bytes)]
        groups.append(list(map(str, cells)))
    share = found.parameters / found.model_parameters
    facts = [
        ["parameters", f"{found.parameters:,} ({share:.3%} of the model)"],
        ["adapter file", size(found.adapter_bytes)],
        ["basis", f"{size(found.basis_bytes)} in memory, {size(found.cache_bytes)} in the cache on disk"],
        ["basis time", f"about {duration(found.basis_seconds)} on this machine, once"],
    ]
    memory = [["", *(f"{m.method} r={m.rank}" for m in found.memory)]]
    memory.append(["parameters", *(f"{m.parameters:,}" for m in found.memory)])
    parts: dict[str, Any] = {"weights": "weights", "basis": "basis", "adapter": "adapter", "optimiser": "optimizer"}
    memory += [[label, *(size(getattr(m, name)) for m in found.memory)] for label, name in parts.items()]
    for i, step in enumerate(found.memory[0].steps):
        label = f"batch {step.batch} x {step.length}"
        memory.append([f"{label}: activations", *(size(m.steps[i].activations) for m in found.memory)])
        memory.append([f"{label}: total", *(size(m.steps[i].total) for m in found.memory)])
    return "\n".join(
        [
            f"{found.model}: {found.kind}, {found.model_parameters:,} parameters in {found.dtype}"
            f"{f', quantised to {found.quantization}' if found.quantization else ''}; PiCa r={found.r}",
            "",
            _table(groups),
            "",
            _table(facts, right=False),
            "",
            "training memory",
            _table(memory),
            *(f"\n{note}" for note in found.notes),
        ]
    )


def size(count: int | None) -> str:
    """Bytes for people, in MiB or GiB."""
    if count is None:
        return "unknown"
    if count < 2**20:
        return f"{count / 2**10:.1f} KiB"
    return f"{count / 2**20:,.1f} MiB" if count < 10 * 2**30 else f"{count / 2**30:,.1f} GiB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.1g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _table(lines: list[list[str]], *, right: bool = True) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right and i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )
