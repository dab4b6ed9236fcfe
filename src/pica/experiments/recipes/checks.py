"""What can be wrong with a recipe whose fields have the right types. Reads no data and imports no torch."""

import dataclasses
import math
import os
import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from pica.experiments.methods import METHODS, SPECIAL
from pica.experiments.recipes.owned_fields import fields_of_others
from pica.experiments.recipes.policy_checks import policy_problems
from pica.experiments.recipes.recipe import AdapterSection, Recipe, places_of, tests_of, weights_of
from pica.tasks import TASKS, TEMPLATES, has_split, location_problem
from pica.tasks.base import METRICS, TALKING, WRITING
from pica.tasks.pictures import KINDS_OF_FILE as KINDS_OF_PICTURES
from pica.tasks.places import KINDS_OF_FILE
from pica.tasks.records import class_name
from pica.tuners.base.roles import check_share

_POSITIVE_INTEGERS = {
    "data": ("train_limit", "validation_limit", "test_limit"),
    "task": ("max_new_tokens",),
    "dreambooth": ("class_count", "resolution", "inference_steps", "draw_batch_size", "noise_levels"),
    "adapter": ("r", "calibration_tokens"),
    "trainer": (
        "max_steps",
        "batch_size",
        "accumulation",
        "max_length",
        "log_steps",
        "save_steps",
        "eval_steps",
        "patience",
        "sample_steps",
        "eval_batch_size",
        "threads",
    ),
    "baseline": ("r",),
}
_DEFAULT = AdapterSection()
_MOST_OFTEN = 1000  # times that a problem is learnt from in one pass
_MOST = 2**31 - 1  # what the libraries' whole numbers hold
_SEEDS = ("trainer.seed", "data.seed", "adapter.projection_seed", "adapter.pattern_seed")  # of their own range
# Has a sentence of its own below, or means something.
_MAY_BE_EMPTY = ("name", "model.path", "dreambooth.instance_prompt", "dreambooth.class_prompt")
_AT_LEAST_ZERO = {
    "task": ("answers",),
    "trainer": ("warmup", "weight_decay", "max_grad_norm"),
    "dreambooth": ("prior_weight", "validation_pictures", "guidance"),
    "reward": ("beta", "test_generations"),
}
REPORTS = ("tensorboard", "wandb", "trackio")
"""What trainer.report_to may name, as transformers does."""
SUBJECT_METRICS = ("r2", "dino", "clip_i", "clip_t")
"""What task.metric may be for dreambooth."""


_PIPELINE = "model_index.json"  # of a folder that holds a pipeline of diffusers
REQUIRED = "REQUIRED"
"""Stands in a recipe for a place that only the user can name."""


def problems(recipe: Recipe) -> list[str]:
    """Everything that is wrong with the recipe, one sentence each: ranges, unknown names, missing files."""
    checks = (_absurdities, _ranges, _watching, _names, _places)
    return [problem for check in checks for problem in check(recipe)]


def model_problem(path: str) -> str | None:
    """Why a model location cannot be right, in one sentence; None for a model folder or what may be a hub name."""
    folder = Path(path).expanduser()
    if path == "embedded":
        return None
    if folder.is_dir():
        if (folder / "config.json").is_file() or (folder / _PIPELINE).is_file():
            return None
        hint = (
            "; this is an adapter, give the model it belongs to" if (folder / "adapter_config.json").is_file() else ""
        )
        return f"folder {path!r} holds no config.json, so it is no model folder{hint}."
    if folder.is_file():
        return f"{path!r} is a file; give the model's folder."
    if folder.is_symlink():
        return f"{path!r} is a link to nowhere."
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or not path.strip():
        return f"model folder {path!r} does not exist."
    return None


