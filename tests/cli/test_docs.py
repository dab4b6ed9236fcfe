"""The pages on the command line name what is there."""

import re
from pathlib import Path

import pytest
import yaml

from pica.cli import COMMANDS
from pica.experiments.compare.comparison import builtin_comparisons, load_comparison
from pica.experiments.methods import METHODS
from pica.experiments.recipes.parsing import builtin_recipes, option_parser
from pica.tasks import TASKS, TEMPLATES

DOCS = Path(__file__).parents[2] / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_every_command_task_and_template_has_its_place():
    text = page("cli.md")
    headings = " ".join(re.findall("^## (.*)$", text, flags=re.MULTILINE))
    assert [name for name in COMMANDS if f"pica {name}" not in headings] == []
    tasks = page("tasks.md")
    assert all(f"| `{name}` |" in tasks for name in TASKS)
    assert all(f"`{name}`" in tasks for name in TEMPLATES)


def test_the_table_of_recipes_is_complete():
    listed = re.findall(r"^\| `([\w-]+)` \|", page("recipes.md").split("## ")[0], flags=re.MULTILINE)
    assert sorted(listed) == sorted(builtin_recipes())


@pytest.mark.parametrize("name", ["train.md", "tasks.md", "recipes.md", "compare.md", "dreambooth.md"])
def test_every_field_that_a_page_names_exists(name: str):
    known = option_parser("pica").format_help()
    fields = set(
        re.findall(r"`?\b(?:--)?((?:model|data|task|dreambooth|adapter|trainer|baseline)\.[a-z_]+)\b", page(name))
    )
    files = {"dreambooth.md", "recipe.resolved", "train.jsonl", "test.jsonl"}
    assert fields
    assert [field for field in sorted(fields - files) if f"--{field} " not in known] == []


def test_the_example_recipe_has_known_fields_only():
    example = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", page("recipes.md"), flags=re.DOTALL)[0])
    known = option_parser("pica").format_help()
    for section, fields in example.items():
        if isinstance(fields, dict):
            assert all(f"--{section}.{field} " in known for field in fields)


def test_the_page_on_comparisons_is_complete(tmp_path: Path):
    text = page("compare.md")
    listed = re.findall(r"^\| `([\w-]+)` \|", text.split("## ")[0], flags=re.MULTILINE)
    assert sorted(listed) == sorted(builtin_comparisons())
    named = re.findall(
        r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", text.split("## Methods")[1], flags=re.MULTILINE))
    )
    assert sorted(named) == sorted(METHODS)
    example = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)[0])
    example["base"]["model"]["path"] = "embedded"
    example["base"]["data"] = {}
    example["base"]["task"] = {}
    path = tmp_path / "example.yaml"
    path.write_text(yaml.safe_dump(example))
    assert len(load_comparison(str(path)).rows) == 3
