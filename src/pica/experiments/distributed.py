"""A run in several processes: all of them train, the first one measures and writes, and tells the others what came of it.

Launchers (`accelerate launch`, `torchrun`) start the same command several times and set `WORLD_SIZE`; the rest is
Accelerate's and the trainer's work. Outside of a launcher everything here does nothing.
"""

import json
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib.util import find_spec
from typing import Any

import torch

from pica.basis import process_count, process_index, wire_device
from pica.errors import LaunchError

# The others wait for as long as the first one measures, which can be hours.
_PATIENCE = timedelta(days=7)


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def join() -> None:
    """Join the other processes, if a launcher has started any, with patience for long measurements in the first one.

    Raises:
        LaunchError: Training as the launcher asks for would fail at its end, or be another kind than it says.
    """
    if _told("ACCELERATE_USE_DEEPSPEED"):
        _check_deepspeed()
    if launched():
        from accelerate import DistributedType, PartialState

        from pica.experiments.models import device

        state = PartialState(cpu=device().type == "cpu", timeout=_PATIENCE)
        # It would be DDP, without a word, and with cpu_ram_efficient_loading most processes would have no weights.
        if _told("ACCELERATE_USE_FSDP") and state.distributed_type == DistributedType.MULTI_CPU:
            raise LaunchError(
                "FSDP needs accelerators (GPUs): Accelerate does not shard on a CPU. Launch with docs/accelerate/ddp.yaml, "
                "or without FSDP."
            )


def kind() -> dict[str, Any]:
    """How many processes train, and what splits the model between them."""
    if _told("ACCELERATE_USE_DEEPSPEED"):
        found = f"ZeRO-{_deepspeed_settings().get('stage', 0)}"
    elif _told("ACCELERATE_USE_FSDP"):
        found = f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
    else:
        found = "DDP" if process_count() > 1 else None
    return {"processes": process_count(), "kind": found}


def check_same_kind(before: Mapping[str, Any]) -> None:
    """Refuse to go on with a checkpoint in another way than it was written in.

    Raises:
        LaunchError: `before`, what `kind` gave then, is not what it gives now.
    """
    if before != (now := kind()):
        raise LaunchError(
            f"The interrupted training ran in {_shown(before)}, and its checkpoint is of no use to another kind; this is "
            f"{_shown(now)}. Launch it as it was, or begin anew with --overwrite."
        )


def load_whole() -> None:
    """Let transformers load models whole again after a training under ZeRO-3.

    As long as the trainer's settings live, it loads every model in parts, for which all processes have to take part.
    """
    if _told("ACCELERATE_USE_DEEPSPEED"):
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def _shown(kind: Mapping[str, Any]) -> str:
    count = kind["processes"]
    return f"{count} process{'' if count == 1 else 'es'}" + (f" ({kind['kind']})" if kind["kind"] else "")


def _told(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")


def _check_deepspeed() -> None:
    if find_spec("deepspeed") is None:
        raise LaunchError("The launcher asks for DeepSpeed, which is not installed: pip install deepspeed.")
    settings = _deepspeed_settings()
    if settings.get("stage") == 3 and not settings.get("stage3_gather_16bit_weights_on_model_save"):
        raise LaunchError(
            "DeepSpeed ZeRO-3 would not hand the trained matrices out: set stage3_gather_16bit_weights_on_model_save to "
            "true in its JSON file (zero3_save_16bit_model in a file of Accelerate), as docs/accelerate/zero3.json does."
        )


def _deepspeed_settings() -> dict[str, Any]:
    """What the launcher says of ZeRO."""
    from accelerate.utils import DeepSpeedPlugin

    return DeepSpeedPlugin().deepspeed_config["zero_optimization"]


def leads() -> bool:
    """Whether this is the process that measures and writes."""
    return process_index() == 0


def wait() -> None:
    """Return when all processes have come here."""
    if process_count() > 1:
        torch.distributed.barrier()


def in_any(here: bool) -> bool:
    """Whether something is so in any process. All must ask."""
    if process_count() == 1:
        return here
    found = torch.tensor([int(here)], device=wire_device())
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return bool(found.item())


def after_first(make: Callable[[], Any]) -> Any:
    """What `make` gives in each process, in the others once the first one has made its own."""
    if not leads():
        wait()
        return make()
    made = make()
    wait()
    return made


def in_first(make: Callable[[], Any]) -> Any:
    """What `make` gives in the first process, as JSON holds it; the others wait and get the same."""
    if process_count() == 1:
        return make()
    wire = wire_device()
    content = json.dumps(make()).encode() if leads() else b""
    size = torch.tensor([len(content)], device=wire)
    torch.distributed.broadcast(size, src=0)
    sent = torch.empty(int(size.item()), dtype=torch.uint8, device=wire)
    if leads():
        sent.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    torch.distributed.broadcast(sent, src=0)
    return json.loads(sent.cpu().numpy().tobytes())
