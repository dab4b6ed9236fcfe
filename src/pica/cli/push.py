"""`pica push`: put an adapter on the hub."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pica.cli.options import command_parser
from pica.cli.show import show

EPILOG = """examples:
  pica push my-style me/my-style --base HuggingFaceTB/SmolLM2-135M-Instruct
  pica push out/adapter me/my-style --public
  pica push my-style me/my-style --dry-run              which files would go

Of a run's folder its adapter is pushed. A new repository is private unless --public is given. Hidden files never go along.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = command_parser(
        "push",
        "Put an adapter and its card on the Hugging Face hub.",
        EPILOG,
    )
    made.add_argument("folder", metavar="DIR", type=Path, help="an adapter folder, or the output of pica train")
    made.add_argument("name", metavar="OWNER/NAME", help="the repository on the hub")
    made.add_argument("--public", action="store_true", help="let anybody read it")
    made.add_argument(
        "--base", metavar="OWNER/NAME", help="what the base model is called on the hub, if it is a folder here"
    )
    made.add_argument(
        "--all",
        dest="everything",
        action="store_true",
        help="also what is no part of an adapter: checkpoints, and a run's numbers, recipe and predictions",
    )
    made.add_argument("--dry-run", action="store_true", help="only say which files would go")
    made.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    return made


def run(arguments: Sequence[str]) -> int:
    """Parse, push and say where."""
    given = parser().parse_args(arguments)

    from pica.cli.console import loading

    with loading() as shown:
        from pica.experiments.sharing import plan_upload, push
    upload = plan_upload(given.folder.expanduser(), given.name, base=given.base, everything=given.everything)
    told = f"{len(upload.files)} files, {upload.size / 1024:,.0f} KiB: {', '.join(sorted(upload.files))}"
    if given.dry_run:
        show(f"Would push {told}")
        return 0
    shown.say(f"Pushing {told}")
    with shown.console.status("Pushing"):
        address, private = push(upload, given.name, public=given.public)
    known = " (it was there already; make it public on its page)" if private and given.public else ""
    show(f"{'Private' if private else 'Public'}: {address}{known}")
    return 0
