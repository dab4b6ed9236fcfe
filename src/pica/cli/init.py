"""`pica init`: a commented recipe for one's own model and data, after three questions."""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from pica.cli.options import command_parser
from pica.cli.show import say, show
from pica.errors import ConfigError
from pica.files.output import check_file, write_text

EPILOG = """examples:
  pica init
  pica init --model SmolLM2-135M-Instruct --data chats.jsonl --goal chat
"""

_MODEL = "Which model? A folder or a name on the hub"
_DATA = "Which data? A file, a folder or hub:OWNER/NAME"


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = command_parser(
        "init",
        "Write a commented recipe. What is not given here is asked for.",
        EPILOG,
    )
    made.add_argument("--model", metavar="MODEL", help="the folder of a model, or its name on the hub")
    made.add_argument("--data", metavar="DATA", help="a file, a folder or hub:OWNER/NAME to learn from")
    made.add_argument("--goal", metavar="TASK", help="what is to be learnt: the name of a task, such as chat or math")
    made.add_argument(
        "-o", "--output", metavar="FILE", type=Path, default=Path("recipe.yaml"), help="default: recipe.yaml"
    )
    made.add_argument("--overwrite", action="store_true", help="replace the file")
    return made


def run(arguments: Sequence[str]) -> int:
    """Ask for what was not given, and write the recipe."""
    given = parser().parse_args(arguments)
    output = given.output.expanduser()
    check_file(output, overwrite=given.overwrite)
    if None in (given.model, given.data, given.goal) and not (sys.stdin and sys.stdin.isatty()):
        raise ConfigError("Without a terminal to ask at, pica init needs --model, --data and --goal.")

    from pica.experiments.recipes.starting import GOALS, likely_goal, starting_recipe

    model = given.model or _ask(_MODEL, "embedded")
    data = given.data or _ask(_DATA, "embedded")
    goal = given.goal
    if goal is None:
        for name, meaning in GOALS.items():
            show(f"  {name:<12} {meaning}")
        goal = _ask("What is to be learnt?", likely_goal(data))
    if goal not in GOALS:
        near = get_close_matches(goal, GOALS, n=1)
        raise ConfigError(
            f"There is no goal {goal!r}:{f' did you mean {near[0]!r}?' if near else ''} the goals are {', '.join(GOALS)}."
        )
    write_text(output, starting_recipe(model, data, goal))
    show(f"Wrote {output}")
    show(f"Next: pica train {output}")
    return 0


def _ask(question: str, default: str) -> str:
    """What a person answers, or the default."""
    try:
        answer = input(f"{question} [{default}]: ").strip()
    except EOFError:
        say("No answer; the default is taken.")
        answer = ""
    return answer or default
