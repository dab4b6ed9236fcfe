"""Reading a pipeline of diffusers from a folder or the hub."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, pipelines
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError

from pica.adapters.pipelines import stored_dtype
from pica.errors import ConfigError
from pica.experiments.models import DTYPES, locate
from pica.experiments.pipelines.diffusion.families import FAMILIES, Family
from pica.experiments.recipes.recipe import ModelSection
from pica.files.documents import read_json
from pica.foreign_code import code_options, nothing_asked
from pica.text import first_line

INDEX = "model_index.json"
# Where the classes of a pipeline's parts may come from, beside the pipelines of diffusers themselves.
_LIBRARIES = ("diffusers", "transformers")
_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError)
# What Stable Diffusion 3 does without where memory is short; diffusers wants to be told so.
_MAY_BE_ABSENT = {"StableDiffusion3Pipeline": ("text_encoder_3", "tokenizer_3")}


def load_pipeline(section: ModelSection) -> tuple[Any, Family]:
    """Load a text-to-image pipeline.

    A safety checker is left out: it would blacken pictures that are then learnt from. Only safetensors files are read.

    Returns:
        The pipeline, on the CPU and in evaluation mode, and how it is trained.
    Raises:
        ConfigError: The place holds no such pipeline, or one of a kind that is not known here.
    """
    folder = local_folder(section)
    index = read_index(folder, section.path)
    kind = str(index["_class_name"])
    absent = {name: None for name in _MAY_BE_ABSENT.get(kind, ()) if (index.get(name) or [None])[0] is None}
    if "safety_checker" in index:
        absent |= {"safety_checker": None, "requires_safety_checker": False}
    family = FAMILIES[kind]
    dtype = stored_dtype(folder / family.component) if section.dtype == "auto" else DTYPES[section.dtype]
    try:
        with quiet(), nothing_asked():
            pipeline: Any = DiffusionPipeline.from_pretrained(
                str(folder), torch_dtype=dtype, local_files_only=True, use_safetensors=True, **code_options(), **absent
            )
    except _ERRORS as error:
        raise ConfigError(f"Pipeline {section.path!r} cannot be loaded: {first_line(error)}") from error
    pipeline.set_progress_bar_config(disable=True)
    for module in models_of(pipeline).values():
        module.eval().requires_grad_(False)
    return pipeline, family


def local_folder(section: ModelSection) -> Path:
    """Find a pipeline's files; one of the hub is downloaded.

    Returns:
        Their folder on this machine.
    Raises:
        ConfigError: It is neither a folder nor to be had from the hub.
    """
    location = locate(section.path)
    if Path(location).is_dir():
        return Path(location)
    try:
        with quiet():
            return Path(
                DiffusionPipeline.download(location, revision=section.revision, use_safetensors=True, **code_options())
            )
    except _ERRORS as error:
        raise ConfigError(
            f"Pipeline {section.path!r} is no local folder, and loading it from the hub failed: {first_line(error)}"
        ) from error


def read_index(folder: Path, shown: str) -> dict[str, Any]:
    """Read a pipeline's model_index.json.

    Returns:
        Its content.
    Raises:
        ConfigError: There is none, it is damaged, names a kind of pipeline that is not known here, or a part whose class
            is neither diffusers' nor transformers': older diffusers import such a part, and that runs its code.
    """
    try:
        index = read_json(folder / INDEX)
        kind = index["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{shown!r} is no pipeline of diffusers: its {INDEX} cannot be read ({error}).") from None
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ConfigError(f"{shown!r} is a {kind}; task dreambooth knows {', '.join(FAMILIES)}.")
    for part, origin in index.items():
        library = origin[0] if isinstance(origin, list) and origin else None
        if library is None:  # a setting, or a part that is absent
            continue
        known = library in _LIBRARIES or (isinstance(library, str) and hasattr(pipelines, library))
        if not known or (folder / part / f"{library}.py").exists():
            raise ConfigError(
                f"{shown!r}: its {INDEX} takes {part} from {library!r}, code that is neither diffusers' nor transformers'; "
                "such a pipeline is not loaded."
            )
    return index


def models_of(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The pipeline's neural networks by their names in it."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


@contextmanager
def quiet() -> Iterator[None]:
    """Without diffusers' own bars and notes, which name nothing that a user of ours wrote."""
    verbosity, bars = diffusers_logging.get_verbosity(), diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of names that older versions do not know yet
            yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        if bars:
            diffusers_logging.enable_progress_bar()
