"""Methods side by side on real pictures: a vision transformer that has seen drawn shapes only learns scikit-learn's digits.

    python -m benchmarks.digits --work outputs/digits                  about 25 minutes on one core
    python -m benchmarks.digits --work outputs/digits --prepare-only   the model and the pictures

It draws shapes (twelve kinds of strokes, none of them a digit, seeded) and trains a small ViT on them from nothing,
writes the 1,797 digits as a folder of pictures, and runs `pica compare digits` (sixteen rows, three seeds). What is there
is not made again: the same command goes on where an earlier one stopped. It is a test at a small scale: pictures of
8 x 8, a model of 0.7 million parameters.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import pica.cli
from benchmarks.comparisons import comparison_table, verdict
from benchmarks.harness import copy_comparison, describe_machine, save
from pica.files.output import write_json
from pica.report.summary import summarise

SIZE = 32
"""Pixels on a side of the model's input; digits are enlarged to it by its image processor."""
VIT = ViTConfig(
    hidden_size=96,
    num_hidden_layers=6,
    num_attention_heads=4,
    intermediate_size=384,
    image_size=SIZE,
    patch_size=8,
)
STEPS, BATCH, RATE = 1500, 64, 1e-3
"""Of the training on shapes."""
HELD_OUT = 1024
"""Drawn shapes that the trained model is measured on."""
VALIDATION, TEST = 200, 797
"""Digits that rates are chosen on and results are reported on; the rest, 800, is learnt from."""


def _curve(function: Any, points: int = 9) -> list[tuple[float, float]]:
    return [function(step / (points - 1)) for step in range(points)]


def _closed(*corners: tuple[float, float]) -> list[list[tuple[float, float]]]:
    return [[*corners, corners[0]]]


