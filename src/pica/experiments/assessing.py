"""Evaluating any model on any task: a base model, an adapter folder, a run's folder or a merged model."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pica.errors import AdapterFileError, ConfigError
from pica.experiments import output as files
from pica.experiments.evaluation import Evaluation, evaluate
from pica.experiments.models import base_of, device, load_adapter, load_model, load_tokenizer
from pica.experiments.parsing import load_recipe
from pica.experiments.recipe import ModelSection, Recipe
from pica.experiments.reporting import Reporter
from pica.tasks import Source, get_task
from pica.tasks.records import check_location


@dataclass(frozen=True)
class Request:
    """What to evaluate. Fields left None come from the run that the adapter belongs to, else from the task."""

    model: str
    base: str | None = None
    task: str | None = None
    data: str | None = None
    limit: int | None = None
    template: str | None = None
    max_new_tokens: int | None = None
    batch_size: int = 32
    dtype: str | None = None
    revision: str | None = None
    output: Path | None = None


@dataclass(frozen=True)
class Assessment:
    """Which adapter or model was measured on what, and the result."""

    model: str
    task: str
    data: str
    result: Evaluation


def assess(request: Request, *, reporter: Reporter) -> Assessment:
    """Answer the problems, write the predictions if asked to, and return the measurements.

    Raises:
        PicaError: The model, the task or the data is not to be had, or the predictions can't be written.
    """
    adapter = find_adapter(Path(request.model).expanduser())
    recipe = run_of(adapter) if adapter else None
    # Without a task in the request, that of the run; a run's data and prompt only make sense with its own task.
    name = request.task or (recipe.task.name if recipe else None)
    if name is None:
        raise ConfigError("Name the task with --task, for instance --task arithmetic.")
    task = get_task(name)
    if recipe and recipe.task.name != name:
        recipe = None
    data = request.data or _test_source(recipe, name)
    if problem := check_location(data):
        raise ConfigError(f"--data: {problem}")
    template = request.template or (recipe.task.template if recipe else None)
    columns = recipe.data.columns if recipe and not request.data else {}
    limit = request.limit or (recipe.data.test_limit if recipe and not request.data else None)
    seed = recipe.data.seed if recipe else 0
    examples = task.load("test", Source(data, limit, seed, template, columns))

    section = ModelSection(path=request.model, revision=request.revision)
    if adapter is not None:
        section.path = base_of(adapter, request.base)
    section.dtype = request.dtype or (recipe.model.dtype if recipe else "float32")  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = load_tokenizer(section)
    model: Any = load_model(section)
    if adapter is not None:
        model = load_adapter(model, adapter)
    longest = request.max_new_tokens or (recipe.task.max_new_tokens if recipe else None)
    result = evaluate(
        model.to(device()),
        tokenizer,
        task,
        examples,
        batch_size=request.batch_size,
        max_new_tokens=longest or task.default_max_new_tokens,
        reporter=reporter,
        label="Answering",
    )
    if request.output is not None:
        files.write_jsonl(request.output, map(dataclasses.asdict, result.predictions))
    return Assessment(str(adapter or request.model), name, data, result)


def find_adapter(path: Path) -> Path | None:
    """The adapter folder that a path means: itself, or `adapter` inside a run's folder; None for anything else."""
    for folder in (path, path / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    return None


def require_adapter(path: Path) -> Path:
    """The adapter folder that a path means.

    Raises:
        AdapterFileError: There is none.
    """
    adapter = find_adapter(path)
    if adapter is None:
        there = "holds no adapter_config.json" if path.is_dir() else "does not exist"
        raise AdapterFileError(f"Adapter folder {str(path)!r} {there}.")
    return adapter


def run_of(adapter: Path) -> Recipe | None:
    """The recipe of the run that an adapter lies in; None for an adapter from elsewhere."""
    for folder in adapter.resolve().parents[:3]:
        if (folder / files.RESOLVED).is_file():
            try:
                return load_recipe(str(folder / files.RESOLVED))
            except ConfigError:
                return None  # its files have moved since: as good as unknown
    return None


def _test_source(recipe: Recipe | None, task: str) -> str:
    if recipe is not None:
        return recipe.data.test or recipe.data.train
    if task == "arithmetic":
        return "embedded"
    raise ConfigError("Name the problems with --data, for instance --data test.jsonl.")
