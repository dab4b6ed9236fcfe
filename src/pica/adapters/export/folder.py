"""The files of an exported LoRA."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from pica._version import __version__
from pica.adapters.card import public_name
from pica.adapters.export.factors import GroupRow

logger = logging.getLogger(__name__)

PREFIX = "base_model.model."  # what PEFT puts before each path; with another one vLLM applies nothing and says nothing


@dataclass(frozen=True)
class LoraFolder:
    """What goes into the folder.

    Attributes:
        tensors: {path and name in the base model: tensor}.
        method: Of the adapter that this is made from.
        config: adapter_config.json.
        title, base, rows, exact, command: For README.md.
        pipeline_tensors: For diffusers' pipelines: the tensors of all parts, each under its part's name; the file that
            they read is written too.
        gguf_base: For llama.cpp: the base model's configuration; adapter.gguf is written where it can be.
    """

    tensors: dict[str, Tensor]
    method: str
    config: dict[str, Any]
    title: str
    base: str
    rows: Sequence[GroupRow]
    exact: bool
    command: str
    pipeline_tensors: dict[str, Tensor] | None = None
    gguf_base: Any = None


def write_lora_folder(contents: LoraFolder, folder: Path) -> int:
    """Write the files into an existing empty folder; returns the bytes of adapter_model.safetensors."""
    weights = folder / "adapter_model.safetensors"
    save_file({PREFIX + k: v for k, v in contents.tensors.items()}, weights, metadata={"format": "pt"})
    text = json.dumps(contents.config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(contents), encoding="utf-8")
    if contents.pipeline_tensors is not None:
        save_file(contents.pipeline_tensors, folder / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
    if contents.gguf_base is not None:
        _write_gguf(contents, folder)
    return weights.stat().st_size


def _write_gguf(contents: LoraFolder, folder: Path) -> None:
    from pica.adapters.export.gguf import ARCHITECTURES, write_gguf_adapter

    by_hand = (
        f"make it with llama.cpp's own convert_lora_to_gguf.py --base {contents.base} --outtype f16 "
        f"--outfile {contents.title}/adapter.gguf {contents.title}"
    )
    model_type = str(getattr(contents.gguf_base, "model_type", ""))
    if find_spec("gguf") is None:
        logger.warning(
            "adapter.gguf was not written, since the gguf package is not installed; install it, or %s.", by_hand
        )
    elif model_type not in ARCHITECTURES:
        logger.warning("adapter.gguf was not written, since pica does not know %r models; %s.", model_type, by_hand)
    else:
        write_gguf_adapter(
            contents.tensors, contents.gguf_base, folder / "adapter.gguf", alpha=contents.config["lora_alpha"]
        )


def error_table(rows: Sequence[GroupRow]) -> str:
    """The known error of each group, as lines of text; of an exact export there is none to show."""
    header = ("group", "layers", "rank", "norm", "error", "relative")
    body = [(r.group, str(r.layers), _ranks(r), f"{r.norm:.4g}", f"{r.error:.4g}", f"{r.relative:.2%}") for r in rows]
    if not any(r.error for r in rows):
        header, body = header[:4], [line[:4] for line in body]
    widths = [max(len(line[i]) for line in (header, *body)) for i in range(len(header))]
    lines = []
    for line in (header, tuple("-" * w for w in widths), *body):
        cells = [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _ranks(row: GroupRow) -> str:
    return f"{row.kept} of {row.rank}" if row.kept < row.rank else str(row.rank)


def _article(method: str) -> str:
    return f"An {method}" if method == "SVFT" else f"A {method}"


def _readme(contents: LoraFolder) -> str:
    """Model card: what this is, how to load it, what it leaves out."""
    rank, targets = (
        contents.config["r"],
        ", ".join([*contents.config["target_modules"], *contents.config.get("target_parameters", [])]),
    )
    head = [
        "---",
        "library_name: peft",
        *([f"base_model: {public_name(contents.base)}"] if contents.config["base_model_name_or_path"] else []),
    ]
    kind = (
        "It is exact: each layer's update is the adapter's, up to the rounding of the file's precision."
        if contents.exact
        else "It is truncated: each layer's update is the best of its rank, and misses the adapter's as the table says."
    )
    lines = [
        *head,
        "tags:",
        "- lora",
        "- pica",
        "---",
        "",
        f"# {contents.title}",
        "",
        f"{_article(contents.method)} adapter written as a LoRA of rank {rank} on {targets}, by pica {__version__}. {kind}",
        "",
        "```python",
        "from peft import PeftModel",
        "",
        f"model = PeftModel.from_pretrained(base_model, {contents.title!r})",
        "```",
        *(["", "```", contents.command, "```"] if contents.command else []),
        "",
        "Frobenius norms of the layers' updates, and of what is left out of each:",
        "",
        "```",
        error_table(contents.rows),
        "```",
        "",
    ]
    return "\n".join(lines)
