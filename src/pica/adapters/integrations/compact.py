"""A LoRA folder in which tensors that are alike are stored once: what an exported PiCa adapter mostly consists of.

B of an exact export is the shared matrix, written out in each layer of its group, and A is the frozen basis, the same for
all adapters of a base model. A compact folder has each distinct B once, and its A in a file beside all of them that is named
by its content.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pica.errors import ExportError
from pica.files.folders import atomic_file, flush_all
from pica.tuners.base.config_file import WEIGHTS

SHARED = "shared.safetensors"
BASES = ".bases"


def compact(folder: Path, bases: Path) -> None:
    """Replace the tensors' file of an exported folder by `SHARED`; its A goes to a file in `bases`, once.

    Raises:
        ExportError: there is nothing to share in it: it was truncated, or each of its layers has a matrix of its own.
    """
    tensors = load_file(folder / WEIGHTS)
    first = {name: value for name, value in tensors.items() if ".lora_A." in name}
    rest = {name: value for name, value in tensors.items() if name not in first}
    keys = {name: _digest(value) for name, value in rest.items()}
    distinct = {key: rest[name] for name, key in keys.items()}
    if 2 * len(distinct) > len(rest) and len(rest) > 8:
        raise ExportError(
            f"its {len(rest)} layers have {len(distinct)} different matrices, so there is little to share; start the "
            "server without PICA_VLLM_NATIVE."
        )
    name = hashlib.sha256("".join(f"{k}:{_digest(first[k])}" for k in sorted(first)).encode()).hexdigest()[:32]
    basis = bases / f"{name}.safetensors"
    if not basis.is_file():
        with atomic_file(basis) as partial:  # another server may be writing it for another adapter
            save_file(first, partial)
    save_file(distinct, folder / SHARED, metadata={"names": json.dumps(keys), "basis": name})
    (folder / WEIGHTS).unlink()
    flush_all(folder)


def _digest(tensor: Tensor) -> str:
    raw = tensor.contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + raw.tobytes()).hexdigest()[:32]


class CompactReader:
    """Reads compact folders; each basis is held once, in one precision, for as long as this object lives."""

    def __init__(self) -> None:
        self._bases: dict[tuple[Path, torch.dtype], dict[str, Tensor]] = {}

    def read(self, folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every tensor of the LoRA by its name; those that are alike are one tensor."""
        with safe_open(folder / SHARED, framework="pt") as file:
            about = file.metadata()
            distinct = {key: file.get_tensor(key).to(dtype).clone() for key in file.keys()}  # noqa: SIM118 - no mapping
        path = folder.parent / BASES / f"{about['basis']}.safetensors"
        if (path, dtype) not in self._bases:
            self._bases[path, dtype] = {name: value.to(dtype) for name, value in load_file(path).items()}
        return {**self._bases[path, dtype], **{name: distinct[key] for name, key in json.loads(about["names"]).items()}}
