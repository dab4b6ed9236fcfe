"""Options that several commands have."""

import argparse

from pica.foreign_code import FLAG


def add_trust(parser: argparse._ActionsContainer) -> None:
    """Add the option that allows a model's own code; only the command line of this very call can give it."""
    parser.add_argument(
        FLAG, action="store_true", help="run Python code that comes with the base model; only for authors you trust"
    )
