"""Two processes on the CPU, talking over gloo, that do all the jobs of these tests in one go."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

import pica
from tests import processes
from tests.distributed import worker
from tests.distributed.jobs import all_jobs
from tests.experiments.tiny import write_tiny_llama

Results = dict[str, list[Any]]


def environment(**more: str) -> dict[str, str]:
    """Of a process that runs this package's code, one thread each."""
    source = str(Path(pica.__file__).parents[1])
    path = os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def run_jobs(jobs: dict[str, tuple[str, dict[str, Any]]], folder: Path) -> Results:
    """Results of {name: (job, arguments)} by name, one of each process."""
    file = folder / "jobs.json"
    file.write_text(json.dumps([{"name": n, "job": job, "arguments": args} for n, (job, args) in jobs.items()]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    told |= {"PICA_CACHE_DIR": str(folder / "cache")}
    said = [folder / f"said.{rank}" for rank in (0, 1)]
    both = [
        processes.start(worker.work, str(file), said=said[rank], RANK=str(rank), LOCAL_RANK=str(rank), **told)
        for rank in (0, 1)
    ]
    deadline = time.monotonic() + 500
    while all(process.is_alive() for process in both) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in both:
        process.join(60 if process.exitcode is None else 0)  # without the other, it would wait for ever
        process.kill()
        process.join()
    assert [process.exitcode for process in both] == [0, 0], "".join(text.read_text()[-3000:] for text in said)
    found = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in (0, 1)]
    return {name: [results[name] for results in found] for name in jobs}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the jobs write."""
    return tmp_path_factory.mktemp("two-processes")


@pytest.fixture(scope="session")
def results(folder: Path) -> Results:
    """What each of two processes found in each of `all_jobs`."""
    worker.tiny_model().save_pretrained(folder / "base")
    worker.tiny_mixture().save_pretrained(folder / "mixture")
    write_tiny_llama(folder / "model")
    worker.write_basis(folder / "basis")
    return run_jobs(all_jobs(folder), folder)
