"""`pica data`: what a model would see of conversations, preferences or problems with a reward, before any training."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pica.cli.options import command_parser, whole
from pica.cli.show import show
from pica.errors import ConfigError

if TYPE_CHECKING:
    from pica.experiments.chat.preview import Preview
    from pica.experiments.preference.preview import PairPreview
    from pica.experiments.reward.preview import PromptPreview

    AnyPreview = Preview | PairPreview | PromptPreview

SEEN = ("chat", "preference", "reward")
"""Tasks whose data can be looked at."""
EPILOG = """examples:
  pica data chats.jsonl --model ./SmolLM2-135M-Instruct
  pica data chats.jsonl --model ./SmolLM2-135M-Instruct --examples 10 --page chats.html
  pica data pairs.jsonl --model ./SmolLM2-135M-Instruct
  pica data train.json --task reward --subset arithmetic --model ./SmolLM2-135M-Instruct
  pica data recipe.yaml

What is learnt is green on a terminal, and between « and » elsewhere.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = command_parser(
        "data",
        "Show what a model would see of conversations, of preferences (chosen and rejected answers), or of "
        "problems whose right answers are rewarded: examples with the words that are learnt, lengths, what is cut or left "
        "out, duplicates, and what is in the test.",
        EPILOG,
    )
    made.add_argument(
        "source",
        nargs="+",
        metavar="FILE|RECIPE",
        help=f"what is learnt from, or a recipe for task {', '.join(SEEN)}",
    )
    made.add_argument(
        "--task", choices=SEEN, help="what it is for (default: preference for chosen and rejected, else chat)"
    )
    made.add_argument(
        "--subset", metavar="TASK", help="reward: the task that scores the answers, for instance arithmetic"
    )
    made.add_argument("--model", metavar="MODEL", help="the model that would learn (its tokenizer and chat template)")
    made.add_argument("--test", metavar="FILE", help="what is measured on, to be held against these")
    made.add_argument(
        "--chat-template", metavar="NAME|FILE", help="alpaca, chatml or plain, or a file; the model's own if unset"
    )
    made.add_argument("--system", metavar="TEXT", help="a system prompt for conversations that have none")
    made.add_argument("--loss", choices=("assistant", "last", "all"), help="what is learnt (default: assistant)")
    made.add_argument("--max-length", type=whole, metavar="N", help="longest row in tokens (default: 512)")
    made.add_argument("--overflow", choices=("cut", "split", "drop"), help="what becomes of longer ones (default: cut)")
    made.add_argument("--examples", type=whole, default=3, metavar="N", help="how many to show (default: 3)")
    made.add_argument("--page", type=Path, metavar="FILE", help="write all of this as one HTML page too")
    made.add_argument("--json", action="store_true", help="print the numbers as JSON")
    return made


def run(arguments: Sequence[str]) -> int:
    """Parse, look and print."""
    given = parser().parse_args(arguments)
    if given.examples < 0:
        raise ConfigError(f"--examples {given.examples}: must be 0 or more.")
    if given.max_length is not None and given.max_length < 2:
        raise ConfigError(f"--max-length {given.max_length}: must be at least 2.")
    if given.page is not None and given.page.exists():
        raise ConfigError(f"--page {str(given.page)!r} exists; name another file.")

    from pica.cli.console import loading

    with loading():
        from pica.experiments.data import read_all

        recipe = _recipe(given)
        train, test = read_all(recipe, "train"), read_all(recipe, "test") if recipe.data.test else []
        found, facts = look(recipe, train, test, examples=given.examples)
    if given.json:
        show(
            json.dumps({"facts": facts, "examples": [[p, [asdict(s) for s in e]] for p, e in found.examples]}, indent=2)
        )
    else:
        print_preview(found, facts)
    if given.page is not None:
        _write_page(given.page, recipe, found, facts)
        show(f"page: {given.page}")
    return 0


def look(
    recipe: Any, train: Sequence[Any], test: Sequence[Any], *, examples: int
) -> tuple["AnyPreview", dict[str, str]]:
    """What a model would see of a recipe's training data, and what can be said of it in numbers."""
    from pica.experiments.mixing import described_sources

    looks: dict[str, Callable[..., tuple[AnyPreview, Callable[[Sequence[Any]], str]]]] = {"reward": _look_at_problems}
    found, described = looks.get(recipe.task.name, _look_at_talk)(recipe, train, test, examples)
    lines = enumerate(described_sources(train, described), start=1)
    sources = {f"source {number}": line for number, line in lines}
    return found, {"read": described(train), **sources, **found.facts(recipe.trainer.max_length)}


def _look_at_problems(
    recipe: Any, train: Sequence[Any], test: Sequence[Any], examples: int
) -> tuple["AnyPreview", Callable[[Sequence[Any]], str]]:
    from pica.experiments.reward.preview import preview_prompts
    from pica.tasks.base import described_problems

    def described(some: Sequence[Any]) -> str:
        return f"{described_problems(some)}, whose answers task {recipe.task.subset} scores"

    return preview_prompts(recipe, train, test, examples=examples), described


