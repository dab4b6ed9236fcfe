"""Keep a block of linear algebra at the precision of its dtype: no autocast, no TF32, no bfloat16 products."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Generator[None]:
    """Run matrix products on `device` in the dtype of their operands.

    Users switch TF32 (CUDA) or bfloat16 (CPU) products on for speed, globally or through autocast. A basis that was
    solved with three significant digits would be another basis, so both are off inside this block and are put back
    after it. Gradients are off too. Nothing here is thread-local: other threads see the setting while it lasts.
    """
    # torch >= 2.9 has one switch a backend; the older global one raises when both styles are mixed.
    matmuls = [getattr(getattr(torch.backends, name), "matmul", None) for name in ("cuda", "mkldnn")]
    switches = [m for m in matmuls if m is not None and hasattr(m, "fp32_precision")]
    before = [m.fp32_precision for m in switches]
    fallback = None if switches else torch.get_float32_matmul_precision()
    autocast_device = device.type if torch.amp.is_autocast_available(device.type) else "cpu"
    with torch.no_grad(), torch.autocast(autocast_device, enabled=False):
        try:
            for m in switches:
                m.fp32_precision = "ieee"
            if fallback is not None:
                torch.set_float32_matmul_precision("highest")
            yield
        finally:
            for m, value in zip(switches, before):
                m.fp32_precision = value
            if fallback is not None:
                torch.set_float32_matmul_precision(fallback)
