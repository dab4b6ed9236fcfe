"""Memory, machine and versions: what a number needs beside it to mean something."""

import contextlib
import os
import platform
import resource
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

from pica.experiments.results.run import Machine

PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors", "numpy", "pica-peft")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if "pica-peft" not in found:
        from pica._version import __version__

        found["pica-peft"] = __version__
    return found


def machine() -> Machine:
    """Cores this process may use, threads torch uses, and accelerators."""
    affinity = getattr(os, "sched_getaffinity", None)
    return Machine(
        system=platform.platform(),
        cores=len(affinity(0)) if affinity else os.cpu_count(),
        threads=torch.get_num_threads(),
        accelerators=[torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    )


class PeakMemory:
    """Highest memory use since the object was made.

    On a GPU that of torch's allocator; on a CPU the process's resident memory, which Linux lets us restart. Elsewhere
    it is the highest since the process began.
    """

    def __init__(self) -> None:
        self._before: dict[str, float] = {}
        self._restart()

    def read(self) -> dict[str, float]:
        """Peaks in MiB: "host", and "gpu" where there is one."""
        peaks = {"host": _host_peak() / 2**20}
        if torch.cuda.is_available():
            peaks["gpu"] = torch.cuda.max_memory_allocated() / 2**20
        return {name: max(round(value, 1), self._before.get(name, 0.0)) for name, value in peaks.items()}

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose memory is not counted, where the system lets us restart the count."""
        self._before = self.read()
        try:
            yield
        finally:
            self._restart()

    def _restart(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(OSError):  # not Linux, or not allowed: the peak is then the whole process's
            Path("/proc/self/clear_refs").write_text("5")


def _host_peak() -> float:
    """Bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) if sys.platform == "darwin" else float(peak) * 1024
