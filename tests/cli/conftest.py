"""Fixtures: a tiny model folder, and the command line run in this process."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.experiments.tiny import write_tiny_llama

from pica.cli import main


class Outcome(NamedTuple):
    """Exit status and output of a command."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pica(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def run(*arguments: object) -> Outcome:
        status = main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return Outcome(status, shown.out, shown.err)

    return run


@pytest.fixture
def quick(model_folder: Path) -> list[str]:
    """Arguments of a training that takes a second."""
    fields = {
        "model.path": model_folder,
        "data.train_limit": 40,
        "data.test_limit": 4,
        "task.max_new_tokens": 4,
        "adapter.r": 4,
        "adapter.target_modules": "[q_proj, v_proj]",
        "trainer.max_steps": 6,
        "trainer.batch_size": 4,
        "trainer.learning_rate": 0.01,
        "trainer.threads": 1,
        "evaluate_base": "false",
    }
    return [word for key, value in fields.items() for word in (f"--{key}", str(value))]
