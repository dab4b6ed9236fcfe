"""A base model in the sizes that an adapter was trained with: as many outputs, as many rows of embeddings.

PEFT records neither. What an adapter's file holds whole (a classifier's head, embeddings with new tokens) tells.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pica.errors import AdapterFileError
from pica.foreign_code import code_options
from pica.text import first_line
from pica.tuners.base.bank import BANK_NAMES

logger = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]

_BANKS = tuple(f".{name}." for name in BANK_NAMES)
_PREFIX = "base_model.model."  # PEFT's, before each path in a file
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
# what may belong to one beside these
_TOKENIZER_PARTS = (
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
)


def whole_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of the tensors in an adapter's file that could be whole ones of the base model.

    Those of other methods than this package's (`...lora_A.weight`) are among them, under names that no base model has.

    Args:
        folder: The adapter's.
    Returns:
        {name in the base model: shape}.
    Raises:
        AdapterFileError: The file is missing or damaged.
    """
    path = folder / "adapter_model.safetensors"
    if not path.is_file():  # PEFT would look for it on the hub, or unpickle another
        raise AdapterFileError(f"{str(folder)!r} is no adapter folder: it holds no {path.name}.")
    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if not any(bank in key for bank in _BANKS)]  # noqa: SIM118 - no mapping
            return {_plain(key): tuple(file.get_slice(key).get_shape()) for key in keys}
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(f"{str(path)!r} is damaged or cut short ({first_line(error)}).") from error


def _plain(key: str) -> str:
    return key.removeprefix(_PREFIX).replace(".base_layer.", ".")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer, as TRL's and transformers' trainers save it beside an adapter."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def copy_tokenizer(folder: Path, target: Path) -> None:
    """Copy the tokenizer that lies in a folder, if there is one, its chat template with it."""
    if has_tokenizer(folder):
        for path in (path for name in (*TOKENIZER_FILES, *_TOKENIZER_PARTS) for path in sorted(folder.glob(name))):
            shutil.copyfile(path, target / path.name)


