"""What an adapter takes, to the byte: its matrices, its file, its bases in memory and in the cache."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from pica.basis.cache import SMALLEST_ELEMENTS
from pica.basis.fingerprint import choose_mode, encoded_size
from pica.experiments.results.plan import GroupRow
from pica.tuners.base.bank import PICA_BANK, SharedMatrices, get_bank
from pica.tuners.pica.layer import PicaLinear

ADAPTER = "default"


def adapted_layers(model: nn.Module) -> list[PicaLinear]:
    return [module for module in model.modules() if isinstance(module, PicaLinear)]


def group_rows(model: PeftModel, layers: Sequence[PicaLinear]) -> list[GroupRow]:
    rows = []
    for key, matrix in matrices_of(model).items():
        members = [layer for layer in layers if layer.group_of[ADAPTER] == key]
        rows.append(
            GroupRow(
                name=key,
                layers=len(members),
                in_features=sorted({layer.in_features for layer in members}),
                out_features=matrix.shape[0],
                rank=matrix.shape[1],
                parameters=matrix.numel(),
                basis_bytes=sum(_projector(layer).nbytes for layer in members),
            )
        )
    return rows


def matrices_of(model: PeftModel) -> SharedMatrices:
    bank = get_bank(cast(nn.Module, model.base_model.model))
    assert bank is not None
    return bank.matrices(ADAPTER)


def file_bytes(shapes: Mapping[str, tuple[int, int]], ranks: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
    """Tell how large adapter_model.safetensors will be.

    Args:
        shapes: Of each group's M, by the group's name.
        ranks: Of each layer.
        dtype: Of M.
    Returns:
        Bytes of its header, the matrices and the fingerprint of their bases.
    """
    elements = sum(rows * columns for rows, columns in shapes.values())
    fingerprint = encoded_size(ranks, *choose_mode(ranks, elements))
    entries = [(key, dtype, list(shape), dtype.itemsize * shape[0] * shape[1]) for key, shape in sorted(shapes.items())]
    entries.append(("fingerprint", torch.uint8, [fingerprint], fingerprint))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, kind, shape, size in entries:
        name = {torch.float32: "F32", torch.float64: "F64", torch.uint8: "U8"}[kind]
        offsets = [end, end := end + size]
        header[f"base_model.model.{PICA_BANK}.{key}"] = {"dtype": name, "shape": shape, "data_offsets": offsets}
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-text // 8) * 8 + end


def cache_bytes(layers: Sequence[PicaLinear], dtype: torch.dtype) -> int:
    """Projectors and gains, in float32 or better, of the weights that are large enough to be kept."""
    size = torch.promote_types(dtype, torch.float32).itemsize
    kept = [layer for layer in layers if layer.in_features * layer.out_features >= SMALLEST_ELEMENTS]
    return sum(size * layer.method.rank_of[ADAPTER] * (_projector(layer).shape[1] + 1) for layer in kept)


def _projector(layer: PicaLinear) -> torch.Tensor:
    found = layer.bases.rows(layer.bases.key_of[ADAPTER])
    assert found is not None
    return found
