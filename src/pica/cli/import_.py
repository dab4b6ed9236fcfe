"""`pica import`: an adapter of the authors' reference implementation, in PEFT's format."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pica.cli.options import add_trust, command_parser
from pica.cli.show import show

EPILOG = """examples:
  pica import trained-with-reference -o adapter --base google/gemma-2b
  pica import trained-with-reference -o adapter --base google/gemma-2b --svd-device cuda

The reference stores no basis, and the signs of the one it used depend on the device and library of its training. Import
on the kind of device that trained it, and evaluate the result. Its tensors' file is read without running any code in it.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = command_parser(
        "import",
        "Read pica_adapter.bin and pica_config.json, rebuild the basis, and write a PEFT adapter folder.",
        EPILOG,
    )
    made.add_argument("folder", metavar="DIR", type=Path, help="folder with pica_adapter.bin and pica_config.json")
    made.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="folder to write")
    made.add_argument(
        "--base", metavar="MODEL", help="base model of the training, if not the one that the folder records"
    )
    made.add_argument("--revision", help="branch, tag or commit of the base model")
    add_trust(made)
    made.add_argument(
        "--svd-device", choices=("cpu", "cuda"), help="device that trained it, for its signs (default: the CPU)"
    )
    made.add_argument("--overwrite", action="store_true", help="replace an adapter in OUT")
    return made


def run(arguments: Sequence[str]) -> int:
    """Parse, import and say where."""
    given = parser().parse_args(arguments)

    from pica.cli.console import loading

    with loading() as shown:
        import pica
        from pica.adapters.base_model import load_base_model
        from pica.adapters.reference import import_reference, read_reference
        from pica.experiments.models import locate
        from pica.files.claims import claimed
        from pica.files.folders import check_replaceable, new_folder
        from pica.tuners.pica.config import PicaConfig

        pica.register()
    output = given.output.expanduser()
    with claimed(output):
        check_replaceable(output, overwrite=given.overwrite)
        saved = read_reference(given.folder)
        with shown.console.status("Loading the base model"):
            recorded = PicaConfig(base_model_name_or_path=saved.base_model)
            base = load_base_model(
                locate(given.base) if given.base else None,
                recorded,
                revision=given.revision,
                trust_remote_code=given.trust_remote_code,
            )
        with shown.console.status("Decomposing the weights"):
            model = import_reference(base, given.folder, svd_device=given.svd_device)
        with new_folder(output, overwrite=given.overwrite) as work:
            model.peft_config["default"].inference_mode = True
            model.save_pretrained(str(work))
    show(f"Adapter: {given.output} (rank {saved.rank}, basis included)")
    return 0
