"""A run in several processes: all of them train, the first one measures and writes, and tells the others what came of it.

Launchers (`accelerate launch`, `torchrun`) start the same command several times and set `WORLD_SIZE`; the rest is
Accelerate's and the trainer's work. Outside of a launcher everything here does nothing.
"""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

from pica.basis import process_count, process_index, wire_device

# The others wait for as long as the first one measures, which can be hours.
_PATIENCE = timedelta(days=7)


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def join() -> None:
    """Join the other processes, if a launcher has started any, with patience for long measurements in the first one."""
    if launched():
        from accelerate import PartialState

        from pica.experiments.models import device

        PartialState(cpu=device().type == "cpu", timeout=_PATIENCE)


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
