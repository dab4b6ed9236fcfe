"""What a bug report needs to know about the machine."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from pica._versions import HOSTS, declared, fits, installed
from pica.experiments.measuring import machine, versions


def environment() -> dict[str, Any]:
    """Versions, devices, thread counts and cache folders with their sizes. Holds no host or user names but in paths."""
    threads = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ}
    return {
        "versions": versions(),
        "ranges": {name: {"declared": declared(name), "fits": fits(name, installed(name))} for name in HOSTS},
        "machine": vars(machine()),
        "torch": {
            "cuda": torch.version.cuda,
            "blas": "MKL" if torch.backends.mkl.is_available() else "other",
            "interop_threads": torch.get_num_interop_threads(),
            "matmul_tf32": torch.backends.cuda.matmul.allow_tf32,
            **threads,
        },
        "caches": {name: _describe(path) for name, path in _caches().items()},
    }


def _caches() -> dict[str, Path | None]:
    from huggingface_hub import constants

    from pica.basis.cache import cache_folder, shared_folder

    found = {"hub": Path(constants.HF_HUB_CACHE), "bases": cache_folder(), "bases from data": shared_folder()}
    if importlib.util.find_spec("datasets"):  # of the commands' packages, which may be absent
        from datasets import config as datasets_config

        found["datasets"] = Path(datasets_config.HF_DATASETS_CACHE)
    return found


def _describe(folder: Path | None) -> dict[str, Any]:
    """Path and size in bytes; no size for a folder that is not there, no path for a cache that is off."""
    if folder is None:
        return {"path": None, "bytes": None}
    if not folder.is_dir():
        return {"path": str(folder), "bytes": None}
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file() and not path.is_symlink():  # the hub's snapshots link to blobs: count those once
                total += path.stat().st_size
        except OSError:
            continue
    return {"path": str(folder), "bytes": total}
