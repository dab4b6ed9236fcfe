"""Give exported adapters to the very loaders of vLLM and SGLang, without the engines, which need a GPU and gigabytes.

    pip download --no-deps vllm sglang -d wheels
    python tools/check_engine_loaders.py wheels/*.whl

Only the modules that read an adapter are taken from a wheel; whatever else they import is replaced by a stand-in. vLLM:
`PEFTHelper.from_local_dir` and `validate_legal`, then `LoRAModel.from_local_checkpoint`, whose factors are compared
with the PiCa updates. SGLang: `LoRAConfig` and `LoRAAdapter`, which stack q/k/v and gate/up. Prints what ran and writes
JSON; exits with status 1 where a loader refuses an export or reads something else than it should.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.abc
import importlib.util
import json
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import pica
from pica.adapters.export.lora import LoraExport, export_lora
from pica.tuners.pica.layer import PicaLinear

REAL = {
    "vllm": ("vllm.lora.peft_helper", "vllm.lora.lora_model", "vllm.lora.lora_weights", "vllm.lora.utils"),
    "sglang": (
        "sglang.srt.lora.lora",
        "sglang.srt.lora.lora_config",
        "sglang.srt.lora.utils",
        "sglang.srt.layers.utils",
        "sglang.srt.layers.utils.common",
    ),
}
STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class WheelFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the modules of `REAL` from a wheel, and everything else of that package as a stand-in."""

    def __init__(self, package: str, wheel: Path) -> None:
        self.package = package
        self.archive = zipfile.ZipFile(wheel)
        self.names = set(self.archive.namelist())

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != self.package:
            return None
        package = fullname not in REAL[self.package] or f"{fullname.replace('.', '/')}/__init__.py" in self.names
        return importlib.util.spec_from_loader(fullname, self, is_package=package)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return ModuleType(spec.name) if spec.name in REAL[self.package] else _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ in REAL[self.package]:
            source = self._source(module.__name__)
            exec(compile(source, module.__name__, "exec"), module.__dict__)

    def _source(self, name: str) -> str:
        stem = name.replace(".", "/")
        return self.archive.read(f"{stem}.py" if f"{stem}.py" in self.names else f"{stem}/__init__.py").decode()


class _StandIn(ModuleType):
    """A module that has whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


def trained(targets: Sequence[str], rank: int) -> PeftModel:
    """A small Llama with a PiCa adapter whose matrices are not zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    settings = pica.PicaConfig(r=rank, target_modules=list(targets), init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config).eval(), settings)
    assert isinstance(model, PeftModel)
    return model


def updates(model: PeftModel) -> dict[str, torch.Tensor]:
    """{path: dW} of the PiCa layers."""
    return {m.path: m.get_delta_weight("default") for m in model.modules() if isinstance(m, PicaLinear)}


def check_vllm(folder: Path) -> list[dict[str, Any]]:
    """Exports through vLLM's configuration check and tensor loader."""
    peft_helper = importlib.import_module("vllm.lora.peft_helper")
    lora_model: Any = importlib.import_module("vllm.lora.lora_model")
    lora_model.PIN_MEMORY = False  # there is no device to pin it for
    expected = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    results = []
    for targets, rank, limit, dtype in (
        (("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"), 20, None, None),
        (("q_proj", "v_proj"), 32, 10, None),
        (("down_proj",), 3, None, "float16"),
    ):
        model = trained(targets, rank)
        done = export_lora(model, folder / f"vllm-{rank}", engine="vllm", rank=limit, dtype=dtype)
        helper = peft_helper.PEFTHelper.from_local_dir(str(done.folder), max_position_embeddings=None)
        helper.validate_legal(SimpleNamespace(max_lora_rank=done.plan.rank))
        refused = _refuses(helper, done.plan.rank)
        loaded = lora_model.LoRAModel.from_local_checkpoint(
            str(done.folder), expected, helper, lora_model_id=1, device="cpu", dtype=done.plan.dtype
        )
        worst = 0.0
        for path, wanted in updates(model).items():
            weights = loaded.loras[path]
            found = helper.vllm_lora_scaling_factor * weights.lora_b.float() @ weights.lora_a.float()
            worst = max(worst, float((found - wanted).norm() / wanted.norm()))
        known = max(row.relative for row in done.plan.rows)
        ok = len(loaded.loras) == len(updates(model)) and worst <= known + 0.01 and refused
        results.append(_result("vllm", done, targets, ok, worst=worst, known=known))
    return results


