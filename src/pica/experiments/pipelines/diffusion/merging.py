"""An adapter and its pipeline made into one plain pipeline folder."""

import shutil
from pathlib import Path
from typing import Any

import torch

from pica.adapters.pipelines import adapter_folders, stored_dtype
from pica.errors import AdapterFileError
from pica.experiments.models import load_adapter
from pica.experiments.pipelines.diffusion.loading import load_pipeline, local_folder, quiet
from pica.experiments.recipes.recipe import ModelSection
from pica.files import output as files


def merge_pipeline(adapter: Path, target: Path, section: ModelSection, *, dtype: torch.dtype | None) -> Path:
    """Write the pipeline with merged weights to `target`, which `check_free` has found free; see `merge`.

    Parts without adapter are copied as they are. The sum W + dW is formed in float32 and rounded once.

    Args:
        adapter: Adapter folder, perhaps with one of the text encoder in it.
        target: New or empty folder.
        section: The pipeline.
        dtype: Precision of the merged parts; that of their files if None.
    Returns:
        `target`.
    Raises:
        ConfigError: The pipeline is not to be had.
        AdapterFileError: The adapter is not to be had, or the result is not finite.
        OutputError: `target` can't be written.
    """
    folder = local_folder(section)
    pipeline, family = load_pipeline(section)
    merged: dict[str, Any] = {}
    for name, place in adapter_folders(adapter).items():
        part = name or family.component
        if (model := pipeline.components.get(part)) is None:
            raise AdapterFileError(f"{str(place)!r} belongs to a {part}, which the pipeline has not.")
        joined: Any = load_adapter(model, place).merge_and_unload()
        with quiet():  # diffusers warns of any change of precision
            merged[part] = joined.to(dtype or stored_dtype(folder / part))
        for weight, parameter in merged[part].named_parameters():
            if not torch.isfinite(parameter).all():
                raise AdapterFileError(
                    f"Merged weight {weight} is not finite in {parameter.dtype}; choose another --dtype."
                )
    with files.atomic_folder(target, replace=False) as partial:
        shutil.copytree(folder, partial, dirs_exist_ok=True, ignore=_all_but(folder, set(merged)))
        for part, model in merged.items():
            model.save_pretrained(str(partial / part))
    return target


def _all_but(folder: Path, parts: set[str]) -> Any:
    """For `shutil.copytree`: leave these subfolders out, and hidden files."""

    def ignored(where: str, names: list[str]) -> list[str]:
        top = Path(where) == folder
        return [name for name in names if name.startswith(".") or (top and name in parts)]

    return ignored
