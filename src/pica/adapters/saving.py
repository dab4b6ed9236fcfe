"""Save an adapter so that an interrupted or failed save leaves the previous one as it was."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pica.adapters.card import CARD, is_generated, write_card
from pica.errors import AdapterFileError, ConfigError, OutputError
from pica.files.folders import atomic_folder, flush, new_folder, translated_write_errors
from pica.tuners.base.config_file import CONFIG, WEIGHTS
from pica.tuners.base.sharding import is_dtensor

_CONVERSION = "path_initial_model_for_weight_conversion"  # of PEFT's save_pretrained


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
    infinity), and then take the folder's place. Other files in the folder, such as a tokenizer's, are kept, and so is a
    README.md that somebody has written; else it says what the adapter is and how to use it.

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
    with new_folder(target, overwrite=True) as beside:
        model.save_pretrained(
            str(beside),
            selected_adapters=[adapter_name],
            save_embedding_layers=save_embedding_layers,
            state_dict=state_dict,
        )
        inner = beside / adapter_name  # where PEFT puts every adapter but "default"
        if adapter_name != "default":
            for path in list(inner.iterdir()):
                os.rename(path, beside / path.name)
            inner.rmdir()
        _check_written(beside, expected, target)
        type(model.peft_config[adapter_name]).from_pretrained(str(beside))
        if is_generated(target / CARD):
            write_card(beside)
        else:
            shutil.copy2(target / CARD, beside / CARD)
        if target.is_dir():
            _keep_other_files(target, beside)


def save_whole(model: PeftModel) -> PeftModel:
    """Have `save_pretrained` of this one model leave whole files only, whenever it is interrupted.

    PEFT's writes in place. Trainer, SFTTrainer and `push_to_hub` call it on the model that they are given, so after this
    they save whole, too. Arguments and files are PEFT's, but for README.md, which is as `save_adapter` writes it. The files
    are written beside and flushed, and then take their places: all in one step where the folder has no folders within, as a
    checkpoint's; else each file in one step, the configuration last.

    Args:
        model: A PeftModel, with adapters of any method. Other models are left alone, and so is a pickled copy.
    Returns:
        The same model.
    """

    def save_pretrained(self: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> None:
        _save_whole(partial(type(self).save_pretrained, self), save_directory, args, kwargs)

    model.save_pretrained = MethodType(save_pretrained, model)  # pyright: ignore[reportAttributeAccessIssue]
    return model


def _save_whole(write: Callable[..., None], save_directory: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    target = Path(save_directory).expanduser()
    asked = inspect.signature(write).bind(save_directory, *args, **kwargs).arguments
    # where PEFT converts weights, it reads another folder within that one; none of the methods here does that
    if not asked.get("is_main_process", True) or target.is_file() or asked.get(_CONVERSION) is not None:
        write(save_directory, *args, **kwargs)
        return
    if not target.is_dir() or not any(path.is_dir() for path in target.iterdir()):
        with atomic_folder(target) as beside:
            _write_beside(write, beside, target, args, kwargs)
            if target.is_dir():
                _keep_other_files(target, beside)
        return
    with translated_write_errors(target), TemporaryDirectory(prefix=".", suffix=".partial", dir=target) as name:
        beside = Path(name)
        _write_beside(write, beside, target, args, kwargs)
        files = [path for path in beside.rglob("*") if path.is_file()]
        for path in files:
            flush(path)
        for path in sorted(files, key=lambda path: path.name == CONFIG):
            place = target / path.relative_to(beside)
            place.parent.mkdir(exist_ok=True)
            os.replace(path, place)


def _write_beside(
    write: Callable[..., None], beside: Path, target: Path, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    card = target / CARD
    if card.is_file():
        shutil.copy2(card, beside / card.name)  # PEFT goes on from what is there
    write(str(beside), *args, **kwargs)
    for config in beside.rglob(CONFIG):  # every adapter but "default" has a folder of its own
        write_card(config.parent)


def save_adapters(models: Mapping[str, PeftModel], folder: Path) -> None:
    """Save the adapters of several parts of one pipeline: the first in `folder` itself, each other in one of its name.

    Raises:
        AdapterFileError, OutputError: as `save_adapter`; the folder is as it was.
    """
    (_, first), *others = models.items()
    if not others:
        save_adapter(first, folder, save_embedding_layers=False)
        return
    with new_folder(folder, overwrite=True) as beside:
        save_adapter(first, beside, save_embedding_layers=False)
        for name, model in others:
            save_adapter(model, beside / name, save_embedding_layers=False)
        if folder.is_dir():
            _keep_other_files(folder, beside)


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
