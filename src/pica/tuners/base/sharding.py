"""Base weights that a framework has split between processes: gathered whole, one layer at a time, or refused.

Whatever is gathered is gathered by all processes together, so all have to add, load and save adapters alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pica.basis import Holdings, process_count, wire_device
from pica.errors import BasisError, TargetError

SAMPLED_LAYERS, SAMPLED_VALUES = 64, 32


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is one that torch has split over a mesh of devices."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def in_parts(weight: Tensor) -> bool:
    """Whether this process holds a part of `weight`, and all processes together can make it whole."""
    return is_dtensor(weight) or (hasattr(weight, "ds_id") and weight.numel() != getattr(weight, "ds_numel", -1))


def whole(tensor: Tensor, numel: int, name: str) -> Tensor:
    """Give all of a tensor that may be in parts.

    Args:
        tensor: A parameter of the base model, or what stands for it.
        numel: How many numbers the whole has.
        name: The layer, for messages.
    Returns:
        `tensor` itself where this process has all of it, else a gathered copy.
    Raises:
        BasisError: Only a part is here, and there is no way to gather the rest.
    """
    if is_dtensor(tensor):
        return tensor.full_tensor().detach()  # pyright: ignore[reportAttributeAccessIssue]
    if in_parts(tensor):
        try:
            import deepspeed  # pyright: ignore[reportMissingImports] - where there are such weights, there is DeepSpeed
        except ImportError as error:
            raise BasisError(
                f"{name}: its weight is partitioned by DeepSpeed, which cannot be imported here to gather it."
            ) from error
        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    if tensor.numel() != numel:
        raise BasisError(
            f"{name}: this process holds {tensor.numel()} of its weight's {numel} numbers, so something has sharded the "
            "model (FSDP 1, tensor parallelism). Add or load adapters before the model is sharded."
        )
    return tensor.detach()


def check_placement(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights whose processes would not compute what one process does, or would not train alike.

    Args:
        model: The base model's root.
        weights: Raw weight of each target layer, by path.
    Raises:
        TargetError: A weight is split by tensor, pipeline or expert parallelism, or by `fully_shard` before the adapter
            was added.
    """
    split = next((path for path, weight in weights.items() if is_dtensor(weight)), None)
    if split is None:
        return
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    other = [k for k in ("tp_size", "pp_size", "ep_size") if (getattr(config, k, None) or 1) > 1]
    from torch.distributed.fsdp import FSDPModule

    if other or not any(isinstance(module, FSDPModule) for module in model.modules()):
        by = f"tp_plan, {other[0] if other else 'DTensor'}"
        raise TargetError(
            f"{split}: its weight is split between processes by tensor parallelism ({by}), which this method does not "
            "support. Load the model without it; to train on several devices use FSDP or DeepSpeed ZeRO, to serve export "
            "a LoRA adapter (pica export)."
        )
    if not getattr(model, "is_distributed_loading_by_transformers", False):
        raise TargetError(
            f"{split}: the model was sharded by fully_shard before this adapter was added, and nothing would keep the "
            "adapter's shared matrices alike in all processes. Add the adapter first, then shard the model (Trainer and "
            "Accelerate do it in this order)."
        )


def loads_in_one_process() -> bool:
    """Whether FSDP's `cpu_ram_efficient_loading` is on: from_pretrained then fills the first process of a machine only."""
    try:
        from transformers.integrations import is_fsdp_enabled
    except ImportError:  # moved in another version
        return False
    return process_count() > 1 and bool(is_fsdp_enabled())


def placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole `value` as it has to be to be copied into `parameter`: of a split one, this process's part."""
    if not is_dtensor(parameter) or is_dtensor(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = parameter.device_mesh, parameter.placements  # pyright: ignore[reportAttributeAccessIssue]
    return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)  # all have the file


def from_first_process(tensor: Tensor) -> Tensor:
    """The first process's `tensor`, in all processes; they must call it together, with the same shape and dtype."""
    wire = tensor.to(wire_device(), copy=True)
    torch.distributed.broadcast(wire, src=0)
    return wire.to(tensor.device)


def describe(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> Holdings:
    """What `solve_many` wants to know of these raw weights, by path; `shapes` (out, in) are those of the whole."""
    alone = loads_in_one_process()
    parts = any(in_parts(weight) for weight in weights.values())
    sample = b""
    if not alone and not parts:  # else there is nothing to compare
        every = max(1, len(weights) // SAMPLED_LAYERS)
        sample = b"".join(_sample(weight) for weight in list(weights.values())[::every])
    here = not any(weight.is_meta for weight in weights.values())
    return Holdings([shapes[path] for path in weights], sample, parts, here)


def _sample(weight: Any) -> bytes:
    """A few of the numbers of a plain tensor; nothing of a quantised one that is a class of its own."""
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_contiguous() or not weight.numel():
        return b""
    flat = weight.detach().view(-1)
    return flat[:: max(1, len(flat) // SAMPLED_VALUES)].contiguous().view(torch.uint8).cpu().numpy().tobytes()
