"""The README.md of an adapter folder, which the hub shows as its card: what it is, and how to use it.

PEFT writes one with every save. It is an empty form, says nothing of `import pica`, and holds the path of the base model's
folder on the machine that trained. `write_card` puts another in its place; a card that somebody has written is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from pica._version import __version__
from pica.files.documents import read_json
from pica.text import visible

CARD = "README.md"
TEMPLATE = "chat_template.jinja"
PLACE = "OWNER/NAME"
"""Stands for the adapter's name on the hub, until that is known."""

_WEIGHTS = "adapter_model.safetensors"
_HEADS = (".classifier.weight", ".score.weight", ".classifier.out_proj.weight")
_MARK = "<!-- Written by pica. Without this line the card is yours, and no later save replaces it. -->"
_EMPTY_FORM = "# Model Card for Model ID"  # PEFT's
_METHODS = {"PICA": "PiCa", "SVFT": "SVFT"}
_CLASSES = {  # PEFT's task type: class of transformers, and the hub's name for the task
    "CAUSAL_LM": ("AutoModelForCausalLM", "text-generation"),
    "SEQ_CLS": ("AutoModelForSequenceClassification", "text-classification"),
    "SEQ_2_SEQ_LM": ("AutoModelForSeq2SeqLM", None),
    "TOKEN_CLS": ("AutoModelForTokenClassification", "token-classification"),
    "QUESTION_ANS": ("AutoModelForQuestionAnswering", "question-answering"),
    "FEATURE_EXTRACTION": ("AutoModel", "feature-extraction"),
}


def is_generated(card: Path) -> bool:
    """Whether a card was written by this package, or is PEFT's empty form; also where there is none."""
    if not card.is_file():
        return True
    text = card.read_text(encoding="utf-8", errors="replace")
    return _MARK in text or _EMPTY_FORM in text


def is_local(base: str) -> bool:
    """Whether a base model's name is a folder of some machine, and so is nothing to anybody else."""
    return base.startswith(("/", ".", "~")) or "\\" in base or base.count("/") > 1 or Path(base).exists()


def public_name(base: str) -> str:
    """A base model's name on the hub, or its folder's name: no path of this machine."""
    return (re.split(r"[/\\]", base.rstrip("/\\"))[-1] or "base-model") if is_local(base) else base


def write_card(
    folder: Path,
    *,
    title: str = "",
    facts: Mapping[str, str] | None = None,
    measures: Sequence[Sequence[str]] = (),
    note: str = "",
    tags: Sequence[str] = (),
) -> None:
    """Write the card of the adapter in a folder, unless somebody has written one.

    Args:
        folder: Holds adapter_config.json, of any method. Without `facts` only the methods of this package get a card.
        title: The heading; the method's name if "".
        facts: What more is known of it, by name.
        measures: Rows of a table, the first of them its heading.
        note: What the table rests on.
        tags: More of them.
    """
    config = read_json(folder / "adapter_config.json")
    if not is_generated(folder / CARD) or (facts is None and config.get("peft_type") not in _METHODS):
        return
    (folder / CARD).write_text(
        card_text(folder, config, title=title, facts=facts or {}, measures=measures, note=note, tags=tags),
        encoding="utf-8",
    )


def card_text(
    folder: Path,
    config: Mapping[str, Any],
    *,
    title: str = "",
    facts: Mapping[str, str] | None = None,
    measures: Sequence[Sequence[str]] = (),
    note: str = "",
    tags: Sequence[str] = (),
) -> str:
    """The card; see `write_card`. `config` is what adapter_config.json holds."""
    kind = str(config.get("peft_type"))
    recorded = str(config.get("base_model_name_or_path") or "")
    base = public_name(recorded) if recorded else ""
    auto, pipeline = _CLASSES.get(str(config.get("task_type")), (None, None))
    head = {
        **({"base_model": base} if base else {}),
        "library_name": "peft",
        **({"pipeline_tag": pipeline} if pipeline else {}),
        "tags": [*([f"base_model:adapter:{base}"] if base else []), "peft", "pica", *tags],
    }
    method = _METHODS.get(kind, kind)
    rows = {
        "base model": _base(recorded, config.get("revision")),
        "method": _method(config, method),
        "parameters": f"{_parameters(folder):,}" if (folder / _WEIGHTS).is_file() else "",
        "layers": _layers(config),
        **(facts or {}),
    }
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip()}\n---",
        _MARK,
        f"# {_plain(title) or f'{method} adapter'}",
        f"{'An' if kind == 'SVFT' else 'A'} {method} adapter for PEFT, written by "
        f"pica {__version__} (`pip install pica-peft`).",
        _table([("", ""), *((name, value) for name, value in rows.items() if value)]),
    ]
    if measures:
        parts += ["## Measured", _table(measures), *([note] if note else [])]
    more = (
        f", num_labels={count}" if (count := _outputs(folder)) and str(config.get("task_type")).endswith("_CLS") else ""
    )
    parts += ["## Use", *_use(kind, base, recorded, config, auto, (folder / TEMPLATE).is_file(), more)]
    parts.append(
        "## Licence\n\nNone is stated. Whoever publishes this adapter sets it (`license:` at the top of this file), within "
        "what the base model's licence allows."
    )
    return "\n\n".join(parts) + "\n"


