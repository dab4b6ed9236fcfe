"""Base models: found from what an adapter's configuration records, and copied without their tensors."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import nn

from pica.adapters.fitting import output_options, whole_shapes
from pica.adapters.pipelines import part_name, stored_dtype
from pica.errors import AdapterFileError, ConfigError
from pica.files.documents import DocumentError, read_json
from pica.foreign_code import code_options, code_refusal, wants_code
from pica.text import first_line
from pica.tuners.base.config import BankedConfig
from pica.tuners.base.quantised import tensors_of_states
from pica.tuners.pica.config import PicaConfig
from pica.tuners.svft.config import SvftConfig

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
# Only these libraries are imported because an adapter's file names them.
_LIBRARIES = ("transformers", "diffusers")


def load_base_model(
    name: str | None,
    config: PeftConfig,
    *,
    revision: str | None = None,
    folder: Path | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load the base model of an adapter.

    Args:
        name: Folder or hub name; by default the one that `config` records.
        config: The adapter's configuration: its task type or class name says which model class to load.
        revision: Branch, tag or commit; by default the one that `config` records.
        folder: The adapter's folder: the model gets as many outputs as the head in it.
        trust_remote_code: Run the Python code that comes with the model, if it has some.
    Returns:
        The model, in its files' precision, in evaluation mode, on the CPU.
    Raises:
        AdapterFileError: The adapter's file is damaged, or its head cannot be that of such a model.
        ConfigError: No name is known, or the model cannot be loaded, or needs code of its own that may not be run.
    """
    name = name or config.base_model_name_or_path
    if not name:
        raise ConfigError("The adapter records no base model; give its name or folder as base_model (--base).")
    location = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name
    try:
        model_class: Any = model_class_of(location, config, trust_remote_code=trust_remote_code)
        options: dict[str, Any] = {"revision": revision or config.revision, "torch_dtype": "auto"}
        if _is_in_pipeline(location, model_class):
            options["subfolder"] = part_name(model_class.__name__)
        if model_class.__module__.startswith("diffusers."):
            options["torch_dtype"] = stored_dtype(Path(location) / options.get("subfolder", ""))
        else:
            options |= code_options(trust_remote_code)  # the models of diffusers have no code but the library's
            if folder is not None and (shapes := whole_shapes(folder)):
                own = base_config(location, revision=options["revision"], trust_remote_code=trust_remote_code)
                options |= output_options(model_class, own, shapes, trust_remote_code=trust_remote_code)
        model = model_class.from_pretrained(location, **options)
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        ImportError,
        RecursionError,
        pickle.UnpicklingError,
    ) as error:
        if wants_code(error):
            raise ConfigError(f"The base model {code_refusal(name)}") from error
        raise ConfigError(
            f"The base model {name!r} cannot be loaded ({first_line(error)}); give its folder or hub name as "
            "base_model (--base)."
        ) from error
    return model.eval()


def base_config(location: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The configuration of a model of transformers."""
    import transformers

    local = Path(location).is_dir()  # a folder must not cause requests to the hub
    return transformers.AutoConfig.from_pretrained(
        location, revision=revision or "main", local_files_only=local, **code_options(trust_remote_code)
    )


def model_class_of(location: str, config: PeftConfig, *, trust_remote_code: bool = False) -> type:
    """Find the class that an adapter's base model is loaded by.

    Args:
        location: Folder or hub name of the model.
        config: The adapter's configuration.
        trust_remote_code: As for `load_base_model`.
    Returns:
        What the adapter's task type or recorded class says, else what the model's configuration does.
    Raises:
        OSError: There is no such model.
        ValueError: There is no such model, or its configuration names no class.
        AttributeError: The library has no such class.
        ImportError: There is no such library.
    """
    import transformers

    task = str(getattr(config.task_type, "value", config.task_type) or "")
    if task in _AUTO_CLASSES:
        return getattr(transformers, _AUTO_CLASSES[task])
    recorded = config.auto_mapping or {}
    library, class_name = str(recorded.get("parent_library", "")), str(recorded.get("base_model_class", ""))
    if class_name and library.partition(".")[0] in _LIBRARIES:
        return getattr(importlib.import_module(library), class_name)
    architectures = base_config(location, trust_remote_code=trust_remote_code).architectures
    if not architectures:
        raise ValueError("its config.json names no architecture")
    return getattr(transformers, architectures[0])


def _is_in_pipeline(location: str, model_class: type) -> bool:
    """Whether `location` is a pipeline of diffusers that the model is a part of, in a subfolder."""
    folder = Path(location)
    if folder.is_dir():
        return (folder / "model_index.json").is_file()
    return model_class.__module__.startswith("diffusers.")  # nobody trains one that is published by itself


CONFIGS: dict[str, type[BankedConfig]] = {"PICA": PicaConfig, "SVFT": SvftConfig}


def read_peft_config(folder: Path) -> BankedConfig:
    """Read the configuration of a saved adapter.

    Args:
        folder: The adapter's.
    Returns:
        A `PicaConfig` or an `SvftConfig`.
    Raises:
        AdapterFileError: The folder holds none, or one of another method, or is damaged.
        ConfigError: The configuration has a wrong value.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():  # PEFT would look for it on the hub
            there = f"holds no {name}" if folder.is_dir() else "does not exist"
            raise AdapterFileError(f"Adapter folder {str(folder)!r} {there}.")
    try:
        method = read_json(folder / "adapter_config.json").get("peft_type")
        config = CONFIGS[method].from_pretrained(folder) if method in CONFIGS else None
    except (OSError, DocumentError, AttributeError, TypeError) as error:
        raise AdapterFileError(f"{folder / 'adapter_config.json'} cannot be read: {error}.") from error
    if config is None:
        raise AdapterFileError(f"{str(folder)!r} holds an adapter of type {method!r}, not a PiCa or SVFT adapter.")
    return config


@contextmanager
def flags_kept(model: object) -> Iterator[None]:
    """Leave a model's `requires_grad` flags as they are now: on a copy that shares its parameters PEFT freezes them."""
    flags = [(p, p.requires_grad) for p in model.parameters()] if isinstance(model, nn.Module) else []
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def share_tensors(model: nn.Module) -> nn.Module:
    """Copy the module tree, so that what is done to it (wrapping, unwrapping, evaluation mode) leaves `model` alone.

    Returns:
        A model that shares every parameter and buffer with `model`, at no memory.
    """
    beside = tensors_of_states(model)
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers(), *beside)}
    return copy.deepcopy(model, memo)