def _absurdities(recipe: Recipe) -> Iterator[str]:
    """Values of the right types that no library underneath survives, whatever the field is for."""
    for section in ("", *(field.name for field in dataclasses.fields(recipe) if dataclasses.is_dataclass(field.type))):
        holder = getattr(recipe, section) if section else recipe
        for name, value in vars(holder).items():
            dotted = f"{section}.{name}" if section else name
            for leaf in _leaves(value):
                if isinstance(leaf, str) and "\0" in leaf:
                    yield f"{dotted}: holds a NUL character, which is part of no name; remove it."
                elif isinstance(leaf, int) and not -_MOST <= leaf <= _MOST and dotted not in _SEEDS:
                    yield f"{dotted} = {leaf}: must be at most {_MOST}."
            if value == "" and dotted not in _MAY_BE_EMPTY:
                yield f"{dotted} is empty: give a value, or leave it out."
    most = max(64, 8 * (os.cpu_count() or 1))
    if (recipe.trainer.threads or 0) > most:
        yield f"trainer.threads = {recipe.trainer.threads}: must be at most {most} on this machine."
    if not 0 <= recipe.data.seed < 2**32:
        yield f"data.seed = {recipe.data.seed}: must be from 0 to 2^32 - 1."
    if len(recipe.name.encode("utf-8", "replace")) > 200:
        yield f"name: has {len(recipe.name)} characters; it becomes part of a folder name and must be at most 200 bytes."
    if recipe.trainer.epochs > _MOST:
        yield f"trainer.epochs = {recipe.trainer.epochs:g}: must be at most {_MOST}."


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif not dataclasses.is_dataclass(value):
        yield value


def _ranges(recipe: Recipe) -> Iterator[str]:
    for section, names in _POSITIVE_INTEGERS.items():
        for name in names:
            value = getattr(getattr(recipe, section), name)
            if value is not None and value < 1:
                yield f"{section}.{name} = {value}: must be at least 1."
    for section, names in _AT_LEAST_ZERO.items():
        for name in names:
            value = getattr(getattr(recipe, section), name)
            if not 0 <= value < math.inf:
                yield f"{section}.{name} = {value}: must be 0 or more."
    trainer, adapter = recipe.trainer, recipe.adapter
    rates = [("trainer.learning_rate", trainer.learning_rate)]
    rates += [("trainer.learning_rates", rate) for rate in trainer.learning_rates]
    rates += [("baseline.learning_rates", rate) for rate in recipe.baseline.learning_rates]
    if trainer.head_learning_rate is not None:
        rates.append(("trainer.head_learning_rate", trainer.head_learning_rate))
    for name, rate in rates:
        if not 0 < rate < 1e38:  # more does not fit the parameters' float32
            yield f"{name} = {rate}: must be above 0 and finite."
    for name in ("trainer", "baseline"):
        given = getattr(recipe, name).learning_rates
        yield from (
            f"{name}.learning_rates: {rate:g} occurs twice; leave one out."
            for rate in dict.fromkeys(given)
            if given.count(rate) > 1
        )
    if not 0 < trainer.epochs < math.inf:
        yield f"trainer.epochs = {trainer.epochs}: must be above 0."
    if not 0 <= adapter.lora_dropout < 1:
        yield f"adapter.lora_dropout = {adapter.lora_dropout}: must be from 0 to below 1."
    if adapter.lora_alpha is not None and not 0 < adapter.lora_alpha < math.inf:
        yield f"adapter.lora_alpha = {adapter.lora_alpha}: must be above 0."
    for pattern, rank in adapter.rank_pattern.items():
        if rank < 1:
            yield f"adapter.rank_pattern: {pattern!r} has rank {rank}; it must be at least 1."
    if adapter.method in METHODS:
        for name in SPECIAL:
            value = getattr(adapter, name)
            if name not in METHODS[adapter.method].takes and value != getattr(_DEFAULT, name):
                owners = [method for method in METHODS if name in METHODS[method].takes]
                have = f"only method {owners[0]} has" if len(owners) == 1 else f"only {', '.join(owners)} have"
                yield f"adapter.{name} = {value!r}: {have} it, and method {adapter.method} has not; leave it out."
    for problem in _of_configuration(adapter):
        spaced = re.sub(r"^(\w+)=", r"\1 = ", problem)
        yield f"adapter.{spaced}."
    if adapter.method == "svft" and adapter.rank_pattern:
        yield "adapter.rank_pattern does not go with method svft, which has no rank; remove it."
    if recipe.baseline.method is not None and not recipe.baseline.learning_rates:
        yield "baseline.learning_rates is empty: give at least one, for instance [0.001]."
    if not 0 <= trainer.seed < 2**32:
        yield f"trainer.seed = {trainer.seed}: must be from 0 to 2^32 - 1."


