"""Adapters saved by the authors' reference implementation of PiCa, read into a PEFT model.

Its folder holds `pica_config.json` (target_modules: keywords, rank, base_model_name_or_path) and `pica_adapter.bin`: a
dictionary from keyword to M (out, r). A linear layer is adapted by the first keyword that is a substring of its path,
and all layers of a keyword share its M. The basis is not stored: it was the first r rows of V^T from a full SVD of each
weight in float32, with whatever signs that routine gave on that device. One M serves many layers, each with signs of
its own, so M cannot be converted to another sign rule: the imported adapter keeps the SVD's signs and stores its basis.
"""

from __future__ import annotations

import logging
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from pica.adapters.export.names import base_modules, plain_names
from pica.basis import Basis, full_precision
from pica.errors import AdapterFileError, BasisError, ConfigError
from pica.files.documents import DocumentError, read_json
from pica.text import first_line
from pica.tuners.base.bank import get_bank
from pica.tuners.base.basis_store import Projector
from pica.tuners.base.verification import take_fingerprint
from pica.tuners.pica.config import PicaConfig
from pica.tuners.pica.layer import PicaLinear

logger = logging.getLogger(__name__)

WEIGHTS, CONFIG = "pica_adapter.bin", "pica_config.json"

SIGNS_NOTE = (
    "The folder does not store the basis that it was trained with, so it was rebuilt by torch.linalg.svd on {device}. The "
    "signs of its directions depend on the device and library of that training: if the imported adapter does worse than "
    "it did there, import again with svd_device (--svd-device) set to the kind of device that trained it, and evaluate it."
)


@dataclass(frozen=True)
class ReferenceAdapter:
    """Contents of a folder.

    Attributes:
        matrices: {keyword: M (out, rank)} in the order in which keywords are tried, float32 or finer.
        rank: Columns of every matrix.
        keywords: All keywords of the configuration, in order.
        base_model: Name of the base model; None where it was not recorded.
    """

    matrices: dict[str, Tensor]
    rank: int
    keywords: tuple[str, ...]
    base_model: str | None


def import_reference(
    base_model: nn.Module, folder: str | Path, *, svd_device: torch.device | str | None = None
) -> PeftModel:
    """Read an adapter of the reference implementation.

    The basis is rebuilt by a full SVD of each adapted weight and kept with the adapter (`save_basis`), since another
    solver would give other signs. A warning in the log says that these depend on the training's device.

    Args:
        base_model: The model that the adapter was trained on; it is wrapped, as by `get_peft_model`.
        folder: The reference's folder.
        svd_device: Where to compute the decompositions: "cpu" or "cuda". The kind of device that trained the adapter
            gives its signs; by default the device of each weight.
    Returns:
        The adapter on `base_model`, ready to use, to train on, or to save in PEFT's format.
    Raises:
        AdapterFileError: A file is missing, unreadable, or does not fit the base model.
        ConfigError: `svd_device` does not exist here.
        BasisError: A weight cannot be decomposed.
    """
    saved = read_reference(Path(folder))
    device = _usable_device(svd_device)
    matched = _match_layers(base_model, saved)
    targets = plain_names(list(matched), base_modules(base_model))
    config = PicaConfig(
        r=saved.rank,
        target_modules=targets,
        share={f".*{re.escape(k)}.*": k for k in saved.keywords if k in matched.values()},  # the first match wins
        save_basis=True,
        task_type=_task_of(base_model),
    )
    # Decompose before the model is touched, so that an error leaves it as it was.
    bases = {path: reference_basis(_weight(base_model, path), saved.rank, device, path) for path in matched}
    model = get_peft_model(base_model, config)
    assert isinstance(model, PeftModel)  # mixed models are not asked for
    for path, keyword in matched.items():
        layer = model.get_base_model().get_submodule(path)
        assert isinstance(layer, PicaLinear)
        layer.method.use("default", Projector.of(bases[path]))
        layer.bases.drop_unused()
        with torch.no_grad():
            layer.matrix("default").copy_(saved.matrices[keyword])
    _take_fingerprint(model.get_base_model())
    model.eval()
    here = config.base_model_name_or_path  # PEFT takes it from the model
    if saved.base_model and here and here != saved.base_model:
        logger.warning(
            "The adapter was trained on %s and is imported on %s; they must be the same.", saved.base_model, here
        )
    config.base_model_name_or_path = here or saved.base_model
    logger.warning(SIGNS_NOTE.format(device=device or "each weight's own device"))
    return model


def read_reference(folder: Path) -> ReferenceAdapter:
    """Read and check the two files. The tensors' file is a pickle, of which only tensors and plain containers are let in.

    Args:
        folder: The reference's.
    Returns:
        What is in them.
    Raises:
        AdapterFileError: A file is missing, unreadable or of another format.
    """
    folder = folder.expanduser()
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            there = f"holds no {name}" if folder.is_dir() else "does not exist"
            raise AdapterFileError(f"Reference adapter folder {str(folder)!r} {there}.")
    config = _read_config(folder / CONFIG)
    keywords, rank = config.get("target_modules"), config.get("rank")
    keywords = [keywords] if isinstance(keywords, str) else keywords
    if not isinstance(keywords, list) or not keywords or not all(isinstance(k, str) and k for k in keywords):
        raise AdapterFileError(f"{folder / CONFIG}: target_modules={keywords!r} must be a list of names.")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterFileError(f"{folder / CONFIG}: rank={rank!r} must be a whole number of at least 1.")
    matrices = _read_matrices(folder / WEIGHTS, rank)
    if unknown := sorted(set(matrices) - set(keywords)):
        raise AdapterFileError(
            f"{folder / WEIGHTS} holds matrices for {', '.join(unknown)}, which target_modules of {CONFIG} does not name."
        )
    base = config.get("base_model_name_or_path")
    ordered = {k: matrices[k] for k in dict.fromkeys(keywords) if k in matrices}
    return ReferenceAdapter(ordered, rank, tuple(dict.fromkeys(keywords)), base if isinstance(base, str) else None)


