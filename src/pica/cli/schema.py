"""`pica schema`: what editors need to complete and check recipes and comparisons."""

import argparse
from collections.abc import Sequence

from pica.cli.options import command_parser
from pica.cli.show import show

EPILOG = """Editors with a YAML language server take it from the first line of the file:
  pica schema recipe > pica-recipe.json
  # yaml-language-server: $schema=pica-recipe.json
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = command_parser(
        "schema",
        "Print the JSON schema of a recipe or of a comparison.",
        EPILOG,
    )
    made.add_argument("kind", choices=("recipe", "comparison"), help="what the schema is of")
    return made


def run(arguments: Sequence[str]) -> int:
    """Print the schema."""
    given = parser().parse_args(arguments)

    from pica.experiments.recipes.schema import comparison_schema, recipe_schema
    from pica.files.output import json_text

    show(json_text(recipe_schema() if given.kind == "recipe" else comparison_schema(), indent=2))
    return 0