def _of_configuration(adapter: AdapterSection) -> Iterator[str]:
    """What the configuration of a method of ours would say, as it says it."""
    if adapter.method in METHODS:
        yield from METHODS[adapter.method].problems(adapter)
    if adapter.share is not None and (problem := check_share(adapter.share)):
        yield problem


def _names(recipe: Recipe) -> Iterator[str]:
    if recipe.task.name not in TASKS:
        yield f"task.name = {recipe.task.name!r}: unknown task{_near(recipe.task.name, TASKS)}"
    else:
        yield from task_problems(recipe)
    if recipe.task.template is not None and recipe.task.template not in TEMPLATES:
        yield f"task.template = {recipe.task.template!r}: unknown template{_near(recipe.task.template, TEMPLATES)}"
    for section, method in (("adapter", recipe.adapter.method), ("baseline", recipe.baseline.method)):
        if method is not None and method not in METHODS:
            yield f"{section}.method = {method!r}: unknown method{_near(method, METHODS)}"
    if not recipe.name or "/" in recipe.name or recipe.name.startswith("."):
        yield f"name = {recipe.name!r}: must be a plain word that can be part of a folder name."


def _places(recipe: Recipe) -> Iterator[str]:
    task = TASKS.get(recipe.task.name)
    draws = task is not None and task.kind == "text-to-image"
    folder = Path(recipe.model.path).expanduser()
    if recipe.model.path == REQUIRED:
        yield "model.path is not set: give a model folder or a hub name with --model.path."
    elif draws and folder.is_dir():
        if not (folder / _PIPELINE).is_file():
            yield (
                f"model.path: folder {recipe.model.path!r} holds no {_PIPELINE}, so it is no pipeline of diffusers, which "
                "task dreambooth needs."
            )
    elif problem := model_problem(recipe.model.path):
        yield f"model.path: {problem}"
    elif (folder / _PIPELINE).is_file():
        yield f"model.path: folder {recipe.model.path!r} holds a pipeline of diffusers, which is for task dreambooth."
    files = KINDS_OF_PICTURES if task is not None and task.kind == "image-classification" else KINDS_OF_FILE
    yield from _weights(recipe)
    yield from _test_names(recipe)
    if (
        isinstance(recipe.data.train, str)
        and recipe.data.train[:1] in ("{", "[")
        and not Path(recipe.data.train).exists()
    ):
        yield (
            f"data.train = {recipe.data.train!r}: neither a list of sources, [a.jsonl, b.jsonl], nor sources with a number "
            "each, {a.jsonl: 1, b.jsonl: 0.5}."
        )
        return
    locations = [(split, place) for split in ("train", "validation", "test") for place in places_of(recipe.data, split)]
    for name, location in locations:
        if location == REQUIRED:
            given = "a folder of pictures" if draws else f"{files}, a folder or hub:OWNER/NAME"
            yield f"data.{name} is not set: give {given} with --data.{name}."
        elif problem := location_problem(task, location):
            yield f"data.{name}: {problem}"
    for name, columns in recipe.data.columns.items():
        several = [*(() if isinstance(recipe.data.train, str) else recipe.data.train), *tests_of(recipe.data.test)]
        if not isinstance(columns, str) and name not in ("train", "validation", "test", *several):
            yield f"data.columns: {name!r} has names below it, and is no split; those are train, validation and test."
    one = recipe.data.train if isinstance(recipe.data.train, str) else None
    if (
        recipe.data.test is None
        and one not in ("embedded", REQUIRED)
        and not draws
        and not (task is not None and task.kind in TALKING)  # some of the training conversations are held out
        and (one is None or not has_split(task, one, "test"))
    ):
        yield (
            "data.test is required when data.train is a file, names several sources or has no test file in it: results are "
            "never reported on training problems."
        )
    if draws and recipe.data.train == "embedded":
        yield "data.train is not set: give a folder of pictures of one subject with --data.train."
    elif task is not None and task.kind == "chat" and "embedded" in weights_of(recipe.data.train):
        yield "data.train is not set: task chat learns from conversations of yours; name a file with --data.train."
    elif task is not None and not task.has_embedded and "embedded" in [place for _, place in locations]:
        yield f"task {task.name} has no embedded problems: set data.train and data.test to files, folders or hub names."


