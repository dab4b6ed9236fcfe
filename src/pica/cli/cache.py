"""`pica cache`: what the cache of bases takes, and emptying it."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pica.cli.options import command_parser
from pica.cli.show import show

if TYPE_CHECKING:
    from pica.basis.cache import CacheUse

EPILOG = """The cache spares decompositions when a base model is loaded again, and keeps bases that runs made from data. To
empty it costs time, never results: a run has its own copy of a basis that was made from data. Only an adapter that was moved
away from its run without that copy (basis/) would miss it.

  PICA_CACHE_DIR    its folder, set to nothing: off (default: pica in $XDG_CACHE_HOME, or ~/.cache/pica)
  PICA_CACHE_LIMIT  its bound in bytes; the entries not used for longest make room (default: 20 GiB)
  pica COMMAND --no-cache  neither reads nor writes it
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = command_parser(
        "cache",
        "Show what the cache of solved bases, and of bases made from data, takes; or empty it.",
        EPILOG,
    )
    made.add_argument("action", nargs="?", choices=("show", "clear"), default="show", help="default: show")
    return made


def run(arguments: Sequence[str]) -> int:
    """Show the cache, or empty it."""
    given = parser().parse_args(arguments)

    from pica.basis.cache import cache_use, clear_cache

    use = clear_cache() if given.action == "clear" else cache_use()
    if use.folder is None:
        show("The cache is off (--no-cache, or PICA_CACHE_DIR is set to nothing).")
    elif given.action == "clear":
        show(f"Removed {_counted(use)}, from {use.folder}")
    else:
        show(f"{use.folder}: {_counted(use)}; together of at most {use.limit / 2**30:.3g} GiB")
    return 0


def _counted(use: "CacheUse") -> str:
    return (
        f"{use.entries} solved bases, {use.bytes / 2**20:.1f} MiB, and {use.shared_entries} made from data, "
        f"{use.shared_bytes / 2**20:.1f} MiB"
    )
