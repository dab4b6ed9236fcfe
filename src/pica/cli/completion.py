"""`pica completion`: completion of commands, options and recipe fields in a shell."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pica.cli import COMMANDS, command_module
from pica.cli.options import command_parser
from pica.cli.show import show

EPILOG = """to use it:
  bash  pica completion bash > ~/.local/share/bash-completion/completions/pica
  zsh   pica completion zsh > ~/.zfunc/_pica      (with ~/.zfunc in fpath)
  fish  pica completion fish > ~/.config/fish/completions/pica.fish
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = command_parser(
        "completion",
        "Print a script that lets a shell complete commands, options and recipe fields.",
        EPILOG,
    )
    made.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell")
    return made


def run(arguments: Sequence[str]) -> int:
    """Print the script."""
    given = parser().parse_args(arguments)

    import shtab

    show(shtab.complete(whole_parser(), shell=given.shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """One parser of all commands and their options."""
    import shtab

    whole = argparse.ArgumentParser(prog="pica", description="Parameter-efficient fine-tuning.")
    whole.add_argument("--version", action="store_true", help="show the version")
    commands = whole.add_subparsers(dest="command")
    for name, summary in COMMANDS.items():
        options = {"everything": True} if name in ("train", "compare") else {}
        made = command_module(name).parser(**options)
        for action in made._actions:
            if action.type is Path or action.metavar in ("FILE", "RECIPE", "DIR"):
                action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
        commands.add_parser(name, parents=[made], add_help=False, help=summary.replace("%", "%%"))
    return whole
