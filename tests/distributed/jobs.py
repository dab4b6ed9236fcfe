"""All that the tests of this folder ask of two processes, so that these are started once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.distributed import worker

FSDP1, FSDP2 = worker.fsdp(1), worker.fsdp(2)

FROM_FILE = {"projection": "activation", "basis_from": "basis"}

# ---- trainings that must give what one process gives ---------------------------------------------------------------
ALIKE: dict[str, dict[str, Any]] = {
    "ddp": {},
    "ddp, accumulation, checkpointing": {"accumulation": 2, "reentrant": False},
    "ddp, reentrant, static graph": {
        "reentrant": True,
        "ddp_static_graph": True,
        "ddp_find_unused_parameters": False,
    },
    "ddp, reentrant, nothing shared": {
        "reentrant": True,
        "ddp_find_unused_parameters": False,
        "adapter": {"share": "none"},
    },
    "ddp, mixture": {"mixture": "mixture"},
    "ddp, svft": {"adapter": {"method": "svft"}},
    "ddp, basis from a file": {"adapter": FROM_FILE},
    "fsdp2": FSDP2,
    "fsdp2, accumulation, checkpointing": {**FSDP2, "accumulation": 2, "reentrant": False},
    "fsdp2, reentrant": {**FSDP2, "reentrant": True},
    "fsdp2, mixture": {**FSDP2, "mixture": "mixture"},
    "fsdp2, svft": {**FSDP2, "adapter": {"method": "svft"}},
    "fsdp2, basis from a file": {**FSDP2, "adapter": FROM_FILE},
    "fsdp2, weights in the first process": {
        **worker.fsdp(2, cpu_ram_efficient_loading=True),
        "efficient": True,
        "base": "base",
    },
    "fsdp1": FSDP1,
    "fsdp1, accumulation, checkpointing": {**FSDP1, "accumulation": 2, "reentrant": False},
    "sharded by from_pretrained": {"base": "base", "placement": {"fsdp_size": 2}},
}
REENTRANT = {"reentrant": True, "ddp_find_unused_parameters": False}
RESUMED: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": FSDP2,
    "fsdp2, sharded checkpoint": worker.fsdp(2, state_dict_type="SHARDED_STATE_DICT"),
}


# torch cannot restore the state of an optimizer that has none, as plain SGD
ADAM = {"trainer__optimizer": "adamw_torch", "trainer__learning_rates": [0.001, 0.01]}
LAUNCHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "run, fsdp2": ({}, {"launch": "fsdp2"}),
    "run, fsdp1": ({}, {"launch": "fsdp1", "FSDP_SYNC_MODULE_STATES": "false"}),
    "interrupted, fsdp2": (ADAM, {"launch": "fsdp2", "interrupt": True}),
}
"""{name: (changes to the recipe, what `pica train` is as if launched with)}."""


def recipe(folder: Path, output: Path, **overrides: Any) -> dict[str, Any]:
    """Fields of a recipe that trains a tiny model in a second or two."""
    quick = {
        "output": str(output),
        "model.path": str(folder / "model"),
        "data.train_limit": 40,
        "data.test_limit": 4,
        "data.validation_limit": 4,
        "task.max_new_tokens": 4,
        "adapter.r": 4,
        "adapter.target_modules": ["q_proj", "v_proj", "up_proj"],
        "trainer.max_steps": 4,
        "trainer.batch_size": 2,
        "trainer.log_steps": 1,
        "trainer.optimizer": "sgd",
        "trainer.schedule": "constant",
        "trainer.learning_rates": [0.001, 0.1],
    }
    return quick | {key.replace("__", "."): value for key, value in overrides.items()}


def placed(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`arguments` of `fit` with base models' and bases' names as paths."""
    places: dict[str, Any] = {key: str(folder / arguments[key]) for key in ("base", "mixture") if key in arguments}
    if "basis_from" in (adapter := arguments.get("adapter", {})):
        places["adapter"] = adapter | {"basis_from": str(folder / adapter["basis_from"])}
    return arguments | places


def all_jobs(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """{name: (job, arguments)}, with `base`, `mixture` and `model` in `folder` as base models."""
    base = str(folder / "base")
    jobs: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, arguments in {**ALIKE, "ddp, reentrant": REENTRANT}.items():
        jobs[name] = ("fit", {"folder": str(folder / name), **placed(arguments, folder)})
    for name, arguments in RESUMED.items():
        jobs[f"resumed {name}"] = ("resume", {"folder": str(folder / f"resumed {name}"), **arguments})
    jobs["loaded"] = ("load_when_sharded", {"folder": str(folder / "loaded"), "saved": str(folder / "ddp")})
    jobs |= {
        "shared": ("share", {}),
        "sharded": ("share", {"base": base, "placement": {"fsdp_size": 2}}),
        "not shared": ("share_without_switch", {}),
        "broken": ("share_a_broken_model", {}),
        "different": ("different_models", {}),
        "alone": ("first_process_alone", {}),
        "together again": ("share", {"r": 6}),
        "tensor parallel": ("share", {"base": base, "placement": {"tp_plan": "auto"}}),
        "sharded first": ("shard_first", {}),
        "run": ("run_recipe", {"fields": recipe(folder, folder / "run")}),
        "interrupted": ("run_recipe", {"fields": recipe(folder, folder / "interrupted"), "interrupt": True}),
        **{
            name: ("run_recipe", {"fields": recipe(folder, folder / name, **changes), **arguments})
            for name, (changes, arguments) in LAUNCHED.items()
        },
        "fsdp on a cpu": (
            "run_recipe",
            {"fields": recipe(folder, folder / "fsdp on a cpu"), "launch": "fsdp2", "on_cpu": False},
        ),
        "diverged": (
            "run_recipe",
            {"fields": recipe(folder, folder / "diverged", trainer__learning_rates=[0.1, 1e30])},
        ),
    }
    return jobs
