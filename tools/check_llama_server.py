"""Serve two exported adapters at once with llama.cpp's server, over HTTP, and hold every token against PEFT.

    python tools/check_llama_server.py [--model ./smollm2-135m] [--environment /tmp/venv-llama] [--output result.json]

Makes an environment with the package xllamacpp, which brings llama.cpp's server, unless it is there; trains adapters,
writes base model and adapters as GGUF, and asks for completions with each adapter, with none, and with all of that at the
same time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from check_llama_cpp import write_base
from check_vllm import NEW_TOKENS, PROMPTS, TINY, Place

PACKAGE = "xllamacpp"
NAMES = ("alice", "bob")


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        return run_server(json.loads(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=TINY, help="folder of a base model (default: the one in the package)"
    )
    parser.add_argument("--environment", type=Path, help="virtual environment to use, or to make where there is none")
    parser.add_argument("--work", type=Path, help="folder for adapters and logs (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        python = environment(given.environment or Path(folder) / "venv")
        place = Place((given.work or Path(folder) / "work").absolute(), given.model.absolute())
        place.prepare()
        rows, version = check(place, python)
    for row in rows:
        print(f"{'ok    ' if row['ok'] else 'FAILED'}  {row['check']}: {row['found']}")
    if given.output:
        result = {
            "what": "llama.cpp's server with exported PiCa adapters, against PEFT's greedy decoding in float32",
            "machine": {"processor": platform.machine(), "python": platform.python_version()},
            "versions": {PACKAGE: version},
            "model": given.model.name,
            "new_tokens": NEW_TOKENS,
            "results": rows,
        }
        given.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


def environment(folder: Path) -> Path:
    """The python of an environment with llama.cpp's server; made where it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", PACKAGE], check=True)
    return python


def check(place: Place, python: Path) -> tuple[list[dict[str, Any]], str]:
    """Write the files, start the server, ask."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import pica

    model: Any = AutoModelForCausalLM.from_pretrained(place.model, dtype=torch.float32)
    tokenizer: Any = AutoTokenizer.from_pretrained(place.model)
    base = place.folder / "base.gguf"
    write_base(model, base, "f32", place.model)
    exports = []
    for name in NAMES:
        target = place.folder / f"{name}-gguf"
        pica.export_lora(place.made / name, target, model, engine="llama.cpp", dtype="float32", overwrite=True)
        exports.append(str(target / "adapter.gguf"))
    job = json.dumps({"base": str(base), "adapters": exports})
    environment = {**os.environ}
    environment.pop("PYTHONPATH", None)
    rows = []
    with (
        open(place.folder / "llama-server.log", "w") as log,
        subprocess.Popen(
            [python, __file__, "--child", job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        ) as server,
    ):
        assert server.stdout is not None
        assert server.stdin is not None
        line = server.stdout.readline()
        if not line:
            raise SystemExit(f"the server did not start; see {log.name} (keep it with --work)")
        started = json.loads(line)

        def ask(each: tuple[str, str]) -> list[int]:
            name, prompt = each
            body = {
                "prompt": tokenizer(prompt).input_ids,
                "n_predict": NEW_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
            }
            scales = [{"id": index, "scale": float(name == other)} for index, other in enumerate(NAMES)]
            body |= {"lora": scales, "return_tokens": True, "cache_prompt": False}
            head = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{started['address']}/completion", json.dumps(body).encode(), head)
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.load(answer)["tokens"]

        everything = [(name, prompt) for prompt in PROMPTS for name in ("base", *NAMES)]
        for name in ("base", *NAMES):
            rows.append(_row(place, name, [(n, p) for n, p in everything if n == name], ask))
        with ThreadPoolExecutor(len(everything)) as pool:
            rows.append(_row(place, "base and both adapters at once", everything, ask, pool))
        server.stdin.close()  # which ends it
    return rows, started["version"]


def _row(place: Place, what: str, asked: list[tuple[str, str]], ask: Any, pool: Any = None) -> dict[str, Any]:
    answers = list((pool.map if pool else map)(ask, asked))
    same = sum(answer == place.expected[name][prompt] for (name, prompt), answer in zip(asked, answers))
    found = f"{same} of {len(asked)} answers have PEFT's {NEW_TOKENS} tokens"
    return {"check": what, "ok": same == len(asked), "found": found}


def run_server(job: dict[str, Any]) -> int:
    """In the environment of xllamacpp: serve until standard input ends."""
    from importlib.metadata import version

    import xllamacpp  # pyright: ignore[reportMissingImports] - in another environment

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    params = xllamacpp.CommonParams()
    params.model.path = job["base"]
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.n_gpu_layers = 2048, 4, 1, 0
    params.hostnames, params.port, params.warmup = ["127.0.0.1"], 0, False
    adapters = []
    for path in job["adapters"]:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = path, 0.0
        adapters.append(adapter)
    params.lora_adapters = adapters
    server = xllamacpp.Server(params)
    print(json.dumps({"address": server.listening_address, "version": version(PACKAGE)}), file=answers, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
