"""Evaluating any model on any task: a base model, an adapter folder, a run's folder or a merged model."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pica.errors import AdapterFileError, ConfigError
from pica.experiments.data import Splits, held_out, load_splits, read_all, with_classes
from pica.experiments.evaluate.evaluation import Evaluation
from pica.experiments.models import base_of, device, load_config, revision_of
from pica.experiments.pipelines import make_pipeline
from pica.experiments.pipelines.classification import ClassificationPipeline
from pica.experiments.recipes.checks import SUBJECT_METRICS
from pica.experiments.recipes.parsing import recorded_recipe
from pica.experiments.recipes.recipe import DataSection, ModelSection, Recipe, places_of
from pica.experiments.reporting import Reporter
from pica.files import output as files
from pica.tasks import Task, get_task, location_problem
from pica.tasks.base import METRICS, TALKING, WRITING
from pica.tasks.records import class_name


@dataclass(frozen=True)
class Request:
    """What to evaluate. Fields left None come from the run that the adapter belongs to, else from the task."""

    model: str
    base: str | None = None
    task: str | None = None
    subset: str | None = None
    labels: list[str] | None = None
    metric: str | None = None
    data: str | None = None
    columns: dict[str, str | dict[str, str]] | None = None
    limit: int | None = None
    skip_unreadable: bool = False
    scoring: str | None = None
    template: str | None = None
    max_new_tokens: int | None = None
    batch_size: int = 32
    dtype: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    output: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class Assessment:
    """Which adapter or model was measured on what, and the result."""

    model: str
    task: str
    data: str
    result: Evaluation


def assess(request: Request, *, reporter: Reporter) -> Assessment:
    """Answer the problems, and write the predictions if asked to.

    Returns:
        The measurements.
    Raises:
        PicaError: The model, the task or the data is not to be had, or the predictions can't be written.
    """
    if request.output is None:
        return _assess(request, reporter)
    with files.claimed_file(request.output, overwrite=request.overwrite):  # now, not after the answers
        found = _assess(request, reporter)
        files.write_jsonl(request.output, found.result.rows())
    return found


def _assess(request: Request, reporter: Reporter) -> Assessment:
    adapter = find_adapter(Path(request.model).expanduser())
    recipe = _recipe(request, adapter)
    task = get_task(recipe.task.name)
    places = places_of(recipe.data, "test") or places_of(recipe.data, "train")
    data = ", ".join(places)
    for place in places:
        if problem := location_problem(task, place):
            raise ConfigError(f"--data: {problem}")
    if held_out(recipe, task):
        data = f"held out of {data}"  # of the run, which has learnt from the others
        examples = load_splits(recipe, task, bar=reporter.bar).test[: request.limit]
    else:
        examples = read_all(recipe, "test", bar=reporter.bar)
    recipe = _with_labels(recipe, examples, adapter)
    pipeline = make_pipeline(recipe)
    if adapter is not None:
        model: Any = pipeline.read(adapter)
    elif isinstance(pipeline, ClassificationPipeline):
        model = pipeline.load_trained()
    else:
        model = pipeline.load_base()
    result = pipeline.evaluate(model.to(device()), examples, reporter=reporter, label="Answering")
    return Assessment(str(adapter or request.model), recipe.task.name, data, result)


def _recipe(request: Request, adapter: Path | None) -> Recipe:
    """The request as a recipe: what it leaves open is that of the adapter's run, if there is one, else the defaults."""
    recorded = run = run_of(adapter) if adapter else None
    # Without a task in the request, that of the run; a run's data and prompt only make sense with its own task.
    name = request.task or (run.task.name if run else None)
    if name is None:
        raise ConfigError("Name the task with --task, for instance --task arithmetic.")
    task = get_task(name)
    _check_options(request, task, adapter)
    if run and run.task.name != name:
        run = None
    # A whole new section: that the run trusted its model's code does not count, its recipe may have come with the adapter.
    section = ModelSection(path=request.model, revision=request.revision, trust_remote_code=request.trust_remote_code)
    recipe = dataclasses.replace(run or Recipe(), model=section)
    if adapter is not None:
        recipe.model.path = base_of(adapter, request.base)
        recipe.model.revision = request.revision or revision_of(adapter, request.base)
    if recorded is not None:  # whatever its task: the basis may be of the quantised weights
        recipe.model.quantization = recorded.model.quantization
    recipe.model.dtype = request.dtype or (run.model.dtype if run else "float32")  # pyright: ignore[reportAttributeAccessIssue]
    changes = {
        name: getattr(request, name) for name in ("subset", "labels", "metric", "scoring", "template", "max_new_tokens")
    }
    given = {key: value for key, value in changes.items() if value is not None}
    recipe.task = dataclasses.replace(recipe.task, name=name, **given)
    if task.subsets and recipe.task.subset not in task.subsets:
        raise ConfigError(f"Name the data set with --subset: task {name} has {', '.join(task.subsets)}.")
    if recipe.task.scoring == "likelihood" and name != "commonsense":
        raise ConfigError(f"--scoring likelihood needs problems with choices, which task {name} has not; leave it out.")
    if request.data:
        recipe.data = DataSection(test=request.data, seed=recipe.data.seed)
    elif run is None and task.has_embedded:
        recipe.data = DataSection(test="embedded")
    elif run is None:
        raise ConfigError("Name the problems with --data, for instance --data test.jsonl.")
    if request.limit and not held_out(recipe, task):  # which limits how many the run held out
        recipe.data = dataclasses.replace(recipe.data, test_limit=request.limit)
    if request.columns:
        recipe.data = dataclasses.replace(recipe.data, columns=request.columns)
    if request.skip_unreadable:
        recipe.data = dataclasses.replace(recipe.data, skip_unreadable=True)
    recipe.trainer = dataclasses.replace(recipe.trainer, eval_batch_size=request.batch_size)
    return recipe


