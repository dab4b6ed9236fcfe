"""The methods that are timed: a model and a method's name in, the model with that method's adapter out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import pica
from benchmarks.models import TARGETS

CONFIGS: dict[str, Callable[[], Any]] = {
    **{f"PiCa r={r}": (lambda r=r: pica.PicaConfig(r=r, target_modules=TARGETS)) for r in (8, 32, 64, 128, 256)},
    **{f"LoRA r={r}": (lambda r=r: peft.LoraConfig(r=r, target_modules=TARGETS)) for r in (1, 8, 32)},
    **{f"DoRA r={r}": (lambda r=r: peft.LoraConfig(r=r, use_dora=True, target_modules=TARGETS)) for r in (1, 16)},
    "VeRA r=256": lambda: peft.VeraConfig(r=256, target_modules=TARGETS),
    "RandLoRA r=64": lambda: peft.RandLoraConfig(r=64, target_modules=TARGETS),
    "MiSS r=1": lambda: peft.MissConfig(r=1, target_modules=TARGETS),
    "PSOFT r=32": lambda: peft.PsoftConfig(r=32, target_modules=TARGETS),
}
FLOOR = "frozen base"
REFERENCE = "reference PiCa r="
FEWEST = ["PiCa r=32", "PiCa r=128", "reference PiCa r=128", "LoRA r=1", "LoRA r=8"]
ALL = [
    *(name for name in CONFIGS if name not in ("LoRA r=32", "DoRA r=16")),
    *(f"{REFERENCE}{r}" for r in (8, 32, 128, 256)),
]


class ReferenceLinear(nn.Module):
    """The formulation that the method is published with: h = x P^T on the input side, from a full SVD, out of place."""

    def __init__(self, base: nn.Linear, matrix: nn.Parameter, rank: int, solve: bool) -> None:
        super().__init__()
        self.base = base
        weight = base.weight.detach()
        if solve:
            rows = torch.linalg.svd(weight.float(), full_matrices=False)[2][:rank]
        else:  # its values do not change how long a step takes
            rows = torch.randn(rank, weight.shape[1], device=weight.device) / weight.shape[1] ** 0.5
        self.register_buffer("rows", rows.to(weight.dtype), persistent=False)
        self.matrix = matrix

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows
        assert isinstance(rows, Tensor)
        return self.base(x) + (x @ rows.T) @ self.matrix.to(x.dtype).T


def with_reference(model: PreTrainedModel, rank: int, *, solve: bool = False) -> PreTrainedModel:
    """`model` with the reference formulation on `TARGETS`: one float32 matrix (out, rank) for each role."""
    matrices: dict[str, nn.Parameter] = {}
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        role = path.rpartition(".")[2]
        if role in TARGETS and isinstance(module, nn.Linear):
            used = min(rank, *module.weight.shape)
            if role not in matrices:
                matrices[role] = nn.Parameter(torch.zeros(module.out_features, used, device=module.weight.device))
            model.set_submodule(path, ReferenceLinear(module, matrices[role], used, solve))
    return model


def adapt(model: PreTrainedModel, method: str, *, solve_reference: bool = False) -> nn.Module:
    """The model with one method's adapter, in training mode; `FLOOR` is the same model, frozen, with no adapter.

    Gradients flow down to the embeddings' output in every one of them, so that all go back through the same layers.
    """
    model.enable_input_require_grads()
    if method == FLOOR:
        return model.requires_grad_(False).train()
    if method.startswith(REFERENCE):
        return with_reference(model, int(method.removeprefix(REFERENCE)), solve=solve_reference).train()
    return peft.get_peft_model(model, CONFIGS[method]()).train()


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
