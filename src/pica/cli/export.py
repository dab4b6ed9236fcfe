"""`pica export`: a PiCa adapter as a LoRA that serving engines load."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pica.cli.options import add_trust, command_parser, whole
from pica.cli.show import show

EPILOG = """examples:
  pica export pica-arithmetic-tiny -o lora                       exact: same outputs, no pica needed
  pica export out/adapter -o lora --for vllm                     a rank and precision that vLLM serves
  pica export out/adapter -o lora --energy 0.99 --for lorax      smaller, with the error known beforehand
  pica export out/adapter -o lora --for llama.cpp                writes adapter.gguf too

The result is reloaded with plain PEFT and compared before it appears.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = command_parser(
        "export",
        "Write a PiCa adapter as a plain PEFT LoRA folder: exact, or the best of a smaller rank.",
        EPILOG,
    )
    made.add_argument("adapter", metavar="ADAPTER", type=Path, help="an adapter folder, or the output of pica train")
    made.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="folder to write")
    made.add_argument(
        "--base", "--base-model", metavar="MODEL", help="base model, if not the one that the adapter records"
    )
    size = made.add_mutually_exclusive_group()
    size.add_argument("--rank", type=whole, metavar="K", help="truncate to the best LoRA of rank K")
    size.add_argument(
        "--energy", type=float, metavar="E", help="truncate, keeping this share of each update, e.g. 0.99"
    )
    made.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="precision (default: the base model's)"
    )
    made.add_argument(
        "--for",
        dest="engine",
        metavar="ENGINE",
        choices=("vllm", "sglang", "lorax", "llama.cpp", "diffusers", "peft"),
        help="follow the rules of vllm, sglang, lorax, llama.cpp, diffusers or peft, and print how it serves the result",
    )
    made.add_argument("--fill-siblings", action="store_true", help="zero adapters for the rest of q/k/v and gate/up")
    made.add_argument("--base-model-name", metavar="NAME", help="base model to record in the result")
    made.add_argument("--revision", help="branch, tag or commit of the base model, to load and to record")
    add_trust(made)
    made.add_argument("--no-check", action="store_true", help="do not reload and compare")
    made.add_argument("--overwrite", action="store_true", help="replace an adapter in DIR")
    return made


def run(arguments: Sequence[str]) -> int:
    """Parse, export and print the known error, the measured one, and how to serve the result."""
    given = parser().parse_args(arguments)

    from pica.cli.console import loading

    with loading() as shown:
        import pica
        from pica.adapters.export.folder import error_table
        from pica.adapters.export.lora import export_lora
        from pica.adapters.export.plan import ExportPlan
        from pica.experiments.evaluate.assessing import require_adapter
        from pica.experiments.models import base_of, locate
        from pica.files.claims import claimed

        pica.register()
    adapter = require_adapter(given.adapter.expanduser())

    def show_plan(plan: ExportPlan) -> None:
        kind = "exact" if plan.exact else "truncated; error is the Frobenius norm of what each layer loses"
        show(f"LoRA of rank {plan.rank} in {str(plan.dtype).removeprefix('torch.')}, {kind}")
        show(error_table(plan.rows), flush=True)
        if plan.filled:
            show(f"zero adapters for {len(plan.filled)} layers that the engine expects")

    output = given.output.expanduser()
    with shown.console.status("Exporting"), claimed(output):
        done = export_lora(
            adapter,
            output,
            locate(base_of(adapter, given.base)),
            rank=given.rank,
            energy=given.energy,
            dtype=given.dtype,
            engine=given.engine,
            fill_siblings=given.fill_siblings,
            base_model_name=given.base_model_name,
            revision=given.revision,
            check=not given.no_check,
            trust_remote_code=given.trust_remote_code,
            overwrite=given.overwrite,
            on_plan=show_plan,
        )
    if done.check is None:
        show("not checked")
    else:
        show(
            f"checked with plain PEFT in {str(done.check.dtype).removeprefix('torch.')}: max |difference of outputs| "
            f"{done.check.logits:.3g}, where the adapter changes outputs by {done.check.effect:.3g}"
        )
    show(f"LoRA folder: {done.folder} ({done.bytes / 2**20:.1f} MiB, {done.layers} layers)")
    if done.command:
        show(f"serve with:\n  {done.command}")
    return 0
