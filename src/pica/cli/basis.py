"""`pica basis`: make the basis of a base model once, for all adapters on it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pica.cli.options import add_trust, command_parser, positive, whole
from pica.cli.show import show

EPILOG = """examples:
  pica basis ./SmolLM2-135M -o ./basis                                    from a text inside this package
  pica basis ./SmolLM2-135M -o ./basis --data train.jsonl --r 128         from your own
  pica basis ./Llama-3.1-8B -o ./basis --projection principal             the paper's, to load without a decomposition
  pica train my.yaml --adapter.projection activation --adapter.basis_from ./basis

activation: the directions in which a layer's inputs have most of their energy. weighted: those of the weight, on these.
gradient: those of the first gradient of the loss on the text (`pica train` takes its training problems' own loss), turned
alike over the layers of a role. None of them can be computed from the weights again, so an adapter names its basis by the
digest of the file. Wide layers and large models are read several times, within 2 GiB beside the model.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = command_parser(
        "basis",
        "Make a basis for a base model: a folder that every adapter on it may share, and names in basis_from.",
        EPILOG,
    )
    made.add_argument("model", metavar="MODEL", help="a model folder, a hub name, or embedded")
    made.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="folder to write")
    made.add_argument(
        "--projection",
        choices=("activation", "weighted", "gradient", "principal", "minor", "random"),
        default="activation",
        metavar="WHICH",
        help="activation (default), weighted, gradient, principal, minor or random",
    )
    made.add_argument("--r", type=positive, default=256, metavar="R", help="directions a layer (default: 256)")
    made.add_argument(
        "--data",
        default="embedded",
        metavar="FILE",
        help="what is read: a .txt with an empty line between texts, a .jsonl or other file of rows, a folder, hub:NAME "
        "(default: embedded, a text inside this package)",
    )
    made.add_argument("--tokens", type=positive, default=16_384, metavar="N", help="about how many (default: 16384)")
    made.add_argument("--length", type=positive, default=512, metavar="N", help="longest sequence (default: 512)")
    made.add_argument("--seed", type=whole, default=0, help="of the order, and of random directions (default: 0)")
    made.add_argument("--target-modules", nargs="+", metavar="NAME", help="layers (default: the family's)")
    made.add_argument("--exclude-modules", nargs="+", metavar="NAME", help="layers to leave out")
    made.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the model while it reads (default: auto, its files')",
    )
    made.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a model on the hub")
    made.add_argument("--overwrite", action="store_true", help="replace a basis that is there")
    add_trust(made)
    return made


def run(arguments: Sequence[str]) -> int:
    """Parse, make the basis and say what it is."""
    given = parser().parse_args(arguments)

    from pica.cli.console import loading

    with loading() as shown:
        from pica.basis.file import short
        from pica.experiments.basis.making import Request, make
    fields = vars(given)
    output, overwrite = fields.pop("output").expanduser(), fields.pop("overwrite")
    request = Request(**fields)
    with shown.console.status("Making the basis"):
        found = make(request, output, overwrite=overwrite)
    read = found.about.calibration
    source = f" from {read['tokens']:,} tokens of {read['source']}" if read else ""
    show(
        f"{output}: {found.about.projection} directions of {len(found.layers)} layers, up to {found.about.rank} each"
        f"{source}; {found.path.stat().st_size / 2**20:.1f} MiB, {short(found.digest)}"
    )
    show(f"Use it: pica train RECIPE --adapter.projection {found.about.projection} --adapter.basis_from {output}")
    return 0