def _refuses(helper: Any, rank: int) -> bool:
    """Whether the check refuses a rank that is too large; else its silence above would mean nothing."""
    try:
        helper.validate_legal(SimpleNamespace(max_lora_rank=rank - 1))
    except ValueError:
        return True
    return False


def check_sglang(folder: Path) -> list[dict[str, Any]]:
    """Exports through SGLang's adapter class, which stacks siblings when it reads them."""
    lora_config = importlib.import_module("sglang.srt.lora.lora_config")
    lora = importlib.import_module("sglang.srt.lora.lora")
    hidden = SimpleNamespace(num_hidden_layers=3, architectures=["LlamaForCausalLM"], model_type="llama")
    results = []
    for targets in (("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"), ("q_proj",), ("v_proj", "gate_proj")):
        model = trained(targets, 12)
        name = "-".join(targets)
        done = export_lora(model, folder / f"sglang-{name}", engine="sglang")
        config = lora_config.LoRAConfig(path=str(done.folder))
        adapter = lora.LoRAAdapter("a", config, hidden, None, None)
        adapter.initialize_weights_from_tensors(load_file(done.folder / "adapter_model.safetensors"))
        wanted = updates(model)
        worst = 0.0
        for index, layer in enumerate(adapter.layers):
            for path, update in wanted.items():
                if f".{index}." in path:
                    found = adapter.scaling * _unstacked(layer.weights, path, done.plan.rank, model)
                    worst = max(worst, float((found - update).norm() / update.norm()))
        results.append(_result("sglang", done, targets, worst <= 0.01, worst=worst, filled=len(done.plan.filled)))
    bare = export_lora(trained(("q_proj",), 12), folder / "bare", dtype="bfloat16")
    adapter = lora.LoRAAdapter("b", lora_config.LoRAConfig(path=str(bare.folder)), hidden, None, None)
    try:
        adapter.initialize_weights_from_tensors(load_file(bare.folder / "adapter_model.safetensors"))
    except KeyError as error:
        print(f"sglang: without siblings it stops with KeyError {error}, as expected")
    else:
        print("sglang: it reads q_proj without v_proj now, so its rule in engines.py can be relaxed")
    return results


def _unstacked(weights: dict[str, torch.Tensor], path: str, rank: int, model: PeftModel) -> torch.Tensor:
    """dW of one projection out of SGLang's stacked factors: A's by rank, B's by width."""
    parent, _, name = path.rpartition(".")
    stack = next((k for k, members in STACKED.items() if name in members), name)
    members = STACKED.get(stack, (name,))
    a, b = (weights[f"base_model.model.{parent}.{stack}.lora_{factor}.weight"].float() for factor in "AB")
    position = members.index(name)
    widths = [model.get_base_model().get_submodule(f"{parent}.{m}").out_features for m in members]
    start = sum(int(w) for w in widths[:position])  # pyright: ignore[reportArgumentType]
    return b[start : start + int(widths[position])] @ a[rank * position : rank * (position + 1)]  # pyright: ignore[reportArgumentType]


def _result(engine: str, done: LoraExport, targets: Sequence[str], ok: bool, **numbers: Any) -> dict[str, Any]:
    dtype = str(done.plan.dtype).removeprefix("torch.")
    return {"engine": engine, "targets": list(targets), "rank": done.plan.rank, "dtype": dtype, **numbers, "ok": ok}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="+", type=Path, help="wheels of vllm and sglang")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    given = parser.parse_args()
    versions, results = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for wheel in given.wheels:
            package, version = wheel.name.split("-")[:2]
            versions[package] = version
            sys.meta_path.insert(0, WheelFinder(package, wheel))
            results += {"vllm": check_vllm, "sglang": check_sglang}[package](Path(folder))
    for row in results:
        print(" ".join(f"{k}={v:.2e}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))
    if given.output:
        report = {
            "what": "exports read by the adapter loaders of vLLM and SGLang, taken from their wheels, on the CPU",
            "versions": {**versions, "torch": torch.__version__},
            "results": results,
        }
        given.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(row["ok"] for row in results) else 1


if __name__ == "__main__":
    sys.exit(main())
