"""What the start page and the recipe's reference say: numbers of benchmarks/results, and the fields of a recipe."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from pica.experiments.recipes.parsing import field_help, recipe_fields, section_names, type_in_words

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


def comparison(name: str) -> dict[str, dict[str, Any]]:
    """The rows of a comparison that were run, by their labels."""
    found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    rows = found["digits" if name == "digits" else "comparison"]["rows"]
    return {row["label"]: row for row in rows if row["seeds_done"]}


def ties(name: str) -> dict[str, int]:
    """How many methods a comparison has, and how many of them are not told apart from the best, itself included."""
    rows = comparison(name)
    return {"methods": len(rows), "tied": sum(row["place"] in ("best", "tie") for row in rows.values())}


def against_lora() -> list[dict[str, str]]:
    """The lines of the start page's table, each with its verdict from the numbers."""
    lines = []
    for name, task, ours, theirs in (
        ("comparison_minilm-sst2", "SST-2, MiniLM", "PiCa r=48", "LoRA r=8"),
        ("comparison_minilm-sst2", "the same, smallest", "PiCa r=8", "LoRA r=1"),
        ("digits", "digits, small ViT", "PiCa r=12", "LoRA r=1"),
        ("comparison_smollm2-arithmetic", "arithmetic, SmolLM2, first 16 steps", "PiCa r=60", "LoRA r=1"),
    ):
        rows = comparison(name)
        one, other = rows[ours], rows[theirs]
        lines.append({"what": task, "pica": _shown(one), "lora": _shown(other), "verdict": _verdict(one, other)})
    steps = json.loads((RESULTS / "step_time.json").read_text(encoding="utf-8"))
    ours, theirs = steps["time_ratio"]["PiCa r=64"], steps["time_ratio"]["LoRA r=1"]
    overlap = ours["upper"] >= theirs["lower"] and theirs["upper"] >= ours["lower"]
    lines.append(
        {
            "what": "time of a step over that of the frozen model, SmolLM2's shapes, about equal parameters",
            "pica": f"r=64: {_ratio(ours)}",
            "lora": f"r=1: {_ratio(theirs)}",
            "verdict": "a tie: the middle halves overlap" if overlap else _lower(ours["ratio"], theirs["ratio"]),
        }
    )
    many = json.loads((RESULTS / "many_adapters.json").read_text(encoding="utf-8"))
    ours, theirs = (many[name]["one_more"]["mib"] for name in ("PiCa r=32", "LoRA r=1"))
    lines.append(
        {
            "what": "memory of one more adapter on the same model",
            "pica": f"r=32: {ours:.2f} MiB",
            "lora": f"r=1: {theirs:.2f} MiB",
            "verdict": _lower(ours, theirs),
        }
    )
    bases = json.loads((RESULTS / "basis.json").read_text(encoding="utf-8"))["Gemma-2B"]
    share = bases["ratio"]["ratio"]
    lines.append(
        {
            "what": "before the first step of a new model",
            "pica": f"bases are solved, once: {share:.0%} of the time of an SVD of each weight (Gemma-2B's shapes)",
            "lora": "nothing",
            "verdict": "LoRA",
        }
    )
    return lines


def _shown(row: dict[str, Any]) -> str:
    loss = f"loss {row['loss_mean']:.3f}" + (f" ± {row['loss_sd']:.3f}" if row["loss_sd"] is not None else "")
    size = f"{row['label'].split()[1]}, {row['parameters']:,} parameters"
    return f"{size}: {row['score_mean']:.1%} ({row['score_low']:.1%} to {row['score_high']:.1%}), {loss}"


def _verdict(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Accuracy by the two intervals; loss by mean and deviation over seeds, where there are several."""
    overlap = one["score_high"] >= other["score_low"] and other["score_high"] >= one["score_low"]
    better = "PiCa" if one["score_mean"] > other["score_mean"] else "LoRA"
    said = "accuracy: a tie" if overlap else f"accuracy: {better}"
    difference = one["loss_mean"] - other["loss_mean"]
    lower = "PiCa" if difference < 0 else "LoRA"
    if one["loss_sd"] is None or other["loss_sd"] is None:
        return f"{said}; loss: {lower} lower, one seed"
    if abs(difference) <= 2 * math.hypot(one["loss_sd"], other["loss_sd"]) / math.sqrt(3):
        return f"{said}; loss: a tie"
    return f"{said}; loss: {lower} lower"


def _lower(ours: float, theirs: float) -> str:
    return "PiCa" if ours < theirs else "LoRA"


def _ratio(found: dict[str, float]) -> str:
    return f"{found['ratio']:.2f} ({found['lower']:.2f} to {found['upper']:.2f})"


def recipe_sections() -> list[dict[str, Any]]:
    """Each section of a recipe with its fields, as the command line tells them; the top level first."""
    texts, found = field_help(), []
    for section in ("", *section_names()):
        fields = [
            {
                "name": name,
                "type": _cell(type_in_words(field.type).removesuffix(" or null")),
                "default": _default(field),
                "help": _cell(texts[name]),
            }
            for name, field in recipe_fields().items()
            if name.rpartition(".")[0] == section
        ]
        title, text = section or "The run itself", texts.get(section, "These stand at the top of the file.")
        found.append({"title": title, "help": text, "fields": fields})
    return found


def _default(field: dataclasses.Field) -> str:
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else "REQUIRED"
    if default is None or default == "":
        return "none"
    return f"`{_cell(json.dumps(default) if isinstance(default, (bool, list, dict)) else str(default))}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