STROKES: dict[str, list[list[tuple[float, float]]]] = {
    "angle": [[(-1, -1), (-1, 1), (1, 1)]],
    "arc": [_curve(lambda t: (math.cos(math.pi * t), 0.5 - math.sin(math.pi * t)))],
    "arrow": [[(-1, 0), (1, 0)], [(0.3, -0.7), (1, 0), (0.3, 0.7)]],
    "asterisk": [[(-1, 0), (1, 0)], [(-0.5, -0.87), (0.5, 0.87)], [(0.5, -0.87), (-0.5, 0.87)]],
    "cross": [[(-1, 0), (1, 0)], [(0, -1), (0, 1)]],
    "diamond": _closed((0, -1), (0.7, 0), (0, 1), (-0.7, 0)),
    "fork": [[(0, 1), (0, 0)], [(-0.9, -0.9), (0, 0), (0.9, -0.9)]],
    "ladder": [[(-0.6, -1), (-0.6, 1)], [(0.6, -1), (0.6, 1)], [(-0.6, 0), (0.6, 0)]],
    "square": _closed((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
    "tee": [[(-1, -1), (1, -1)], [(0, -1), (0, 1)]],
    "triangle": _closed((0, -1), (0.95, 0.8), (-0.95, 0.8)),
    "wave": [_curve(lambda t: (2 * t - 1, 0.6 * math.sin(2 * math.pi * t)))],
}
"""Kinds of shapes: the lines that each is drawn with, in a square from -1 to 1."""


def _segments() -> Tensor:
    """Ends of every kind's line segments, (kinds, segments, 2, 2); kinds with fewer repeat their last one."""
    kinds = [[(a, b) for line in lines for a, b in zip(line, line[1:])] for lines in STROKES.values()]
    longest = max(map(len, kinds))
    return torch.tensor([kind + kind[-1:] * (longest - len(kind)) for kind in kinds], dtype=torch.float32)


SEGMENTS = _segments()


def draw(kinds: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures of shapes: turned, stretched, slanted and shifted, of any stroke width, sharpness and brightness, with noise.

    Args:
        kinds: Index of each picture's kind, (pictures,).
        generator: Decides everything else.

    Returns:
        Brightness from 0 to 1, (pictures, SIZE, SIZE) float32.
    """
    count = len(kinds)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    angle = uniform(-0.6, 0.6)
    turned = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).view(count, 2, 2)
    stretched = torch.diag_embed(uniform(0.4, 0.8, 2))
    stretched[:, 0, 1] = uniform(-0.15, 0.15)
    ends = SEGMENTS[kinds] + 0.08 * torch.randn(count, *SEGMENTS.shape[1:], generator=generator)
    ends = ends @ (stretched @ turned)[:, None] + uniform(-0.15, 0.15, 1, 1, 2)
    places = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    pixels = torch.stack(torch.meshgrid(places, places, indexing="xy"), dim=-1).view(1, 1, -1, 2)
    begin, along = ends[:, :, None, 0], (ends[..., 1, :] - ends[..., 0, :])[:, :, None]
    share = ((pixels - begin) * along).sum(-1) / along.square().sum(-1).clamp(min=1e-6)
    distance = (pixels - begin - share.clamp(0, 1)[..., None] * along).norm(dim=-1).amin(dim=1)
    edge = (uniform(0.06, 0.16, 1) - distance) / uniform(0.02, 0.08, 1)
    drawn = uniform(0.6, 1.0, 1) * edge.sigmoid() + 0.05 * torch.randn(count, SIZE * SIZE, generator=generator)
    return drawn.clamp(0, 1).view(count, SIZE, SIZE)


def shapes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures as the model takes them, (count, 3, SIZE, SIZE) from -1 to 1, and their kinds, (count,)."""
    kinds = torch.randint(len(STROKES), (count,), generator=generator)
    pictures = draw(kinds, generator) * 2 - 1
    return pictures[:, None].expand(-1, 3, -1, -1), kinds


def pretrain(folder: Path, config: ViTConfig, *, steps: int, seed: int = 0) -> dict[str, Any]:
    """Train a ViT on shapes that are drawn as it goes, each seen once, and write it with its image processor.

    Returns:
        What is known of it: steps, pictures, seconds, and the accuracy on shapes of another seed.
    """
    torch.manual_seed(seed)
    names = dict(enumerate(STROKES))
    config = ViTConfig(**{**config.to_dict(), "id2label": names, "label2id": {n: i for i, n in names.items()}})
    model = ViTForImageClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    generator, begun = torch.Generator().manual_seed(seed + 1), time.monotonic()
    for step in range(1, steps + 1):
        pictures, kinds = shapes(BATCH, generator)
        loss = functional.cross_entropy(model(pixel_values=pictures).logits, kinds)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            print(f"  shapes: step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    seconds = time.monotonic() - begun
    known = {
        "steps": steps,
        "pictures": steps * BATCH,
        "seconds": round(seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "kinds": len(STROKES),
        "held_out": HELD_OUT,
        "accuracy": round(accuracy(model, torch.Generator().manual_seed(seed + 2)), 4),
    }
    # the head for shapes is left behind: each method starts from the body alone, with a new head for digits
    model.vit.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    write_json(folder / "training.json", known)
    return known


@torch.inference_mode()
def accuracy(model: PreTrainedModel, generator: torch.Generator) -> float:
    """Share of `HELD_OUT` newly drawn shapes whose kind the model names."""
    model.eval()
    pictures, kinds = shapes(HELD_OUT, generator)
    named = torch.cat([model(pixel_values=part).logits.argmax(-1) for part in pictures.split(128)])
    return (named == kinds).float().mean().item()


def write_digits(folder: Path, *, train: int | None = None, seed: int = 0) -> dict[str, int]:
    """Write the digits as 8 x 8 pictures in train, validation and test folders that share none, in the data set's shares of
    classes.

    Args:
        folder: Where; it must not exist yet.
        train: Use only this many of those that are learnt from.
        seed: Decides which go where.

    Returns:
        Pictures of each split.
    """
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pictures, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(np.arange(len(labels)), test_size=TEST, random_state=seed, stratify=labels)
    learnt, validation = train_test_split(
        rest, train_size=train, test_size=VALIDATION, random_state=seed, stratify=labels[rest]
    )
    splits = {"train": learnt, "validation": validation, "test": test}
    for name, numbers in splits.items():
        for number in numbers:
            inner = folder / name / str(labels[number])
            inner.mkdir(parents=True, exist_ok=True)
            pixels = (pictures[number].reshape(8, 8) * 255 / 16).round().astype(np.uint8)
            Image.fromarray(pixels).save(inner / f"{number:04d}.png")
    return {name: len(numbers) for name, numbers in splits.items()}


def prepare(work: Path, config: ViTConfig, *, steps: int, train: int | None = None) -> dict[str, Any]:
    """The model in `work`/model and the digits in `work`/pictures, unless they are there; what is known of the model."""
    model, pictures = work / "model", work / "pictures"
    makers: list[tuple[Path, Callable[[Path], object]]] = [
        (pictures, lambda folder: write_digits(folder, train=train)),
        (model, lambda folder: pretrain(folder, config, steps=steps)),
    ]
    for folder, make in makers:
        if folder.is_dir():
            continue
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        make(unfinished)
        unfinished.rename(folder)
    return json.loads((model / "training.json").read_text(encoding="utf-8"))


def results(compared: Path, known: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What goes into the results folder: all numbers, and the table."""
    summary = summarise(compared)
    numbers = json.loads((compared / "results.json").read_text(encoding="utf-8"))
    problems = next(row.done[0].problems for row in summary.rows if row.done)
    seeds = summary.content["seeds"]
    text = (
        f"A ViT of {known['parameters']:,} parameters, trained on {known['pictures']:,} drawn shapes of {known['kinds']} "
        f"kinds ({known['accuracy']:.1%} of {known['held_out']:,} others named; chance {1 / known['kinds']:.1%}), then on "
        f"{problems.train} digits. Learning rates are chosen with seed {seeds[0]} on {problems.validation} other "
        f"digits; accuracy and loss are on the remaining {problems.test}, mean ± standard deviation over seeds "
        f"{', '.join(map(str, seeds))}. A small-scale test.\n\n"
    )
    return {"shapes": known, "digits": numbers}, text + verdict(summary) + comparison_table(summary)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", default="outputs/digits", help="folder for the model, the pictures and the comparison"
    )
    parser.add_argument("--prepare-only", action="store_true", help="do not compare")
    parser.add_argument("--steps", type=int, default=STEPS, help="of the training on shapes")
    parser.add_argument("--train", type=int, help="learn from so many digits only")
    parser.add_argument("--name", default="digits", help="of the results")
    parser.add_argument("override", nargs="*", help="for pica compare, e.g. -- --seeds 0 --trainer.max_steps 10")
    given = parser.parse_args(argv)
    work = Path(given.work)
    known = prepare(work, VIT, steps=given.steps, train=given.train)
    print(f"Shapes: {known['accuracy']:.1%} of {known['held_out']} named (chance {1 / known['kinds']:.1%})", flush=True)
    if given.prepare_only:
        return 0
    compared = work / "compared"
    command = ["compare", "digits", "--model.path", str(work / "model"), "--data.train", str(work / "pictures")]
    if status := pica.cli.main([*command, "-o", str(compared), *given.override]):
        return status
    found, markdown = results(compared, known)
    save(given.name, describe_machine() | found, markdown)
    copy_comparison(compared, given.name)
    print(markdown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
