"""What distributed training asks of matrices that many layers share."""

from __future__ import annotations

import torch
from torch import nn

from pica.errors import TrainingError
from pica.tuners.base.bank import get_bank
from pica.tuners.base.protocols import Tuner


def check_gradient_reduction(tuner: Tuner) -> None:
    """Refuse the one way of training in which a gradient would be averaged between the processes in parts.

    Reentrant checkpointing runs one backward pass for each block, and each of them adds to the gradient of a shared
    matrix. DDP sends a gradient off at the first of these, says nothing, and the processes drift apart (with
    `find_unused_parameters` it stops with an error instead). `static_graph` counts them and is right. DeepSpeed's ZeRO
    fails in an assertion.

    Raises:
        TrainingError: The present forward pass is such a one.
    """
    if torch.compiler.is_compiling() or not torch.distributed.is_available() or not torch.is_grad_enabled():
        return
    parallel = nn.parallel.DistributedDataParallel._get_active_ddp_module()
    by_ddp = parallel is not None and not parallel.static_graph
    if not (by_ddp or _by_zero(tuner)) or not _shares(tuner) or not _checkpoints_reentrantly(tuner.model):
        return
    if not by_ddp:
        raise TrainingError(
            "Reentrant gradient checkpointing under DeepSpeed's ZeRO does not work for matrices that several layers share; "
            "set gradient_checkpointing_kwargs={'use_reentrant': False}, or train with FSDP2, where both work (some "
            "versions of TRL make it reentrant under ZeRO-3, whatever is set)."
        )
    raise TrainingError(
        "Reentrant gradient checkpointing under DistributedDataParallel gives wrong gradients for matrices that several "
        "layers share; set gradient_checkpointing_kwargs={'use_reentrant': False} (or ddp_static_graph=True, which does "
        "not go with gradient accumulation)."
    )


def _by_zero(tuner: Tuner) -> bool:
    """Whether DeepSpeed has taken the matrices over: stages 1 and 2 leave one mark on a parameter, stage 3 another."""
    bank = get_bank(tuner.model, tuner.bank_name)
    matrix = None if bank is None else next(bank.parameters(), None)
    return hasattr(matrix, "_hp_mapping") or hasattr(matrix, "ds_id")


def _shares(tuner: Tuner) -> bool:
    bank = get_bank(tuner.model, tuner.bank_name)
    if bank is None:
        return False
    return any(
        len(bank.matrices(name).layers) > len(bank.matrices(name)) for name in tuner.active_adapters if name in bank
    )


def _checkpoints_reentrantly(model: nn.Module) -> bool:
    """Whether transformers was told to; how it calls the checkpointing function stands in each block."""
    for module in model.modules():
        call = getattr(module, "_gradient_checkpointing_func", None)
        if call is not None and getattr(module, "gradient_checkpointing", False):
            return bool(getattr(call, "keywords", {}).get("use_reentrant", False))
    return False
