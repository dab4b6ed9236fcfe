"""`pip install pica-peft` is enough for `import pica`; the commands ask for the extra `cli` in one sentence."""

import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import pica

ROOT = Path(__file__).parents[1]

LIBRARY = """
import peft, torch
from transformers import LlamaConfig, LlamaForCausalLM
import pica
config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
LlamaForCausalLM(config).save_pretrained("base")
base = LlamaForCausalLM.from_pretrained("base")
model = peft.get_peft_model(base, pica.PicaConfig(r=4))
tokens = torch.arange(8)[None]
model(input_ids=tokens, labels=tokens).loss.backward()
torch.optim.SGD(model.parameters(), lr=1.0).step()
model.save_pretrained("adapter")
found = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "adapter")
torch.testing.assert_close(found(input_ids=tokens).logits, model(input_ids=tokens).logits)
assert pica.verify("adapter", "base").ok
pica.export_lora("adapter", "lora", base_model="base")
lora = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained("base"), "lora")
torch.testing.assert_close(lora(input_ids=tokens).logits, model(input_ids=tokens).logits, atol=1e-4, rtol=1e-4)
for name in pica.__all__:
    getattr(pica, name)
"""


def needed(*names: str) -> set[str]:
    """These distributions and all that they require, without extras."""
    found, rest = set(), [Requirement(name) for name in names]
    while rest:
        requirement = rest.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name.lower().replace("_", "-")
        if name not in found:
            try:
                rest += map(Requirement, metadata.requires(name) or [])
            except metadata.PackageNotFoundError:  # a platform's own, such as the CUDA packages of another build
                continue
            found.add(name)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment variables of a Python that has what `pip install pica-peft` brings, and nothing else."""
    site = tmp_path_factory.mktemp("site")
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name in needed(*core):
        for file in metadata.files(name) or []:
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (site / top).exists():
                (site / top).symlink_to(Path(str(file.locate())).parents[len(file.parts) - 1] / top)
    described = site / "pica_peft-0.dist-info" / "METADATA"
    described.parent.mkdir()
    found = metadata.distribution("pica-peft")
    described.write_text(found.read_text("METADATA") or found.read_text("PKG-INFO") or "")
    path = [str(site), str(Path(pica.__file__).parents[1])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}


def run(code: str, environment: dict[str, str], place: Path) -> subprocess.CompletedProcess[str]:
    """Run code where only the environment's own path is searched."""
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, env=environment, cwd=place, capture_output=True, text=True, timeout=300)


def test_the_library_works_without_the_commands_packages(alone: dict[str, str], tmp_path: Path):
    found = run(LIBRARY, alone, tmp_path)
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("command", ["train", "verify", "compare"])
def test_a_command_says_what_to_install(alone: dict[str, str], tmp_path: Path, command: str):
    found = run(
        f"import sys, _pica_entry\nsys.argv = ['pica', {command!r}]\nsys.exit(_pica_entry.main())", alone, tmp_path
    )
    assert found.returncode == 2
    assert found.stderr.startswith(f"pica: error: pica {command} needs ")
    assert found.stderr.endswith("; install with: pip install 'pica-peft[cli]'\n")
    assert "jsonargparse" in found.stderr
    assert "torch" not in found.stderr
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["env"]])
def test_help_and_env_need_nothing_more(alone: dict[str, str], tmp_path: Path, arguments: list[str]):
    code = f"import sys, _pica_entry\nsys.argv = ['pica', *{arguments!r}]\nsys.exit(_pica_entry.main())"
    found = run(code, alone, tmp_path)
    assert found.returncode == 0, found.stderr