def _weights(recipe: Recipe) -> Iterator[str]:
    """Several sources of training problems."""
    train, task = recipe.data.train, TASKS.get(recipe.task.name)
    if isinstance(train, str):
        return
    if task is not None and task.kind not in WRITING:
        yield f"data.train names several sources, and task {task.name} learns from one; name one."
    if not train:
        yield "data.train names no source; give one, a list of them, or each with its weight, {chats.jsonl: 2}."
    if isinstance(train, list):
        for place in dict.fromkeys(train):
            if train.count(place) > 1:
                yield f"data.train: {place!r} occurs twice; give it the weight 2 instead, {{{place}: 2}}."
    for place, weight in weights_of(train).items():
        if not 0 < weight <= _MOST_OFTEN:
            yield (
                f"data.train: {place!r} has weight {weight:g}; a weight says how often each of its problems is learnt "
                f"from in one pass, above 0 and at most {_MOST_OFTEN:,} (0.5: half of them)."
            )


def _test_names(recipe: Recipe) -> Iterator[str]:
    """Several sources of test problems."""
    test, task = recipe.data.test, TASKS.get(recipe.task.name)
    if isinstance(test, str) and test[:1] == "{" and not Path(test).exists():
        yield f"data.test = {test!r}: no sources with a name each, {{gsm8k: gsm8k.jsonl, math: math.jsonl}}."
    if not isinstance(test, dict):
        return
    if task is not None and task.kind != "generation":
        yield f"data.test names several sources, and task {task.name} is measured on one; name one."
    if not test:
        yield "data.test names no source; give one, or several with a name each, {gsm8k: gsm8k.jsonl, math: math.jsonl}."
    if "" in test:
        yield "data.test: one of its sources has an empty name; results are shown by it."


def task_problems(recipe: Recipe) -> Iterator[str]:
    """What the recipe's task, a known one, lacks and has no use for, one sentence each."""
    given, task = recipe.task, TASKS[recipe.task.name]
    if task.subsets and given.subset is None:
        yield f"task.subset is not set: task {task.name} is several tasks; choose one of {', '.join(task.subsets)}."
    elif given.subset is not None and given.subset not in task.subsets and task.kind != "reward":
        known = _near(given.subset, task.subsets) if task.subsets else f": task {task.name} has none; leave it out."
        yield f"task.subset = {given.subset!r}: unknown subset{known}"
    if given.scoring == "likelihood" and task.name != "commonsense":
        yield f"task.scoring = likelihood needs problems with choices, which task {task.name} has not; leave it out."
    if task.kind not in ("image-classification", "text-to-image") and recipe.data.skip_unreadable:
        yield f"data.skip_unreadable is for pictures, and task {task.name} has none; leave it out."
    if task.kind in ("image-classification", "text-to-image") and recipe.trainer.group_by_length:
        yield "trainer.group_by_length is for texts: all pictures are the same size to a model; leave it out."
    yield from fields_of_others(recipe)
    yield from policy_problems(recipe)
    if task.kind not in WRITING and recipe.model.quantization is not None:
        yield (
            f"model.quantization is for tasks that generate text, and {task.name} is none (a classifier's new head would be "
            "quantised before it is trained); leave it out."
        )
    if task.kind in WRITING:
        for name in ("labels", "metric"):
            if getattr(given, name) is not None:
                yield f"task.{name} is for classification tasks, and {task.name} is none; leave it out."
        if recipe.trainer.head_learning_rate is not None:
            yield f"trainer.head_learning_rate is for classification tasks, and {task.name} is none; leave it out."
        return
    if task.kind == "text-to-image":
        yield from _subject_fields(recipe)
        return
    if given.metric is not None and given.metric not in METRICS:
        yield f"task.metric = {given.metric!r}: unknown metric{_near(given.metric, METRICS)}"
    if given.labels is not None and (
        len(given.labels) < 2 or len({*map(class_name, given.labels)}) < len(given.labels)
    ):
        yield "task.labels: give two or more different classes."
    for name in ("template", "max_new_tokens"):
        if getattr(given, name) is not None:
            yield f"task.{name} is for tasks that generate text, and {task.name} does not; leave it out."
    if recipe.model.path == "embedded":
        instance = "a ViT" if task.kind == "image-classification" else "an encoder such as BERT"
        yield (
            f"model.path: the embedded model is a language model for arithmetic; name one for task {task.name}, for "
            f"instance {instance}, with --model.path."
        )


