"""`pica merge`: model and adapter as one plain model folder."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pica.cli.options import add_trust, command_parser
from pica.cli.show import show

EPILOG = """examples:
  pica merge pica-arithmetic-tiny -o merged
  pica merge out/adapter -o merged --base ./SmolLM2-135M --dtype bfloat16

The result needs neither pica nor peft. The sum is formed in float32 and rounded once.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = command_parser(
        "merge",
        "Add an adapter to its base model and write a plain model folder.",
        EPILOG,
    )
    made.add_argument("adapter", metavar="ADAPTER", type=Path, help="an adapter folder, or the output of pica train")
    made.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="new or empty folder to write")
    made.add_argument(
        "--base", "--base-model", metavar="MODEL", help="base model, if not the one that the adapter records"
    )
    add_trust(made)
    made.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="precision of the result (default: auto, that of the base model's files)",
    )
    return made


def run(arguments: Sequence[str]) -> int:
    """Parse, merge and say where."""
    given = parser().parse_args(arguments)

    from pica.cli.console import loading

    with loading() as shown:
        from pica.experiments.evaluate.assessing import require_adapter
        from pica.experiments.merge.merging import merge
        from pica.files.claims import claimed
    adapter = require_adapter(given.adapter.expanduser())
    output = given.output.expanduser()
    with shown.console.status("Merging"), claimed(output):
        merge(adapter, output, base=given.base, dtype=given.dtype, trust_remote_code=given.trust_remote_code)
    show(f"Merged model: {given.output}")
    return 0
