"""`pica verify`: is an adapter whole, and does it belong to this base model?"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pica.cli.options import add_trust, command_parser
from pica.cli.show import show_rows

EPILOG = """examples:
  pica verify pica-arithmetic-tiny
  pica verify out/adapter --base ./SmolLM2-135M

Exit status: 0 if every check that was made passed, 1 if one failed.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = command_parser(
        "verify",
        "Check an adapter folder: readable, finite, complete; with its base model also: right shapes, "
        "trained on this base, has an effect.",
        EPILOG,
    )
    made.add_argument("adapter", metavar="ADAPTER", type=Path, help="an adapter folder, or the output of pica train")
    made.add_argument(
        "--base", "--base-model", metavar="MODEL", help="base model, if not the one that the adapter records"
    )
    add_trust(made)
    made.add_argument("--files-only", action="store_true", help="do not load a base model")
    return made


def run(arguments: Sequence[str]) -> int:
    """Parse, check and print the table."""
    given = parser().parse_args(arguments)

    from pica.cli.console import loading

    with loading() as shown:
        import pica
        from pica.adapters.verify import verify
        from pica.experiments.evaluate.assessing import find_adapter
        from pica.experiments.models import base_of, locate

        pica.register()
    path = given.adapter.expanduser()
    adapter = find_adapter(path) or path
    base = None
    if not given.files_only and (adapter / "adapter_config.json").is_file():
        base = locate(base_of(adapter, given.base))
    with shown.console.status("Checking"):
        report = verify(adapter, base, trust_remote_code=given.trust_remote_code)
    show_rows(report.rows())
    return 0 if report.ok else 1
