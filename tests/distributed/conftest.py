"""Two processes on the CPU, talking over gloo, that do all the jobs of a test module in one go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pica

WORKER = Path(__file__).with_name("worker.py")
Results = dict[str, list[Any]]


def environment(**more: str) -> dict[str, str]:
    """Of a process that runs this package's code, one thread each."""
    source = str(Path(pica.__file__).parents[1])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def run_jobs(jobs: dict[str, tuple[str, dict[str, Any]]], folder: Path, **variables: str) -> Results:
    """Results of {name: (job, arguments)} by name, one of each process. Torch finds a free port by itself."""
    file = folder / "jobs.json"
    file.write_text(json.dumps([{"name": n, "job": job, "arguments": args} for n, (job, args) in jobs.items()]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, str(WORKER), str(file)],
        env=environment(PICA_CACHE_DIR=str(folder / "cache"), **variables),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    both = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in (0, 1)]
    return {name: [results[name] for results in both] for name in jobs}


@pytest.fixture(scope="session")
def two_processes() -> Callable[..., Results]:
    """See `run_jobs`."""
    return run_jobs
