"""From a model's name to a basis file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import pica
from pica.basis import CALIBRATED
from pica.basis.file import BasisFile, check_free
from pica.calibration.making import make_basis
from pica.calibration.texts import EMBEDDED, LENGTH, TOKENS, calibration
from pica.errors import ConfigError
from pica.experiments.models import DTYPES, device, load_config, load_tokenizer, read_pretrained
from pica.experiments.recipes.recipe import ModelSection
from pica.files.output import claimed


@dataclass(frozen=True)
class Request:
    """What is wanted; see `make_basis` for the fields that are not a model's."""

    model: str
    projection: str = "activation"
    r: int = 256
    data: str = EMBEDDED
    tokens: int = TOKENS
    length: int = LENGTH
    seed: int = 0
    target_modules: Sequence[str] | None = None
    exclude_modules: Sequence[str] | None = None
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False


def make(request: Request, folder: Path, *, overwrite: bool = False) -> BasisFile:
    """Load the model, read the data if the projection looks at any, and write the basis.

    Args:
        request: What is wanted.
        folder: New, or empty.
        overwrite: Whether to replace a basis there.

    Returns:
        The file, open for reading.

    Raises:
        ConfigError: The model is not to be had, or a setting is wrong.
        PicaError: As `make_basis`.
    """
    config: Any = pica.PicaConfig(
        r=request.r,
        projection=request.projection,  # pyright: ignore[reportArgumentType] - checked there
        projection_seed=request.seed,
        target_modules=_names(request.target_modules),
        exclude_modules=_names(request.exclude_modules),
    )
    section = ModelSection(
        path=request.model,
        revision=request.revision,
        dtype=request.dtype,  # pyright: ignore[reportArgumentType] - one of its choices
        trust_remote_code=request.trust_remote_code,
    )
    with claimed(folder):
        check_free(folder, overwrite=overwrite)
        read = None
        if request.projection in CALIBRATED:
            tokenizer = load_tokenizer(section, generates=False)
            read = calibration(request.data, tokenizer, tokens=request.tokens, seed=request.seed, length=request.length)
        elif request.data != EMBEDDED:
            raise ConfigError(f"--data: projection {request.projection} looks at no data; leave it out.")
        config.base_model_name_or_path, config.revision = request.model, request.revision
        model = _load(section).to(device())  # pyright: ignore[reportArgumentType]
        return make_basis(model, folder, config, data=read, seed=request.seed, overwrite=overwrite)


def _names(given: Sequence[str] | None) -> Any:
    """As `PicaConfig` takes them: names, or alone all-linear or a regular expression."""
    if given is None:
        return None
    alone = len(given) == 1 and (given[0] == "all-linear" or re.fullmatch(r"[\w.]+", given[0]) is None)
    return given[0] if alone else list(given)


def _load(section: ModelSection) -> PreTrainedModel:
    """The model in the class that its configuration names, so that its layers are called as in training."""
    config = load_config(section)
    names = getattr(config, "architectures", None) or []
    named = getattr(transformers, names[0], None) if names else None
    if not (isinstance(named, type) and issubclass(named, PreTrainedModel)):
        named = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
    dtype: Any = "auto" if section.dtype == "auto" else DTYPES[section.dtype]
    return read_pretrained(named, section, {"dtype": dtype}).eval()
