"""What is checked of an adapter folder before its configuration is used, and long before a model is touched."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pica.errors import AdapterFileError
from pica.files.documents import read_json
from pica.tuners.base.bank import BANK_NAMES
from pica.tuners.base.matching import problem_of_pattern

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Pickled by torch. PEFT would read it (with weights_only=True), and saves one where it is asked to.
_TORCH_WEIGHTS = "adapter_model.bin"
# PEFT names both for each classifier, whichever the model has.
_HEADS = ("classifier", "score")
ALLOW_TORCH_WEIGHTS = "PICA_ALLOW_TORCH_FILES"


def read_config_file(path: str | PathLike[str], fields: Collection[str]) -> dict[str, Any]:
    """Read an adapter_config.json.

    Args:
        path: The file.
        fields: Names that it may hold.
    Returns:
        Its fields.
    Raises:
        AdapterFileError: It cannot be read, is no JSON object, or holds other fields with a value; those that are null,
            false, {} or [] are noted and left out.
    """
    try:
        found = read_json(Path(path))
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{str(path)!r} cannot be read: {str(error) or type(error).__name__}.") from error
    if not isinstance(found, dict):
        raise AdapterFileError(f"{str(path)!r} must hold a JSON object, not a {type(found).__name__}.")
    return known_fields(str(path), found, fields)


def known_fields(where: str, found: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """Leave out what is not known; what has no value is noted, and nothing lost with it.

    Args:
        where: The file, for messages.
        found: What it holds.
        fields: What is known.
    Returns:
        The known fields.
    Raises:
        AdapterFileError: It holds others with a value.
    """
    strange = sorted(set(found) - set(fields))
    if valued := [name for name in strange if not _says_nothing(found[name])]:
        writer = found.get("pica_version") or "an unknown version"
        raise AdapterFileError(
            f"{where!r} holds fields that this version does not know: {', '.join(map(repr, valued))}. It was written "
            f"by pica {writer}; upgrade pica, or remove the fields if they are not pica's."
        )
    if strange:  # a later PEFT writes fields of its own into every adapter's file
        names = ", ".join(map(repr, strange))
        logger.warning("%r holds fields that this version does not know; they are empty and ignored: %s.", where, names)
    return {name: value for name, value in found.items() if name in fields}


def _says_nothing(value: object) -> bool:
    return value is None or value is False or value == {} or value == []


def check_weights_file(
    folder: Path, *, saved_adapter: bool, modules: Collection[str] = (), token_rows: bool = False
) -> None:
    """Check that the weights beside a configuration are there and that their file is whole: every tensor lies within it.

    PEFT looks for the weights of further modules when the adapter is in the model already, and would leave it there.

    Args:
        folder: A local adapter folder.
        saved_adapter: Whether an adapter was saved there, not only a configuration.
        modules: The configuration's `modules_to_save`.
        token_rows: Whether it has `trainable_token_indices`.
    Raises:
        AdapterFileError: they are missing, also those of `modules`, or the file is damaged or cut short.
    """
    path = folder / WEIGHTS
    if not path.exists():
        torch_weights = (folder / _TORCH_WEIGHTS).exists()
        if torch_weights and os.environ.get(ALLOW_TORCH_WEIGHTS) != "1":
            raise AdapterFileError(
                f"{str(folder)!r} holds {_TORCH_WEIGHTS}, a pickled file, and no {WEIGHTS}; pica reads safetensors only. "
                f"Save the adapter again where it was made, or, if you trust its origin, set {ALLOW_TORCH_WEIGHTS}=1: PEFT "
                "then reads it with weights_only=True."
            )
        if saved_adapter and not torch_weights:
            raise AdapterFileError(f"{str(folder)!r} holds no {WEIGHTS}: the adapter is incomplete; copy it again.")
        return
    try:
        with safe_open(path, framework="pt") as file:  # maps the file: a size that it only claims takes no memory
            names = list(file.keys())
    except (OSError, SafetensorError, RuntimeError) as error:
        raise AdapterFileError(f"{str(path)!r} is damaged or cut short ({error}); copy the adapter again.") from error
    if not names:
        raise AdapterFileError(f"{str(path)!r} holds no tensors; copy the adapter again, or save it again.")
    further = [name for name in names if BANK_NAMES.isdisjoint(name.split("."))]
    absent = [m for m in modules if m not in _HEADS and not any(f"{m}." in name for name in further)]
    if token_rows and not any("trainable_tokens" in name for name in further):
        absent.append("trainable_token_indices")
    if saved_adapter and absent:
        raise AdapterFileError(
            f"{str(path)!r} holds no weights for {', '.join(map(repr, absent))}, which {CONFIG} names; the file is "
            "incomplete, or the configuration is another adapter's."
        )


def _names(value: object) -> bool:
    return isinstance(value, (list, tuple, set)) and all(isinstance(v, str) for v in value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wholes(value: object) -> bool:
    return isinstance(value, (list, tuple)) and all(map(_whole, value))


_TEXT_OR_NAMES = ("a name, a list of names or null", lambda v: v is None or isinstance(v, str) or _names(v))
_TEXT = ("text or null", lambda v: v is None or isinstance(v, (str, PathLike)))
_FLAG = ("true or false", lambda v: isinstance(v, bool))

_TYPES = {
    "target_modules": _TEXT_OR_NAMES,
    "exclude_modules": _TEXT_OR_NAMES,
    "layers_pattern": _TEXT_OR_NAMES,
    "modules_to_save": ("a list of names or null", lambda v: v is None or _names(v)),
    "layers_to_transform": (
        "a whole number, a list of them or null",
        lambda v: v is None or _whole(v) or _wholes(v),
    ),
    "trainable_token_indices": (
        "a list of whole numbers, a mapping from name to such a list, or null",
        lambda v: (
            v is None
            or _wholes(v)
            or (isinstance(v, Mapping) and all(isinstance(k, str) and _wholes(i) for k, i in v.items()))
        ),
    ),
    "rank_pattern": (
        "a mapping from name or regular expression to rank",
        lambda v: isinstance(v, Mapping) and all(isinstance(k, str) for k in v),
    ),
    "projection_seed": ("a whole number", _whole),
    "pattern_seed": ("a whole number", _whole),
    "off_diagonals": ("a whole number or null", lambda v: v is None or _whole(v)),
    "basis_format": ("a whole number or null", lambda v: v is None or _whole(v)),
    "save_basis": _FLAG,
    "init_weights": _FLAG,
    "inference_mode": _FLAG,
    "auto_mapping": ("a mapping or null", lambda v: v is None or isinstance(v, Mapping)),
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "pica_version": _TEXT,
    "peft_version": _TEXT,
}


def type_problems(config: object) -> list[str]:
    """What is wrong with the types of a configuration's values; they may come from a file that anybody wrote."""
    found = []
    for name, (wanted, fits) in _TYPES.items():
        if hasattr(config, name) and not fits(value := getattr(config, name)):
            found.append(f"{name}={value!r} must be {wanted}")
    return found


def pattern_problems(config: Any) -> list[str]:
    """Regular expressions of a configuration (of the right types) that are none."""
    patterns = [("rank_pattern", key) for key in getattr(config, "rank_pattern", None) or {}]
    for field in ("modules_to_save", "input_side"):
        patterns += [(field, name) for name in getattr(config, field, None) or ()]
    patterns += [(n, v) for n in ("target_modules", "exclude_modules") if isinstance(v := getattr(config, n), str)]
    blocks = getattr(config, "layers_pattern", None) or ()
    patterns += [("layers_pattern", pattern) for pattern in ([blocks] if isinstance(blocks, str) else blocks)]
    return [problem for name, pattern in patterns if (problem := problem_of_pattern(pattern, name)) is not None]
