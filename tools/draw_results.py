"""Draw the start page's picture from benchmarks/results: accuracy against trained parameters, on two tasks.

    python tools/draw_results.py     write docs/pictures/accuracy.svg

Each mark carries what it shows as its id in the file, so that a test can hold the picture to the numbers.
"""

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tools.docs_numbers import comparison  # noqa: E402 - found from wherever this is started

PICTURE = ROOT / "docs" / "pictures" / "accuracy.svg"
TASKS = {"comparison_minilm-sst2": "SST-2, MiniLM (22M)", "digits": "Digits, a small ViT (0.7M)"}
FAMILIES = {  # prefix of a label: colour, mark, name in the legend
    "PiCa": ("#3f51b5", "o", "PiCa"),
    "LoRA": ("#e65100", "s", "LoRA"),
    "SVFT": ("#2e7d32", "^", "SVFT"),
    "full": ("#212121", "D", "full fine-tuning"),
    "": ("#9e9e9e", "v", "other methods of PEFT"),
}
LEFT_OUT = ("random", "minor", "not shared", "plain, shared", "head only")  # ablations; results.md has them
PLACES = {  # of labels that would lie on another mark: points to the right and up, and where the text ends
    "PiSSA r=8": (-7, -4, "right"),
    "DoRA r=8": (7, -1, "left"),
    "LoRA r=8": (-7, -4, "right"),
    "IA3": (-5, -13, "left"),
    "VeRA r=256": (7, -6, "left"),
    "SVFT banded d=8": (0, 8, "center"),
    "SVFT plain": (-6, 6, "left"),
    "PiCa r=48": (-7, 3, "right"),
}


def points(name: str) -> dict[str, dict[str, Any]]:
    """The rows of a comparison that the picture shows."""
    return {label: row for label, row in comparison(name).items() if not label.endswith(LEFT_OUT)}


def mark(name: str, row: dict[str, Any]) -> str:
    """What a mark shows, as its id."""
    low, mean, high = row["score_low"], row["score_mean"], row["score_high"]
    return f"{name}:{row['label']}:{row['parameters']}:{low:.4f}:{mean:.4f}:{high:.4f}"


def draw() -> None:
    style: Any = {"svg.fonttype": "path", "svg.hashsalt": "pica", "font.size": 10}
    with plt.rc_context(style | {"axes.spines.top": False, "axes.spines.right": False}):
        figure, both = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        for axes, (name, title) in zip(both, TASKS.items()):
            for label, row in points(name).items():
                family = next(prefix for prefix in FAMILIES if label.startswith(prefix))
                colour, shape, _ = FAMILIES[family]
                x, y = row["parameters"], 100 * row["score_mean"]
                bar = [[y - 100 * row["score_low"]], [100 * row["score_high"] - y]]
                axes.errorbar(x, y, yerr=bar, color=colour, alpha=0.35, linewidth=2)
                (found,) = axes.plot(x, y, shape, color=colour, markersize=7)
                found.set_gid(mark(name, row))
                short = label.removeprefix(f"{family} ") if family in ("PiCa", "LoRA", "SVFT") else label
                right, up, side = PLACES.get(label, (7, 5, "left"))
                short = "" if family == "full" else short
                axes.annotate(short, (x, y), (right, up), textcoords="offset points", fontsize=8, color=colour, ha=side)
            axes.set(xscale="log", xlabel="trained parameters, without the new head", title=title)
            axes.grid(alpha=0.2)
        both[0].set_ylabel("test accuracy, %")
        handles = [
            plt.Line2D([], [], marker=shape, color=colour, linestyle="", label=text)
            for colour, shape, text in FAMILIES.values()
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False)
        PICTURE.parent.mkdir(exist_ok=True)
        figure.savefig(PICTURE, metadata={"Date": None}, facecolor="white")
        plt.close(figure)


if __name__ == "__main__":
    draw()
    print(PICTURE.relative_to(ROOT))
