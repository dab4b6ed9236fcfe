"""Bases of a model held against its first gradient on some text, for `pica analyze` and `pica plan`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from pica.basis import OF_INPUTS
from pica.calibration.capture import LayerCapture, captured_gradient
from pica.calibration.making import directions, target_layers
from pica.calibration.texts import LENGTH, TOKENS, Batch, Calibration, calibration
from pica.errors import ConfigError, DataError
from pica.experiments.batches import attended, padded
from pica.experiments.encoding import IGNORED
from pica.experiments.models import device, load_config, load_model, load_tokenizer
from pica.experiments.recipes.recipe import ModelSection
from pica.experiments.results.screening import Screen, ScreenRow, TextRead
from pica.tuners.base.pointwise import is_pointwise
from pica.tuners.base.roles import role_of
from pica.tuners.pica.config import PicaConfig

CAUSAL = AutoModelForCausalLM._model_mapping
OF_WEIGHTS = ("principal", "random", "minor")
GRADIENT_TOKENS = 2048
"""Of the batch that the gradient is of."""


@dataclass(frozen=True)
class ScreenQuestion:
    """What to screen.

    Attributes:
        model: Which; it has to predict text.
        data: Text that the gradient is of; see `pica.calibration.texts.calibration`.
        calibration: Text that `activation` and `weighted` directions are of; None: these two are left out.
        r: Directions a layer.
        target_modules: As PicaConfig's.
        only: Regular expression; only layers whose path it is found in.
        seed: Of the order of texts, and of random directions.
    """

    model: ModelSection
    data: str
    calibration: str | None = None
    r: int = 32
    target_modules: list[str] | str | None = None
    only: str | None = None
    seed: int = 0


def screen(question: ScreenQuestion) -> Screen:
    """Load the model, take the gradient of the loss on one batch of text, and hold the bases against it.

    Args:
        question: What to screen.

    Returns:
        The shares.

    Raises:
        ConfigError: The model is not to be had, or does not predict text.
        TargetError: A target matches no layer.
        DataError: There is nothing to read, or nothing but what the gradient is of.
    """
    _check(question)
    tokenizer = load_tokenizer(question.model, generates=False)
    options: dict[str, Any] = {"seed": question.seed, "length": LENGTH}
    text = calibration(question.data, tokenizer, tokens=GRADIENT_TOKENS, **options)
    read = None
    if question.calibration is not None:
        read = calibration(question.calibration, tokenizer, tokens=TOKENS + GRADIENT_TOKENS, **options)
        read = without(read, text)
    loaded: Any = load_model(question.model)
    model: nn.Module = loaded.to(device())
    rows, notes = _bases(model, question, read)
    captured = captured_gradient(model, rows, as_batch(text))
    ranks = {path: len(found) for path, found in rows["random"].items()}
    for name, held in rows.items():
        if name in OF_INPUTS and any(len(found) < ranks[path] for path, found in held.items()):
            least = min(map(len, held.values()))
            notes.append(f"The calibration text gives some layers fewer {name} directions, {least} at least.")
    return Screen(
        r=question.r,
        gradient=TextRead(**text.about),
        calibration=TextRead(**read.about) if read else None,
        rows=pooled(captured, ranks),
        notes=notes,
    )


def as_batch(text: Calibration) -> Batch:
    """All sequences as one batch, filled up at the right, with labels on all tokens but the padding."""
    ids = [batch["input_ids"][0].tolist() for batch in text.batches]
    return {"input_ids": padded(ids, 0), "attention_mask": attended(ids), "labels": padded(ids, IGNORED)}


def without(read: Calibration, other: Calibration) -> Calibration:
    """What is read, without the sequences (or the beginnings of such) that another one has.

    Returns:
        The rest, described without a digest where it is less.

    Raises:
        DataError: Nothing is left.
    """
    seen = [tuple(batch["input_ids"][0].tolist()) for batch in other.batches]
    kept = [batch for batch in read.batches if not any(_alike(batch["input_ids"][0].tolist(), s) for s in seen)]
    if not kept:
        raise DataError(
            f"Calibration: {read.about['source']} holds no text but what the gradient is of; name more, or other text."
        )
    if len(kept) == len(read.batches):
        return read
    tokens = sum(batch["input_ids"].numel() for batch in kept)
    about = {name: value for name, value in read.about.items() if name != "digest"}  # it was of all of them
    return Calibration(kept, about | {"tokens": tokens, "sequences": len(kept)})


def _alike(one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether one sequence is the other, or where it was cut."""
    length = min(len(one), len(other))
    return tuple(one[:length]) == tuple(other[:length])


def pooled(captured: Mapping[str, LayerCapture], ranks: Mapping[str, int]) -> list[ScreenRow]:
    """Rows by role, and one of all layers.

    Args:
        captured: By path.
        ranks: Directions of each layer.

    Returns:
        Captured energy of the layers over all their energy.
    """
    roles: dict[str, list[str]] = {}
    for path in captured:
        roles.setdefault(role_of(path), []).append(path)
    return [_row(role, paths, captured, ranks) for role, paths in (*roles.items(), ("all", list(captured)))]


def _row(role: str, paths: Sequence[str], captured: Mapping[str, LayerCapture], ranks: Mapping[str, int]) -> ScreenRow:
    energies = {path: captured[path].energy for path in paths}
    total = sum(energies.values()) or 1.0

    def mean(of: Mapping[str, float]) -> float:
        return sum(energies[path] * of[path] for path in paths) / total

    names = captured[paths[0]].shares
    shares = {name: mean({path: captured[path].shares[name] for path in paths}) for name in names}
    chance = mean({path: ranks[path] / captured[path].in_features for path in paths})
    return ScreenRow(role=role, layers=len(paths), chance=chance, shares=shares)


def _bases(
    model: nn.Module, question: ScreenQuestion, read: Calibration | None
) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    """P of each layer by projection, and what was left out."""
    notes = list[str]()
    config: Any = PicaConfig(r=question.r, target_modules=question.target_modules, projection_seed=question.seed)
    with target_layers(model, config) as layers:
        linear = {p: la for p, la in layers.items() if _is_linear(la.get_base_layer()) and la.mixes}
        chosen = {path: layer for path, layer in linear.items() if re.search(question.only or "", path)}
        if not chosen:
            raise ConfigError(f"Model {question.model.path!r} has no linear layer that is asked for.")
        if left := len(layers) - len(linear):
            notes.append(f"{left} of the layers are embeddings or stacks of experts, which are left out.")
        rows = {}
        for projection in OF_WEIGHTS if read is None else (*OF_WEIGHTS, *OF_INPUTS):
            config.projection = projection
            rows[projection] = directions(model, chosen, config, read, seed=question.seed)
    return rows, notes


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D)) or is_pointwise(module)


def _check(question: ScreenQuestion) -> None:
    if question.r < 1:
        raise ConfigError(f"r={question.r} must be at least 1.")
    config = load_config(question.model)
    names = getattr(config, "architectures", None) or []
    known = names[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if names else type(config) in CAUSAL
    if not known and "AutoModelForCausalLM" not in (getattr(config, "auto_map", None) or {}):
        raise ConfigError(
            f"--screen is for models that predict text: the gradient is of their loss on it. {question.model.path!r} is a "
            f"{names[0] if names else config.model_type}."
        )
