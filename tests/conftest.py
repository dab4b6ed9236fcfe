"""Shared fixtures: tiny models made from real architectures' configs, seeded without touching the global generator."""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
import warnings

# The models here are tiny: a second thread only waits for the first, and pytest-xdist uses the other cores.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PICA_CACHE_DIR"] = ""  # no test depends on what an earlier one left; the cache's own switch it on

import signal  # noqa: E402

# A suite that was started in the background inherits an ignored SIGINT, and tests that interrupt would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Callable, Iterator  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

import pytest  # noqa: E402

# Not torch and transformers: pytest-xdist's workers only start once this file is read, by a process that runs no test.
if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give tests to workers one by one, but those of two processes to one: another would have their jobs done again."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "distributed" if nodeid.startswith("tests/distributed/") else nodeid

    return Scheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def _registered() -> None:
    """PEFT knows the method, whatever a test imports."""
    import pica  # noqa: F401


_seen_modules = 0


@pytest.fixture(autouse=True)
def _libraries_are_no_garbage() -> None:
    """A trainer collects garbage, and each time Python would look at all that imports have left: a third of a second.

    What is there once many modules have come is set aside. Tests that let go of a model still see it collected.
    """
    global _seen_modules
    if len(sys.modules) > _seen_modules + 50:
        _seen_modules = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _the_same_numbers_in_any_order() -> None:
    """A test that draws random numbers draws the same ones alone, in another order and on another worker."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """The command line keeps the package's log to itself, which a later test of what is logged would not see."""
    package, warned = logging.getLogger("pica"), warnings.showwarning
    before = package.handlers, package.propagate, package.level
    yield
    package.handlers, package.propagate = before[:2]
    package.setLevel(before[2])
    warnings.showwarning = warned


@pytest.fixture(scope="session")
def traceable(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    """Skips a test where the installed transformers cannot trace a model that has no adapter at all (5.6 cannot)."""
    import torch
    import transformers

    from tests.shared import IDS, Logits

    try:
        torch.jit.trace(Logits(tiny_llama(num_hidden_layers=1)).eval(), (IDS,), check_trace=False)
    except Exception as error:
        pytest.skip(f"transformers {transformers.__version__} cannot trace its own model: {error}")


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Factory of Llamas with random weights: 3 layers, width 64, grouped-query attention; the same for the same seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: int | bool) -> LlamaForCausalLM:
        sizes = {
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 112,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # ten times the usual deviation: logits that differ visibly when a layer changes
            config = LlamaConfig(**{**sizes, "initializer_range": 0.2, **overrides})
            model = LlamaForCausalLM(config).eval()
            return (
                model if dtype == torch.float32 else model._apply(lambda t: t.to(dtype) if t.is_floating_point() else t)
            )

    return make
