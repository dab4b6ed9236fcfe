"""vLLM with many resident adapters: memory and processor time, plain LoRA beside the shared basis of PICA_VLLM_NATIVE.

    python -m benchmarks.vllm_many --environment /tmp/venv-vllm [--model FOLDER] [--most 256] [--quick]

The environment is that of tools/check_vllm.py. Each method gets a vLLM of its own, with as many slots as there are adapters.
For each N, N requests, each with an adapter of its own, are answered at once, 8 tokens of prompt and 16 more. Memory is that
of all processes of vLLM over what the same vLLM takes without adapters. Time is processor time of all of its processes for a
token, since that hardly depends on what else the machine does; one thread computes. The adapters have random matrices, of
the shapes that trained ones have.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch  # the rest of what this file needs is imported where vLLM's environment does not get
from safetensors.torch import load_file, save_file

COUNTS = [1, 16, 64, 256]
LORA_LIMIT = 64  # adapters of rank 32: beyond it they take more memory than the machine has to spare
MODULES = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
PROMPT, NEW, RANK = 8, 16, 32


def child(job: dict[str, Any]) -> int:
    """In vLLM's environment: start, load, answer, and print what it took."""
    import psutil
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    folders, counts = job["folders"], job["counts"]
    options = {"max_loras": len(folders), "max_lora_rank": job["rank"], "lora_target_modules": MODULES}
    engine = LLM(
        job["model"],
        dtype=job["dtype"],
        max_model_len=64,
        max_num_seqs=counts[-1],
        enforce_eager=True,
        enable_prefix_caching=False,
        **({"enable_lora": True, **options} if folders else {}),
    )
    sampling = SamplingParams(max_tokens=NEW, min_tokens=NEW, temperature=0)
    prompts = [{"prompt_token_ids": [10 + (7 * i + j) % 700 for j in range(PROMPT)]} for i in range(counts[-1])]
    requests = [LoRARequest(f"a{i}", i + 1, path) for i, path in enumerate(folders)]

    def processes() -> list[Any]:
        own = psutil.Process()
        return [own, *own.children(recursive=True)]

    def seconds() -> float:
        return sum(sum(p.cpu_times()[:2]) for p in processes())

    def memory() -> float:
        return sum(p.memory_full_info().uss for p in processes()) / 2**20

    def answer(n: int) -> list[list[int]]:
        done = engine.generate(prompts[:n], sampling, use_tqdm=False, lora_request=requests[:n] or None)
        return [list(each.outputs[0].token_ids) for each in done]

    engine.generate(prompts[:1], sampling, use_tqdm=False)  # whatever is made on first use
    found: dict[str, Any] = {"empty_mib": memory(), "counts": {}}
    for n in counts:
        tokens = answer(n)  # loads them
        begun = seconds()
        for _ in range(job["repetitions"]):
            answer(n)
        taken = (seconds() - begun) / (job["repetitions"] * n * NEW)
        found["counts"][n] = {"seconds": taken, "mib": memory(), "tokens": tokens}
        Path(job["output"]).write_text(json.dumps(found))  # what there is, if a later one fails
    return 0


