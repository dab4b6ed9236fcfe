"""`pica recipes`: the recipes and comparisons inside the package."""

import argparse
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pica.cli.options import command_parser
from pica.cli.show import show, show_rows
from pica.errors import ConfigError

EPILOG = """examples:
  pica recipes
  pica recipes smollm2-gsm8k > my-recipe.yaml
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = command_parser(
        "recipes",
        "List the recipes and comparisons inside the package, or show one.",
        EPILOG,
    )
    made.add_argument("name", nargs="?", metavar="NAME", help="the recipe or comparison to show")
    return made


def run(arguments: Sequence[str]) -> int:
    """List them, or print one as it is written."""
    import yaml

    from pica.experiments.compare.comparison import builtin_comparisons
    from pica.experiments.recipes.parsing import builtin_recipes

    name = parser().parse_args(arguments).name
    recipes, comparisons = builtin_recipes(), builtin_comparisons()
    if name is None:
        _list(
            "Recipes, for pica train NAME", {name: _described(yaml.safe_load(text)) for name, text in recipes.items()}
        )
        show()
        titles = {name: yaml.safe_load(text)["title"] for name, text in comparisons.items()}
        _list("Comparisons, for pica compare NAME", titles)
        return 0
    if name not in recipes and name not in comparisons:
        near = get_close_matches(name, [*recipes, *comparisons], n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"There is no built-in recipe {name!r}: {hint}`pica recipes` lists them.")
    if name in recipes and name in comparisons:
        show(f"# A comparison, for pica compare {name}, has this name too; it is below the recipe.")
        show(recipes[name])
        show("---")
    show(comparisons.get(name) or recipes[name], end="")
    return 0


def _list(title: str, described: Mapping[str, str]) -> None:
    show(f"{title}:")
    show_rows(described, indent=2)


def _described(recipe: Mapping[str, Any]) -> str:
    """What a recipe trains."""
    task, adapter = recipe["task"], recipe["adapter"]
    asked = " ".join(filter(None, (task["name"], task.get("subset"))))
    return f"{asked}, {adapter.get('method', 'pica')} r={adapter['r']}"
