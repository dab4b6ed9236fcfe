"""Adapters that begin with a look at data: the basis of a run that none was named for, and LoRA's start by EVA."""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.eva import initialize_lora_eva_weights

from pica.basis import CALIBRATED
from pica.basis.file import NAME, holds_basis, open_basis
from pica.basis.shared import keep, kept
from pica.calibration.making import make_basis
from pica.calibration.texts import Calibration, calibration
from pica.experiments.adapters import peft_config
from pica.experiments.batches import padded
from pica.experiments.distributed import in_first, leads
from pica.experiments.encoding import IGNORED
from pica.experiments.models import device
from pica.experiments.pipelines import Pipeline
from pica.experiments.recipes.recipe import AdapterSection, Recipe
from pica.experiments.train.origins import model_digest
from pica.files.output import atomic_folder

BASIS = "basis"
"""Folder inside a run's folder with the basis that was made for it."""
OWN_DATA = "train"
"""`adapter.calibration` for the run's own training problems."""
_EVA_BATCH = 8


def adapted(
    pipeline: Pipeline, section: AdapterSection, rows: Any, recipe: Recipe, folder: Path, target: Path
) -> peft.PeftModel:
    """`pipeline.adapt`, with what the method has to see of the data first.

    Args:
        pipeline: Of the run.
        section: The adapter.
        rows: The training problems as the pipeline's `encode` gave them.
        recipe: Of the run.
        folder: The run's folder, which may hold the basis already.
        target: What that folder will be called once the run is complete.

    Returns:
        The model, whose adapter names the basis where the run will have it.
    """
    seed = recipe.trainer.seed
    if section.method == "eva":
        model = pipeline.adapt(section, seed=seed)
        _start_by_eva(model, pipeline.readable(rows, recipe.trainer.max_length), section, seed=seed)
        return model
    if section.method != "pica" or section.projection not in CALIBRATED or section.basis_from:
        return pipeline.adapt(section, seed=seed)
    place = in_first(lambda: str(_basis_for(pipeline, section, rows, recipe, folder)))
    model = pipeline.adapt(dataclasses.replace(section, basis_from=place), seed=seed)
    for config in model.peft_config.values():
        config.basis_from = str(target / BASIS)  # pyright: ignore[reportAttributeAccessIssue] -- a PicaConfig
        config.found_in = place  # pyright: ignore[reportAttributeAccessIssue]
    return model


def bring_basis(model: peft.PeftModel | None, folder: Path) -> None:
    """Copy the basis that was made for a run into its folder, where its adapter finds it."""
    for config in {} if model is None else model.peft_config.values():
        made = getattr(config, "basis_digest", None) and getattr(config, "found_in", None)
        if made and leads() and not holds_basis(str(folder / BASIS)):
            with atomic_folder(folder / BASIS) as partial:
                shutil.copyfile(open_basis(Path(made)).path, partial / NAME)


def _basis_for(pipeline: Pipeline, section: AdapterSection, rows: Any, recipe: Recipe, folder: Path) -> Path:
    """The basis of these settings: that of the run's folder, one that was made before, or a new one."""
    read = _read(pipeline, section, rows, recipe)
    rank = max([section.r, *section.rank_pattern.values()])
    if holds_basis(str(folder / BASIS)):
        own = open_basis(folder / BASIS).about
        if (own.projection, own.rank, own.calibration.get("digest")) == (
            section.projection,
            rank,
            read.about["digest"],
        ):
            return folder / BASIS
    targets = [section.target_modules, section.exclude_modules, section.layers_to_transform]
    model_of = [dataclasses.asdict(recipe.model), model_digest(recipe.model.path, recipe.model.revision)]
    parts = [model_of, recipe.task.name, targets, section.projection, rank, read.about["digest"]]
    if section.projection == "gradient":
        parts += [section.share, section.options.get("input_side")]
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    if (found := kept(key)) is not None:
        return found.path
    config: Any = peft_config(dataclasses.replace(section, r=rank, rank_pattern={}), task_type=None)
    made = Path(tempfile.mkdtemp(prefix="pica-basis-"))
    config.base_model_name_or_path = recipe.model.path
    model: Any = pipeline.load_base()
    basis = make_basis(model.to(device()), made, config, data=read, overwrite=True)
    keep(key, basis)
    found = kept(key)
    if found is None:  # there is no cache
        return basis.path
    shutil.rmtree(made, ignore_errors=True)
    return found.path


def _read(pipeline: Pipeline, section: AdapterSection, rows: Any, recipe: Recipe) -> Calibration:
    source: Any = section.calibration
    if source == OWN_DATA:
        source = pipeline.readable(rows, section.calibration_tokens)
    tokenizer = getattr(pipeline, "tokenizer", None)
    read = calibration(
        source,
        tokenizer,
        tokens=section.calibration_tokens,
        seed=recipe.data.seed,
        length=recipe.trainer.max_length,
        labels=section.projection == "gradient",
    )
    if section.calibration == OWN_DATA:
        read.about["source"] = f"training data of {recipe.name}"
    return read


def _start_by_eva(model: peft.PeftModel, rows: Any, section: AdapterSection, *, seed: int) -> None:
    """A from the principal directions of the inputs, by PEFT's own EVA; the ranks stay as they are."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    batches = [_padded([rows[i] for i in order[at : at + _EVA_BATCH]]) for at in range(0, len(rows), _EVA_BATCH)]
    batches = [batch for batch in batches if len(batch["input_ids"]) == _EVA_BATCH] or batches
    initialize_lora_eva_weights(model.to(device()), batches, show_progress_bar=False)


def _padded(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = [row["input_ids"] for row in rows]
    masks = [row.get("attention_mask") or [1] * len(row["input_ids"]) for row in rows]
    batch = {"input_ids": padded(ids, 0), "attention_mask": padded(masks, 0)}
    if "labels" in rows[0]:
        batch["labels"] = padded([row["labels"] for row in rows], IGNORED)
    return batch
