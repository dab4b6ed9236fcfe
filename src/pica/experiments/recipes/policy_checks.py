"""What can be wrong with a recipe that learns from preferences or rewards."""

import math
from collections.abc import Iterator

from pica.experiments.recipes.recipe import Recipe
from pica.tasks.reward import SCORED, unscored


def policy_problems(recipe: Recipe) -> Iterator[str]:
    """One sentence each."""
    task, trainer = recipe.task, recipe.trainer
    if task.name not in ("preference", "reward"):
        return
    if recipe.adapter.lora_dropout:
        yield f"adapter.lora_dropout: task {task.name} trains without dropout, as TRL's trainer does; leave it out."
    if task.name == "preference":
        if not 0 < recipe.preference.beta < math.inf:
            yield f"preference.beta = {recipe.preference.beta}: must be above 0."
        if trainer.overflow == "split":
            yield "trainer.overflow = split: a pair cannot be split; use cut or drop."
        return
    reward = recipe.reward
    if task.subset is not None and task.subset not in SCORED:
        yield unscored(task.subset)
    if reward.num_generations < 2:
        yield (
            f"reward.num_generations = {reward.num_generations}: must be 2 or more, since answers to one problem are held "
            "against each other."
        )
    elif trainer.batch_size * trainer.accumulation % reward.num_generations:
        yield (
            f"trainer.batch_size x trainer.accumulation = {trainer.batch_size * trainer.accumulation} answers a step: must "
            f"be a multiple of reward.num_generations = {reward.num_generations}."
        )
    if not 0 < reward.temperature < math.inf:
        yield f"reward.temperature = {reward.temperature}: must be above 0."
    if not 0 < reward.top_p <= 1:
        yield f"reward.top_p = {reward.top_p}: must be above 0 and at most 1."
    if trainer.group_by_length:
        yield "trainer.group_by_length is for texts that are there already, and task reward writes its own; leave it out."