def run(
    python: Path, work: Path, model: str, dtype: str, folders: list[str], rank: int, counts: list[int], *, native: bool
) -> Any:
    """Start the child and read what it found."""
    output = work / "found.json"
    job = {"model": model, "dtype": dtype, "folders": folders, "counts": counts, "rank": rank, "repetitions": 2}
    job["output"] = str(output)
    variables = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    variables |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING"}
    variables |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    variables.pop("PYTHONPATH", None)
    if native:
        variables |= {"PICA_VLLM_ADAPTERS": str(work), "PICA_VLLM_NATIVE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
    command = [python, "-m", "benchmarks.vllm_many", "--child", json.dumps(job)]
    with open(work / "log", "a") as log:
        subprocess.run(command, check=True, env=variables, stdout=log, stderr=log, cwd=Path(__file__).parents[1])
    found = json.loads(output.read_text())
    return found | {"counts": {int(n): each for n, each in found["counts"].items()}}


def adapters(work: Path, model: str, count: int) -> dict[str, list[str]]:
    """Folders of N adapters for each method: the same updates as PiCa and as plain LoRA, and others of rank 1."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    import pica
    from pica.adapters.integrations.compact import BASES, compact

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    adapted = get_peft_model(base, pica.PicaConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    first = work / "first"
    pica.export_lora(adapted, first, engine="vllm", check=False, base_model_name=model)
    tensors = load_file(first / "adapter_model.safetensors")
    config = json.loads((first / "adapter_config.json").read_text())
    made: dict[str, list[str]] = {"PiCa r=32, shared": [], "LoRA r=32": [], "LoRA r=1": []}
    for index in range(count):
        generator = torch.Generator().manual_seed(index)
        matrices: dict[str, torch.Tensor] = {}

        def matrix(name: str, like: torch.Tensor, own: dict[str, torch.Tensor] = matrices, g: Any = generator) -> Any:
            role = "".join("*" if part.isdigit() else part for part in name.split("."))
            if role not in own:
                own[role] = (0.002 * torch.randn(like.shape, generator=g)).to(like.dtype)
            return own[role].clone()

        whole = {name: matrix(name, t) if ".lora_B." in name else t for name, t in tensors.items()}
        small = {name: (t[:, :1] if ".lora_B." in name else t[:1]).contiguous().clone() for name, t in whole.items()}
        for method, values, rank in (
            ("PiCa r=32, shared", whole, RANK),
            ("LoRA r=32", whole, RANK),
            ("LoRA r=1", small, 1),
        ):
            if method == "LoRA r=32" and index >= LORA_LIMIT:
                continue
            folder = work / method.replace(" ", "-") / f"{index}"
            folder.mkdir(parents=True)
            save_file(values, folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text(json.dumps({**config, "r": rank, "lora_alpha": rank}))
            if method.startswith("PiCa"):
                compact(folder, folder.parent / BASES)
            made[method].append(str(folder))
    return made


def main(argv: list[str] | None = None) -> int:
    from benchmarks.harness import describe_machine, save, table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, required=True, help="of tools/check_vllm.py")
    parser.add_argument("--model", default=str(Path.home() / ".cache/pica-models/smollm2-135m"), help="folder")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of vLLM (%(default)s)")
    parser.add_argument("--most", type=int, default=COUNTS[-1], help="adapters at most (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="up to 16 adapters")
    parser.add_argument("--name", default="vllm_many", help="of the result files")
    given = parser.parse_args(argv)
    counts = [n for n in COUNTS if n <= (16 if given.quick else given.most)]
    python, result = given.environment / "bin" / "python", describe_machine()
    rows: list[list[Any]] = []
    sizes: list[list[Any]] = []
    work = Path(tempfile.mkdtemp())
    try:
        made = adapters(work, given.model, counts[-1])
        base = run(python, work, given.model, given.dtype, [], 0, counts, native=False)
        reference: dict[int, Any] = {}
        for method, rank in (("LoRA r=32", RANK), ("PiCa r=32, shared", RANK), ("LoRA r=1", 1)):
            folders = made[method]
            held = [n for n in counts if n <= len(folders)]
            found = run(python, work, given.model, given.dtype, folders, rank, held, native="shared" in method)
            found["empty_mib"] -= base["empty_mib"]
            for n, each in found["counts"].items():
                tokens, same = each.pop("tokens"), "–"
                if method == "LoRA r=32":
                    reference[n] = tokens
                elif rank == RANK and n in reference:
                    pairs = [(a, b) for one, other in zip(tokens, reference[n]) for a, b in zip(one, other)]
                    each["same_tokens"] = sum(a == b for a, b in pairs) / len(pairs)
                    same = f"{each['same_tokens']:.1%}"
                each["mib"] -= base["counts"][n]["mib"]
                each["time_over_base"] = each["seconds"] / base["counts"][n]["seconds"]
                rows.append([method, len(folders), n, f"{each['mib']:.0f}", f"{each['time_over_base']:.2f}", same])
            found["mib_an_adapter"] = found["counts"][held[-1]]["mib"] / len(folders)
            sizes.append([method, len(folders), f"{found['empty_mib']:.0f}", f"{found['mib_an_adapter']:.2f}"])
            result[method] = found
            print(*rows[-len(held) :], sizes[-1], sep="\n", flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    for each in base["counts"].values():
        each.pop("tokens")
    result["base"] = base
    markdown = f"{Path(given.model).name}, {given.dtype}, vLLM on a CPU, one thread. "
    markdown += "N requests at once, each with its own adapter; memory over that of vLLM without adapters.\n\n"
    header = ["method", "slots", "N", "memory, MiB", "processor time / base model's", "tokens as LoRA r=32's"]
    markdown += table(header, rows)
    markdown += "\nAn adapter more.\n\n"
    markdown += table(["method", "slots", "memory with none in use, MiB", "with all, MiB an adapter"], sizes)
    save(given.name, result, markdown)
    print(markdown)
    return 0


if __name__ == "__main__":
    sys.exit(child(json.loads(sys.argv[2])) if sys.argv[1:2] == ["--child"] else main())
