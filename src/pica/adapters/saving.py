"""Save an adapter so that an interrupted or failed save leaves the previous one as it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pica.adapters.folders import new_folder
from pica.errors import AdapterFileError, ConfigError, OutputError
from pica.tuner.sharding import is_dtensor

WEIGHTS = "adapter_model.safetensors"


def save_adapter(
    model: PeftModel,
    folder: str | Path,
    adapter_name: str = "default",
    *,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Save one adapter, of any PEFT method, into `folder` itself: whole or not at all.

    PEFT's `save_pretrained` writes in place, so a full disk or a kill leaves half an adapter where a whole one was. Here
    the files are written beside, flushed, opened again and held against the model (names, shapes, dtypes, no NaN or
    infinity), and then take the folder's place. Other files in the folder, such as a tokenizer's, are kept.

    Args:
        model: The model that carries the adapter.
        folder: Where to save. A folder that is there must be empty or hold an adapter, which is replaced.
        adapter_name: Which adapter.
        save_embedding_layers: As in PEFT's `save_pretrained`.
        state_dict: The model's, where its parameters are split between processes: all of them gather it
            (`accelerator.get_state_dict(model)`), one of them saves.
    Raises:
        ConfigError: the model has no such adapter.
        AdapterFileError: the adapter holds NaN or infinity, or is split between processes and was not gathered.
        OutputError: writing failed, or what was written is not what the model holds; the folder is as it was.
    """
    if adapter_name not in model.peft_config:
        raise ConfigError(f"The model has no adapter {adapter_name!r}; it has {', '.join(model.peft_config)}.")
    target = Path(folder).expanduser()
    expected = get_peft_model_state_dict(
        model, state_dict, adapter_name=adapter_name, save_embedding_layers=save_embedding_layers
    )
    for name, value in expected.items():
        if is_dtensor(value):
            raise AdapterFileError(
                f"{name}: the model is sharded, so this process holds a part of it only and nothing was written to "
                f"{str(target)!r}; pass state_dict=accelerator.get_state_dict(model), gathered by all processes."
            )
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise AdapterFileError(
                f"{name} of adapter {adapter_name!r} holds NaN or infinity, so nothing was written to {str(target)!r}; "
                "its training went wrong, go back to an earlier checkpoint."
            )
    with new_folder(target, overwrite=True) as partial:
        model.save_pretrained(
            str(partial),
            selected_adapters=[adapter_name],
            save_embedding_layers=save_embedding_layers,
            state_dict=state_dict,
        )
        inner = partial / adapter_name  # where PEFT puts every adapter but "default"
        if adapter_name != "default":
            for path in list(inner.iterdir()):
                os.rename(path, partial / path.name)
            inner.rmdir()
        _check_written(partial, expected, target)
        type(model.peft_config[adapter_name]).from_pretrained(str(partial))
        if target.is_dir():
            _keep_other_files(target, partial)


def save_adapters(models: Mapping[str, PeftModel], folder: Path) -> None:
    """Save the adapters of several parts of one pipeline: the first in `folder` itself, each other in one of its name.

    Raises:
        AdapterFileError, OutputError: as `save_adapter`; the folder is as it was.
    """
    (_, first), *others = models.items()
    if not others:
        save_adapter(first, folder, save_embedding_layers=False)
        return
    with new_folder(folder, overwrite=True) as partial:
        save_adapter(first, partial, save_embedding_layers=False)
        for name, model in others:
            save_adapter(model, partial / name, save_embedding_layers=False)
        if folder.is_dir():
            _keep_other_files(folder, partial)


def _check_written(partial: Path, expected: dict[str, Tensor], target: Path) -> None:
    """Hold the file against what the model holds."""
    problem = None
    try:
        with safe_open(partial / WEIGHTS, framework="pt") as file:
            names = set(file.keys())
            if names != set(expected):
                problem = f"its tensors are not the adapter's: {sorted(names ^ set(expected))[0]}"
            for name in sorted(names & set(expected)):
                value, wanted = file.get_tensor(name), expected[name]
                if value.shape != wanted.shape or value.dtype != wanted.dtype:
                    problem = f"{name} is {value.dtype} {tuple(value.shape)}"
                elif not torch.equal(value, wanted.detach().cpu()):  # finite, as the model's is
                    problem = f"{name} has other values than the model"
    except (SafetensorError, OSError, RuntimeError) as error:
        problem = str(error)
    if problem is not None:
        raise OutputError(f"What was written for {str(target)!r} cannot be used ({problem}); check that disk.")


def _keep_other_files(target: Path, partial: Path) -> None:
    """Give `partial` what `target` holds beside the adapter: as links to the same files, or copies where that fails."""
    for path in target.iterdir():
        new = partial / path.name
        if new.exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(path, new)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
