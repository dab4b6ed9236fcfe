"""Train a PiCa adapter with the real axolotl, from a YAML file alone, and look at what it saved.

    python tools/check_axolotl.py [--environment /tmp/venv-axolotl] [--model FOLDER]

Makes an environment from the package registry unless it is there. axolotl pins an older PEFT than pica needs, and
packages that need a GPU, so its requirements are taken with that PEFT and without those. Exits with status 1 where training
fails, the loss does not fall, or the adapter is not one that `pica.verify` accepts for the base model.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).parents[1]
TINY = PROJECT / "src/pica/assets/tiny-llama"
PACKAGE, TORCH, PEFT = "axolotl==0.19.0", "torch==2.13.0", "peft==0.21.2"
# of its requirements: what needs a GPU, what only serves or stores elsewhere, and what is chosen here
LEFT_OUT = {
    *("torch", "peft", "xformers", "liger-kernel", "fla-core", "flash-linear-attention", "torchao"),
    *("gradio", "modal", "adlfs", "ocifs", "lm-eval", "openenv-core", "nvidia-ml-py"),
}
STEPS = 12
SETTINGS = f"""
plugins: [pica.adapters.integrations.axolotl.PicaPlugin]
adapter: pica
lora_r: 16
lora_target_linear: true
pica: {{share: role}}
sequence_len: 64
micro_batch_size: 4
gradient_accumulation_steps: 1
max_steps: {STEPS}
learning_rate: 0.01
lr_scheduler: constant
optimizer: adamw_torch
logging_steps: 1
save_strategy: "no"
bf16: false
fp16: false
tf32: false
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, help="virtual environment to use, or to make where there is none")
    parser.add_argument(
        "--model", type=Path, default=TINY, help="folder of a base model (default: the one in the package)"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        python = environment(given.environment or place / "venv")
        rows = [
            {"text": f"{a} plus {b} is {a + b}, and {b} plus {a} is {a + b} too."} for a in range(8) for b in range(8)
        ]
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = place / "settings.yaml"
        data = f"datasets: [{{path: {place / 'rows.jsonl'}, ds_type: json, type: completion}}]\n"
        named = f"base_model: {given.model.absolute()}\noutput_dir: {place / 'out'}\n"
        named += f"dataset_prepared_path: {place / 'ready'}\n"
        settings.write_text(named + data + SETTINGS)
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": ""}
        variables.pop("PYTHONPATH", None)
        command = [python, "-m", "axolotl.cli.train", settings]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=place)
        losses = [float(x) for x in re.findall(r"'loss': '?([\d.]+)", done.stdout + done.stderr)]
        if done.returncode or len(losses) < STEPS:
            print(done.stdout[-3000:], done.stderr[-6000:], sep="\n")
            return 1
        method = json.loads((place / "out" / "adapter_config.json").read_text())["peft_type"]
        code = "import sys, pica; found = pica.verify(*sys.argv[1:]); print(found); sys.exit(not found.ok)"
        verify = [python, "-c", code, place / "out", given.model.absolute()]
        checked = subprocess.run(verify, env=variables, capture_output=True, text=True)
        print(f"{method}, loss {losses[0]} before and {losses[-1]} after {STEPS} steps")
        print(checked.stdout, checked.stderr, sep="")
        return 0 if checked.returncode == 0 and losses[-1] < 0.9 * losses[0] and method == "PICA" else 1


def environment(folder: Path) -> Path:
    """The python of an environment with axolotl and this project; made where it is not there."""
    python = folder / "bin" / "python"
    if python.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, TORCH], check=True)
    subprocess.run([*pip, "--no-deps", PACKAGE, "torchao==0.17.0"], check=True)
    code = "import sys; from importlib.metadata import requires; print(*requires(sys.argv[1]), sep='\\n')"
    listed = subprocess.run(
        [python, "-c", code, PACKAGE.partition("==")[0]], check=True, capture_output=True, text=True
    )
    names = [(re.split(r"[^\w-]", line)[0].replace("_", "-").lower(), line) for line in listed.stdout.splitlines()]
    wanted = [line for name, line in names if "extra ==" not in line and name not in LEFT_OUT]
    constraint = folder / "constraint.txt"
    constraint.write_text(f"{TORCH}\n")
    subprocess.run([*pip, "-c", constraint, PEFT, *wanted], check=True)
    subprocess.run([*pip, "-c", constraint, "-e", PROJECT], check=True)
    return python


if __name__ == "__main__":
    sys.exit(main())