def reference_basis(weight: Tensor, rank: int, device: torch.device | None, name: str) -> Basis:
    """Solve a basis as the reference does, by a full float32 SVD, signs as they come.

    Args:
        weight: (out, in).
        rank: Number of directions.
        device: Where to solve; None: where the weight is.
        name: The layer, for messages.
    Returns:
        The first `rank` right singular directions, on side "in", on the weight's device.
    Raises:
        BasisError: The decomposition fails, for instance because the weight is not finite.
    """
    with full_precision(device or weight.device):
        try:
            _, values, right = torch.linalg.svd(
                weight.detach().to(device=device, dtype=torch.float32), full_matrices=False
            )
        except RuntimeError as error:  # LinAlgError and OutOfMemoryError are RuntimeErrors
            raise BasisError(
                f"{name}: its singular value decomposition failed ({first_line(error)}); "
                "check the base model, or try svd_device='cpu' (--svd-device cpu)."
            ) from error
    rows = right[:rank].to(weight.device).contiguous()
    return Basis(rows, "in", values[:rank].to(weight.device), "principal", "svd")


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = read_json(file)
    except (OSError, DocumentError) as error:
        raise AdapterFileError(f"{file} is not readable JSON: {error}.") from error
    if not isinstance(config, dict):
        raise AdapterFileError(f"{file} must hold a JSON object, not a {type(config).__name__}.")
    return config


def _read_matrices(file: Path, rank: int) -> dict[str, Tensor]:
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise AdapterFileError(
            f"{file} is not a file of tensors that torch.load(weights_only=True) accepts ({first_line(error)})."
        ) from error
    if not isinstance(saved, dict) or not saved:
        raise AdapterFileError(f"{file} must hold a dictionary from keyword to matrix, not {type(saved).__name__}.")
    for keyword, matrix in saved.items():
        if not isinstance(keyword, str) or not isinstance(matrix, Tensor) or not matrix.is_floating_point():
            raise AdapterFileError(f"{file}: entry {keyword!r} is no matrix of a keyword (a {type(matrix).__name__}).")
        if matrix.ndim != 2 or matrix.shape[1] != rank:
            raise AdapterFileError(
                f"{file}: the matrix of {keyword!r} has shape {tuple(matrix.shape)} where (out, {rank}) is expected."
            )
        if not torch.isfinite(matrix).all():
            raise AdapterFileError(f"{file}: the matrix of {keyword!r} holds NaN or infinity.")
    return {k: m.detach().to(torch.promote_types(m.dtype, torch.float32)) for k, m in saved.items()}


def _match_layers(base_model: nn.Module, saved: ReferenceAdapter) -> dict[str, str]:
    """Find the layers that the reference adapts.

    Returns:
        {path: keyword}.
    Raises:
        AdapterFileError: There are none, or a layer has no matrix, or one that does not fit it.
    """
    matched: dict[str, str] = {}
    for path, module in base_model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        keyword = next((k for k in saved.keywords if k in path), None)
        if keyword is None:
            continue
        shape = (module.out_features, module.in_features)
        if keyword not in saved.matrices:
            raise AdapterFileError(
                f"{WEIGHTS} holds no matrix for {keyword!r}, although {CONFIG} names it and {path} needs it."
            )
        if saved.matrices[keyword].shape[0] != shape[0] or saved.rank > min(shape):
            raise AdapterFileError(
                f"{path}: the weight {shape} does not fit the matrix of {keyword!r}, "
                f"{tuple(saved.matrices[keyword].shape)}. Check that this is the base model of the training."
            )
        matched[path] = keyword
    if not matched:
        raise AdapterFileError(
            f"The base model has no linear layer whose path contains {' or '.join(map(repr, saved.keywords))}; "
            "check that this is the base model of the training."
        )
    if unused := sorted(set(saved.matrices) - set(matched.values())):
        logger.warning("No layer of the base model uses the matrix of %s; it is left out.", ", ".join(unused))
    return matched


def _take_fingerprint(root: nn.Module) -> None:
    """Record the basis that is installed now; the one recorded so far is of the basis that the model solved itself."""
    bank = get_bank(root)
    assert bank is not None
    slot = bank.matrices("default")
    fingerprint = take_fingerprint(slot, "default")
    assert fingerprint is not None  # the weights were there for the decomposition
    slot.solved(fingerprint)


def _usable_device(device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        raise ConfigError(f"svd_device={str(device)!r} cannot be used here ({first_line(error)}).") from error
    return found


def _weight(model: nn.Module, path: str) -> Tensor:
    layer = model.get_submodule(path)
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach()


def _task_of(model: nn.Module) -> str | None:
    """PEFT's task type, from the class name of a transformers model."""
    name = type(model).__name__
    tasks = {"ForCausalLM": "CAUSAL_LM", "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    return next((task for ending, task in tasks.items() if name.endswith(ending)), None)
