"""The accelerator of this machine, by every PyTorch that is declared."""

from __future__ import annotations

import torch


def accelerator() -> torch.device | None:
    """The accelerator if there is one: torch 2.6 raises where later ones answer that there is none."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
