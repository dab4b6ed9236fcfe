"""Fixtures: a tiny model folder and a recipe that trains it in a second."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pica.experiments.recipes.parsing import load_recipe
from pica.experiments.recipes.recipe import Recipe
from tests.experiments.tiny import write_tiny_llama


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def recipe(model_folder: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A quick recipe; keyword arguments with "__" for the dot override its fields."""

    def make(**overrides: object) -> Recipe:
        quick = {
            "output": str(tmp_path / "out"),
            "evaluate_base": False,
            "model.path": str(model_folder),
            "data.train_limit": 40,
            "data.test_limit": 4,
            "data.validation_limit": 4,
            "task.max_new_tokens": 4,
            "adapter.r": 4,
            "adapter.target_modules": ["q_proj", "v_proj", "up_proj"],
            "trainer.max_steps": 6,
            "trainer.batch_size": 4,
            "trainer.log_steps": 2,
            "trainer.learning_rate": 0.01,
        }
        quick |= {key.replace("__", "."): value for key, value in overrides.items()}
        return load_recipe(None, list(quick.items()))

    return make
