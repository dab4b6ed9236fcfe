"""Fields of a recipe that only some tasks have."""

from collections.abc import Iterator

from pica.experiments.recipes.recipe import Recipe

_OWN_SECTIONS = ("dreambooth", "preference", "reward")  # each is for the task of its name
# Fields that only some tasks have, and which.
_TEXT_FIELDS = {
    "task.loss": ("chat",),
    "task.chat_template": ("chat", "preference"),
    "task.system": ("chat", "preference"),
    "task.answers": ("chat", "preference", "reward"),
    "trainer.overflow": ("chat", "preference"),
    "trainer.packing": ("chat",),
    "trainer.sample_steps": ("chat", "preference", "reward"),
}


def fields_of_others(recipe: Recipe) -> Iterator[str]:
    """Find what the task has no use for since it is another's; one sentence each."""
    default, name = Recipe(), recipe.task.name
    for section in _OWN_SECTIONS:
        if section != name and getattr(recipe, section) != getattr(default, section):
            yield f"The section {section} is for task {section}, and the task is {name}; leave it out."
    if name in ("chat", "preference") and recipe.task.template is not None:
        yield f"task.template is for other tasks; {name} has task.chat_template."
    for field, owners in _TEXT_FIELDS.items():
        section, _, inner = field.partition(".")
        if name not in owners and getattr(getattr(recipe, section), inner) != getattr(getattr(default, section), inner):
            theirs = f"task {owners[0]}" if len(owners) == 1 else f"tasks {', '.join(owners)}"
            yield f"{field} is for {theirs}, and the task is {name}; leave it out."
    if recipe.trainer.packing and recipe.trainer.group_by_length:
        yield "trainer.group_by_length does not go with trainer.packing, whose rows all have one length; leave it out."