def whole_tensors(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """Tensors of an adapted model, by name, that its adapter's file holds whole without a wrapper: resized embeddings."""
    held = whole_shapes(folder)
    return {name: value for name, value in model.named_parameters(remove_duplicate=False) if _plain(name) in held}


def output_options(model_class: Any, config: Any, shapes: Shapes, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Options for `model_class.from_pretrained` that give the model's head as many outputs as the adapter's has.

    Args:
        model_class: A class of transformers, or one of its Auto classes.
        config: The base model's configuration.
        shapes: As `whole_shapes` gives them.
        trust_remote_code: Run the Python code that comes with the model, if it has some.
    Returns:
        Nothing where the base's own number is right.
    Raises:
        AdapterFileError: the adapter's head cannot be that of such a model.
    """
    if not shapes or getattr(config, "num_labels", None) is None:
        return {}
    try:
        with torch.device("meta"):
            if hasattr(model_class, "from_config"):
                built = model_class.from_config(config, **code_options(trust_remote_code))
            else:
                built = model_class._from_config(config)
    except Exception:  # whatever an architecture's own code raises: loading it in earnest will tell
        return {}
    vocabulary = {f"{path}.{kind}" for path in _vocabulary_paths(built) for kind in ("weight", "bias")}
    wanted = {
        shapes[name][0]
        for name, parameter in built.named_parameters()
        if name in shapes and name not in vocabulary and _differs_by_outputs(parameter, shapes[name], config.num_labels)
    }
    if len(wanted) > 1:
        raise AdapterFileError(
            f"The adapter's heads have {' and '.join(map(str, sorted(wanted)))} outputs; it is damaged."
        )
    return {"num_labels": wanted.pop(), "ignore_mismatched_sizes": True} if wanted else {}


def _differs_by_outputs(parameter: nn.Parameter, shape: tuple[int, ...], outputs: int) -> bool:
    own = tuple(parameter.shape)
    return own != shape and len(own) == len(shape) > 0 and own[0] == outputs and own[1:] == shape[1:]


def fit_embeddings(model: nn.Module, folder: Path, config: PeftConfig, shapes: Shapes | None = None) -> None:
    """Give the model's embeddings, in place, the rows that the adapter was trained with, and see that all else fits.

    They are those of the embeddings in the adapter's file; else enough for its `trainable_token_indices` and for the
    tokenizer beside it. Tensors that the adapter will write into are no longer shared with another model.

    Raises:
        AdapterFileError: what the file holds whole has another shape than the model's, both of which are named.
    """
    shapes = whole_shapes(folder) if shapes is None else shapes
    found = _rows(model)
    if found is not None:
        rows = _wanted_rows(model, folder, config, shapes, found)
        if rows != found:
            held = any(shapes.get(f"{path}.weight", (0,))[0] == rows for path in _vocabulary_paths(model))
            trained = _highest_index(config) >= found
            if not held and not trained:
                logger.warning(
                    "The tokenizer beside the adapter has %d tokens and the base model's embeddings have %d rows; the "
                    "adapter holds none for the new ones, so they are made anew.",
                    rows,
                    found,
                )
            _unshare(model, {f"{path}.{kind}" for path in _vocabulary_paths(model) for kind in ("weight", "bias")})
            resizable: Any = model
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                resizable.resize_token_embeddings(rows, mean_resizing=not held and not trained)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name in shapes and parameter.is_floating_point() and tuple(parameter.shape) != shapes[name]:
            raise AdapterFileError(
                f"The adapter holds {name} of shape {shapes[name]}, and this model has one of shape "
                f"{tuple(parameter.shape)}; load the model with as many outputs or tokens as the adapter was trained with."
            )
    _unshare(model, set(shapes))
    _take_adapted_embeddings(model, folder, shapes)


def _wanted_rows(model: nn.Module, folder: Path, config: PeftConfig, shapes: Shapes, found: int) -> int:
    for path in _vocabulary_paths(model):
        if len(shape := shapes.get(f"{path}.weight", ())) == 2:
            return shape[0]
    wanted = max(found, _highest_index(config) + 1)
    if not has_tokenizer(folder):
        return wanted
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, **code_options())
    except Exception as error:  # a tokenizer's own code raises what it likes
        raise AdapterFileError(f"The tokenizer in {str(folder)!r} cannot be loaded ({first_line(error)}).") from error
    return max(wanted, len(tokenizer))


def _highest_index(config: PeftConfig) -> int:
    indices: Any = getattr(config, "trainable_token_indices", None) or []
    lists: Iterable[list[int]] = indices.values() if isinstance(indices, Mapping) else [indices]
    return max((index for each in lists for index in each), default=-1)


def _rows(model: Any) -> int | None:
    """Rows of the input embeddings; None for a model without any."""
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None
    return weight.shape[0] if hasattr(model, "resize_token_embeddings") and weight.ndim == 2 else None


def _vocabulary_paths(model: Any) -> list[str]:
    """Paths of the input and output embeddings."""
    modules = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            modules.append(getattr(model, name)())
        except (AttributeError, NotImplementedError):
            continue
    modules = [module for module in modules if isinstance(module, (nn.Embedding, nn.Linear))]
    named = model.named_modules(remove_duplicate=False)
    return [path for path, module in named if any(module is known for known in modules)]


def _take_adapted_embeddings(model: nn.Module, folder: Path, shapes: Shapes) -> None:
    """Load now the resized embeddings that the adapter itself adapts: it is held against them before PEFT loads them."""
    own = {f"{path}.weight" for path in _vocabulary_paths(model)} & set(shapes)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file, torch.no_grad():
        for key in file.keys():  # noqa: SIM118 - no mapping
            if ".base_layer." in key and _plain(key) in own:
                model.get_parameter(_plain(key)).copy_(file.get_tensor(key))


def _unshare(model: nn.Module, names: set[str]) -> None:
    """Give the model copies of its parameters of these names, in every place where they are used.

    Resizing and loading write into them, and another model may hold them too.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    copies = {id(p): nn.Parameter(p.detach().clone(), p.requires_grad) for n, p in named.items() if n in names}
    for name, parameter in named.items():
        if id(parameter) in copies:
            path, _, last = name.rpartition(".")
            model.get_submodule(path)._parameters[last] = copies[id(parameter)]