def _look_at_talk(
    recipe: Any, train: Sequence[Any], test: Sequence[Any], examples: int
) -> tuple["AnyPreview", Callable[[Sequence[Any]], str]]:
    from pica.experiments.chat.preview import preview
    from pica.experiments.chat.rendering import Renderer
    from pica.experiments.chat.templates import set_template
    from pica.experiments.models import load_tokenizer
    from pica.experiments.preference.preview import preview_pairs
    from pica.tasks.chat import described
    from pica.tasks.preference import described_pairs

    tokenizer = load_tokenizer(recipe.model)
    set_template(tokenizer, recipe.task.chat_template)
    pairs = recipe.task.name == "preference"
    found = (preview_pairs if pairs else preview)(
        Renderer(tokenizer, recipe.task.loss),
        train,
        test,
        system=recipe.task.system,
        max_length=recipe.trainer.max_length,
        overflow=recipe.trainer.overflow,
        examples=examples,
    )
    return found, described_pairs if pairs else described


def _recipe(given: argparse.Namespace) -> Any:
    from pica.experiments.recipes.checks import task_problems
    from pica.experiments.recipes.parsing import builtin_recipes, load_recipe
    from pica.experiments.recipes.recipe import DataSection, ModelSection, Recipe, TaskSection
    from pica.experiments.recipes.starting import task_of_first_row

    recipes = [name for name in given.source if Path(name).suffix in (".yaml", ".yml") or name in builtin_recipes()]
    if recipes and len(given.source) > 1:
        raise ConfigError(f"{recipes[0]!r} is a recipe, which names its data itself; leave the other names out.")
    if recipes:
        recipe = load_recipe(recipes[0], [("model.path", given.model)] if given.model else [])
    else:
        files = given.source[0] if len(given.source) == 1 else given.source
        task = TaskSection(name=given.task or task_of_first_row(given.source[0], {}) or "chat", subset=given.subset)
        recipe = Recipe(task=task, data=DataSection(train=files))
    if recipe.task.name not in SEEN:
        raise ConfigError(
            f"{recipes[0]!r} is a recipe for task {recipe.task.name}; pica data is for {', '.join(SEEN)}."
        )
    if recipes and (given.task or given.subset):
        raise ConfigError(f"{recipes[0]!r} is a recipe, which names its task itself; leave out --task and --subset.")
    if given.model is not None:
        recipe.model = ModelSection(path=given.model)
    elif not recipes:
        raise ConfigError(
            "Name the model with --model (embedded: the one inside this package): what is seen depends on its tokenizer "
            "and chat template."
        )
    for section, name, value in (
        (recipe.data, "test", given.test),
        (recipe.task, "chat_template", given.chat_template),
        (recipe.task, "system", given.system),
        (recipe.task, "loss", given.loss),
        (recipe.trainer, "max_length", given.max_length),
        (recipe.trainer, "overflow", given.overflow),
    ):
        if value is not None:
            setattr(section, name, value)
    if wrong := [*task_problems(recipe)]:
        raise ConfigError(wrong[0])
    return recipe


def print_preview(found: "AnyPreview", facts: dict[str, str]) -> None:
    """The numbers, then the examples with what is learnt of them."""
    from rich.text import Text

    from pica.cli.console import table_console

    console = table_console()
    width = max(map(len, facts))
    for name, value in facts.items():
        show(f"{name:<{width}}  {value}")
    for place, pieces in found.examples:
        console.print()
        console.print(f"── {place}", style="dim", markup=False)
        text = Text()
        for piece in pieces:
            if piece.learnt and not sys.stdout.isatty():
                text.append(f"«{piece.text}»")
            else:
                text.append(piece.text, style="bold green" if piece.learnt else "dim")
        console.print(text)


def _write_page(path: Path, recipe: Any, found: "AnyPreview", facts: dict[str, str]) -> None:
    from markupsafe import Markup

    from pica.experiments.recipes.recipe import weights_of
    from pica.files.output import write_text
    from pica.report.page import Page, details

    page = Page(
        "What the model would see",
        "The model is given these prompts, and learns from answers of its own."
        if recipe.task.name == "reward"
        else "Words with a green background are learnt; the model is given all others and no loss is taken on them.",
        {"model": recipe.model.path, "data": ", ".join(weights_of(recipe.data.train)), **facts},
    )
    blocks = []
    for place, pieces in found.examples:
        inner = Markup("").join(
            Markup("<mark>{}</mark>").format(piece.text) if piece.learnt else Markup("{}").format(piece.text)
            for piece in pieces
        )
        blocks.append(details(place, Markup("<pre>{}</pre>").format(inner)))
    page.section("Examples", *blocks)
    write_text(path, page.html())