def _watching(recipe: Recipe) -> Iterator[str]:
    """What is looked at while training."""
    trainer = recipe.trainer
    if trainer.patience is not None and trainer.eval_steps is None:
        yield f"trainer.patience = {trainer.patience}: counts measurements, which only trainer.eval_steps makes; set it too."
    if not trainer.keep_best and trainer.eval_steps is None:
        yield "trainer.keep_best = false: there is no best adapter without trainer.eval_steps; leave it out."
    if trainer.eval_steps is not None and recipe.data.refit:
        yield (
            "trainer.eval_steps does not go with data.refit, which learns from the validation problems in the end; leave "
            "one of them out."
        )
    if trainer.sample_steps is not None and recipe.task.answers == 0:
        yield "trainer.sample_steps: task.answers = 0 asks nothing; set it to 1 or more."
    for name in trainer.report_to:
        if name not in REPORTS:
            yield f"trainer.report_to = {name!r}: unknown program{_near(name, REPORTS)}"
        elif trainer.report_to.count(name) > 1:
            yield f"trainer.report_to: {name!r} occurs twice; leave one out."
            break


def _subject_fields(recipe: Recipe) -> Iterator[str]:
    """What task dreambooth needs, and what it has no use for."""
    given, section = recipe.task, recipe.dreambooth
    for name in ("labels", "template", "max_new_tokens"):
        if getattr(given, name) is not None:
            yield f"task.{name} is no setting of task dreambooth; leave it out."
    if recipe.trainer.head_learning_rate is not None:
        yield "trainer.head_learning_rate is for classification tasks, and dreambooth is none; leave it out."
    if given.metric is not None and given.metric not in SUBJECT_METRICS:
        yield f"task.metric = {given.metric!r}: unknown metric{_near(given.metric, SUBJECT_METRICS)}"
    needed = {"dino": "dino", "clip_i": "clip", "clip_t": "clip"}.get(given.metric or "")
    if needed and getattr(section, needed) is None:
        yield f"task.metric = {given.metric!r}: needs a model; name one with --dreambooth.{needed}."
    if needed and not section.validation_pictures:
        yield f"task.metric = {given.metric!r}: is of drawn pictures; set dreambooth.validation_pictures above 0."
    if not (section.instance_prompt or "").strip():
        yield 'dreambooth.instance_prompt is not set: say what the pictures show, for instance "a photo of sks dog".'
    if section.class_prompt is None and section.class_pictures is not None:
        yield "dreambooth.class_pictures: say with dreambooth.class_prompt what these pictures show."
    if section.class_prompt is not None and not section.class_prompt.strip():
        yield "dreambooth.class_prompt is empty: say what the class is called, or leave it out."
    if section.class_pictures is not None and Path(section.class_pictures).expanduser().is_file():
        yield f"dreambooth.class_pictures: {section.class_pictures!r} is a file; give a folder."
    if recipe.model.path == "embedded":
        yield "model.path: the embedded model draws nothing; name a pipeline of diffusers with --model.path."


def _near(name: str, known: object) -> str:
    names = sorted(known)  # pyright: ignore[reportArgumentType] -- a dict or a tuple of names
    near = get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}? Known: {', '.join(names)}." if near else f"; known: {', '.join(names)}."