def _check_options(request: Request, task: Task, adapter: Path | None) -> None:
    """Raise `ConfigError` on an option that the task or the model has no use for: to pass over it would mislead."""
    if request.base is not None and adapter is None:
        raise ConfigError(f"--base is for adapters, and {request.model!r} holds none; leave it out.")
    if task.kind == "text-to-image" and adapter is None:
        raise ConfigError(f"Task {task.name} is measured on the output folder of its run; give that as MODEL.")
    if request.subset is not None and not task.subsets:
        raise ConfigError(f"--subset: task {task.name} has none; leave it out.")
    for name in ("template", "max_new_tokens"):
        if getattr(request, name) is not None and not (
            task.kind in ("generation", "reward") or (task.kind in TALKING and name == "max_new_tokens")
        ):
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} is for tasks that generate text, and {task.name} does not; leave it out.")
    if task.kind in WRITING and (request.metric or request.labels):
        option = "metric" if request.metric else "labels"
        raise ConfigError(f"--{option} is for classification tasks, and {task.name} is none; leave it out.")
    metrics = SUBJECT_METRICS if task.kind == "text-to-image" else METRICS
    if request.metric is not None and request.metric not in metrics:
        raise ConfigError(f"--metric {request.metric!r} is unknown; choose one of {', '.join(metrics)}.")
    if request.labels is not None and (len(request.labels) < 2 or len(set(request.labels)) < len(request.labels)):
        raise ConfigError("--labels: give two or more different classes.")


def _with_labels(recipe: Recipe, examples: list[Any], adapter: Path | None) -> Recipe:
    """A classification recipe with its classes."""
    # They are those of the request or the run; else those of a trained model's own configuration, if the examples' are
    # among them; else the examples' own, in the order that training would have given them.
    task = get_task(recipe.task.name)
    if task.kind in WRITING or recipe.task.labels is not None:
        return with_classes(recipe, Splits([], [], examples))
    if adapter is None:
        own = [class_name(name) for _, name in sorted((load_config(recipe.model).id2label or {}).items())]
        if {str(example.label) for example in examples} <= set(own):
            recipe.task.labels = own
    return with_classes(recipe, Splits(examples, [], examples))


def find_adapter(path: Path) -> Path | None:
    """The adapter folder that a path means: itself, or `adapter` inside a run's folder; None for anything else."""
    for folder in (path, path / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    return None


def require_adapter(path: Path) -> Path:
    """Find an adapter.

    Returns:
        The adapter folder that the path means.
    Raises:
        AdapterFileError: There is none.
    """
    adapter = find_adapter(path)
    if adapter is None:
        there = "holds no adapter_config.json" if path.is_dir() else "does not exist"
        raise AdapterFileError(f"Adapter folder {str(path)!r} {there}.")
    return adapter


def run_of(adapter: Path) -> Recipe | None:
    """The recipe of the run that an adapter lies in, its data here or not; None for an adapter from elsewhere."""
    for folder in adapter.resolve().parents[:3]:
        if (folder / files.RESOLVED).is_file():
            try:
                return recorded_recipe(folder / files.RESOLVED)
            except ConfigError:
                return None  # damaged: as good as unknown
    return None