def _use(
    kind: str, base: str, recorded: str, config: Mapping[str, Any], auto: str | None, has_template: bool, more: str
) -> list[str]:
    ours = kind in _METHODS
    where = base if recorded and not is_local(recorded) else f"path/to/{base or 'base-model'}"
    revision = f', revision="{_plain(config["revision"])}"' if config.get("revision") else ""
    revision += more
    parts = []
    if ours:
        parts += [
            "```bash\npip install pica-peft\n```",
            "`import pica` comes first: it makes the method known to PEFT. **Without it, loading this adapter ends in a "
            f"bare `KeyError: '{kind}'`.** The adapter is not damaged then; PEFT has no method of that name by itself.",
        ]
    code = ["import pica  # first"] if ours else []
    code += ["from peft import PeftModel"]
    if auto:
        code += [f"from transformers import {auto}", "", f'base = {auto}.from_pretrained("{_plain(where)}"{revision})']
    else:
        code += ["", f"base = ...  # {_plain(where)}, as you load it without an adapter"]
    code += [f'model = PeftModel.from_pretrained(base, "{PLACE}")  # or the folder that this file is in']
    parts += ["1. **With PEFT**", "```python\n" + "\n".join(code) + "\n```"]
    option = f" --base {_plain(where)}" if recorded and is_local(recorded) else ""
    commands = [
        f"hf download {PLACE} --local-dir this-adapter  # where it is not here yet",
        f"pica merge this-adapter -o merged{option}",
    ]
    parts += [
        "2. **Merged**, a plain model that needs neither pica nor PEFT",
        "```bash\n" + "\n".join(commands) + "\n```",
    ]
    if ours:
        parts += ["3. **As a LoRA**, for vLLM and other engines, without pica"]
        parts += [f"```bash\npica export this-adapter -o lora --for vllm{option}\n```"]
    if has_template:
        parts.append(
            f"The chat template that it was trained with is in `{TEMPLATE}`: `pica chat this-adapter` uses it by itself; "
            "elsewhere give its text to `tokenizer.chat_template`."
        )
    return parts


def _base(recorded: str, revision: str | None) -> str:
    if not recorded:
        return "not recorded"
    at = f", revision `{_plain(revision)}`" if revision else ""
    if is_local(recorded):
        return f"`{_plain(public_name(recorded))}`, a folder where this was trained{at}"
    return f"[{_plain(recorded)}](https://huggingface.co/{recorded}){at}"


def _method(config: Mapping[str, Any], method: str) -> str:
    told = [
        f"{name} = {config[name]}" for name in ("r", "share", "projection", "pattern") if config.get(name) is not None
    ]
    return ", ".join([method, *map(_plain, told)])


def _layers(config: Mapping[str, Any]) -> str:
    named = config.get("target_modules")
    names = [named] if isinstance(named, str) else sorted(map(str, named or []))
    return ", ".join(f"`{_plain(name)}`" for name in names) if len(names) <= 16 else f"{len(names)} layers"


def _parameters(folder: Path) -> int:
    """Values of the adapter's matrices, and of what is trained in full beside them."""
    total = 0
    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            part = file.get_slice(name)
            if part.get_dtype() in ("F64", "F32", "F16", "BF16") and ".basis:" not in name:
                size = 1
                for length in part.get_shape():
                    size *= length
                total += size
    return total


def _outputs(folder: Path) -> int | None:
    """How many outputs a head has that was saved with the adapter; the base model must be loaded with as many."""
    if not (folder / _WEIGHTS).is_file():
        return None
    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        names = [name for name in file.keys() if name.endswith(_HEADS)]  # noqa: SIM118 - it is no mapping
        return file.get_slice(names[0]).get_shape()[0] if names else None


def _table(rows: Sequence[Sequence[str]]) -> str:
    def cell(text: str) -> str:
        return re.sub(r"\s+", " ", visible(text)).replace("|", "\\|").replace("<", "&lt;")

    lines = ["| " + " | ".join(map(cell, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _plain(text: str | None) -> str:
    """A name as text of a Markdown line."""
    return re.sub(r"\s+", " ", visible(str(text or ""))).replace("<", "&lt;").replace("`", "'").strip()
