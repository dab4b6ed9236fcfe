"""No command runs code from a model's or adapter's folder unless the user asks for it by name, whatever answers a prompt."""

import ast
import io
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tests.experiments.tiny import write_tiny_llama
from tests.experiments.tiny_diffusion import write_stable_diffusion, write_subject
from transformers import AutoModelForCausalLM

import pica as package
from pica.errors import ConfigError
from pica.files.output import RESOLVED

ROW = {"instruction": "How many?", "input": "", "output": "The answer is 4.", "answer": "4"}
CODE = """
open({trace!r}, "a").write("x")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evilmodel"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


class Payload:
    """What a pickle of it does when it is read without care."""

    def __init__(self, trace: Path) -> None:
        self._trace = str(trace)

    def __reduce__(self):
        return open, (self._trace, "w")


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that foreign code leaves where it has run. Whatever is asked meanwhile is answered by yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 1000))
    return tmp_path / "ran"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    config = package.PicaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for matrix in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(matrix)
    package.save_adapter(model, folder)  # pyright: ignore[reportArgumentType]
    return folder


def change(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def adapter_on(base: Path, adapter: Path, target: Path) -> Path:
    shutil.copytree(adapter, target)
    change(target / "adapter_config.json", base_model_name_or_path=str(base))
    return target


def with_own_model(base: Path, target: Path, trace: Path) -> Path:
    """A model of a type that only its own code knows."""
    shutil.copytree(base, target)
    names = {"AutoConfig": "evil.EvilConfig", "AutoModel": "evil.EvilModel", "AutoModelForCausalLM": "evil.EvilModel"}
    change(target / "config.json", auto_map=names, model_type="evilmodel", architectures=["EvilModel"])
    (target / "evil.py").write_text(CODE.format(trace=str(trace)))
    return target


def with_own_tokenizer(base: Path, target: Path, trace: Path) -> Path:
    """A Llama whose tokenizer, and way to generate, come as code."""
    shutil.copytree(base, target)
    names = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
    change(target / "tokenizer_config.json", auto_map=names, tokenizer_class="EvilTokenizer")
    (target / "evil.py").write_text(CODE.format(trace=str(trace)))
    (target / "custom_generate").mkdir()
    (target / "custom_generate" / "generate.py").write_text(CODE.format(trace=str(trace)))
    return target


def pickled(base: Path, target: Path, trace: Path) -> Path:
    """A model whose weights are a pickle that does something."""
    shutil.copytree(base, target)
    (target / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Payload(trace)}, target / "pytorch_model.bin")
    return target


def commands(base: Path, adapter: Path, work: Path) -> list[list[str]]:
    rows = work / "rows.jsonl"
    rows.write_text(json.dumps(ROW) + "\n")
    data = ["--data.train", rows, "--data.test", rows, "--data.keep_test_problems", "true"]
    short = ["--trainer.max_steps", "1", "--trainer.threads", "1", "--adapter.r", "4", "--task.max_new_tokens", "2"]
    made: list[list[object]] = [
        ["train", "--model.path", base, *data, *short, "--adapter.target_modules", "[q_proj]", "-o", work / "run"],
        ["evaluate", base, "--task", "arithmetic", "--limit", 1, "--max-new-tokens", 1],
        ["evaluate", adapter, "--task", "arithmetic", "--limit", 1, "--max-new-tokens", 1],
        ["verify", adapter],
        ["export", adapter, "-o", work / "lora"],
        ["merge", adapter, "-o", work / "merged"],
        ["import", work / "reference", "-o", work / "imported", "--base", base],
        ["plan", base, "--target-modules", "q_proj"],
        ["analyze", base, "-o", work / "spectra"],
        ["analyze", base, adapter, "-o", work / "analysis"],
    ]
    return [[str(word) for word in command] for command in made]


@pytest.mark.parametrize("kind", [with_own_model, with_own_tokenizer, pickled])
def test_no_command_runs_code_of_a_base_model(
    pica: Callable, tmp_path: Path, trace: Path, base: Path, adapter: Path, kind: Callable
):
    evil = kind(base, tmp_path / "evil", trace)
    reference = tmp_path / "reference"
    reference.mkdir()
    (reference / "pica_config.json").write_text('{"target_modules": ["q_proj"], "rank": 4}')
    torch.save({"q_proj": torch.zeros(32, 4)}, reference / "pica_adapter.bin")
    for command in commands(evil, adapter_on(evil, adapter, tmp_path / "on-evil"), tmp_path):
        outcome = pica(*command)
        assert not trace.exists(), command
        assert outcome.status in (0, 2), (command, outcome.err)
        assert "Traceback" not in outcome.err
        if kind is with_own_model and command[0] != "analyze":  # which knows weights by their names as well
            assert "give --trust-remote-code" in outcome.err, command


def test_the_flag_runs_it_and_a_recipe_beside_the_adapter_does_not(
    pica: Callable, tmp_path: Path, trace: Path, base: Path, adapter: Path
):
    evil = with_own_model(base, tmp_path / "evil", trace)
    run = tmp_path / "run"
    run.mkdir()
    on_evil = adapter_on(evil, adapter, run / "adapter")
    (run / RESOLVED).write_text(f"model: {{path: '{evil}', trust_remote_code: true}}\ntask: {{name: arithmetic}}\n")
    for command in (
        ["verify", on_evil],
        ["evaluate", run],
        ["merge", run, "-o", tmp_path / "m"],
        ["train", "--resume", run],
    ):
        assert "--trust-remote-code" in pica(*command).err
        assert not trace.exists(), command
    outcome = pica("verify", on_evil, "--trust-remote-code")
    assert outcome.status == 0, outcome.err + outcome.out
    assert trace.exists()


def test_pickled_adapters_and_what_their_configurations_name(
    pica: Callable, tmp_path: Path, trace: Path, base: Path, adapter: Path
):
    evil = adapter_on(base, adapter, tmp_path / "pickled")
    (evil / "adapter_model.safetensors").unlink()
    (evil / "adapter_model.bin").write_bytes(pickle.dumps({"weight": Payload(trace)}))
    tokenizer = with_own_tokenizer(base, tmp_path / "tokenizer", trace)
    prompt = PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, prompt_tuning_init="TEXT", prompt_tuning_init_text="a",
        tokenizer_name_or_path=str(base), base_model_name_or_path=str(base),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, prompt).save_pretrained(str(tmp_path / "prompt"))
    change(tmp_path / "prompt" / "adapter_config.json", tokenizer_name_or_path=str(tokenizer), inference_mode=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        str(tmp_path / "megatron")
    )
    change(tmp_path / "megatron" / "adapter_config.json", megatron_config={"a": 1}, megatron_core="this")
    for folder in (evil, tmp_path / "prompt", tmp_path / "megatron"):
        for command in commands(base, folder, tmp_path):
            if str(folder) not in command or command[0] in ("evaluate", "merge"):  # prompts can't be merged
                continue
            outcome = pica(*command)
            assert not trace.exists(), command
            assert outcome.status in (0, 1, 2), (command, outcome.err)
            assert "Traceback" not in outcome.err, command
            assert "The Zen of Python" not in outcome.out


def test_reference_adapters_are_no_way_in(pica: Callable, tmp_path: Path, trace: Path, base: Path):
    (tmp_path / "pica_config.json").write_text('{"target_modules": ["q_proj"], "rank": 4}')
    (tmp_path / "pica_adapter.bin").write_bytes(pickle.dumps({"q_proj": Payload(trace)}))
    outcome = pica("import", tmp_path, "-o", tmp_path / "out", "--base", base)
    assert outcome.status == 2
    assert not trace.exists()


@pytest.mark.parametrize("origin", ["evil", "evil_elsewhere", ["evil"]])
def test_pipelines_that_bring_code(
    pica: Callable, tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch, origin: object
):
    evil = write_stable_diffusion(tmp_path / "pipeline")
    for place in (evil / "unet" / "evil.py", evil / "evil.py", tmp_path / "evil_elsewhere.py"):
        place.write_text(CODE.format(trace=str(trace)))
    monkeypatch.syspath_prepend(tmp_path)
    given: dict[str, object] = {"unet": [origin, "EvilModel"]}
    change(evil / "model_index.json", **(given if isinstance(origin, str) else {"_class_name": [origin, "Evil"]}))
    outcome = pica(
        "train", "--task.name", "dreambooth", "--model.path", evil, "--data.train", write_subject(tmp_path / "dog"),
        "--dreambooth.instance_prompt", "a photo of sks dog", "-o", tmp_path / "run", "--trainer.max_steps", 1,
    )  # fmt: skip
    assert outcome.status == 2
    assert re.search("code that is neither diffusers' nor transformers'|task dreambooth knows", outcome.err)
    assert not trace.exists()


def test_functions_refuse_as_well(tmp_path: Path, trace: Path, base: Path, adapter: Path):
    evil = with_own_model(base, tmp_path / "evil", trace)
    for call in (
        lambda: package.verify(adapter, str(evil)),
        lambda: package.export_lora(adapter, tmp_path / "lora", str(evil)),
    ):
        with pytest.raises(ConfigError, match="give --trust-remote-code"):
            call()
    assert not trace.exists()


LOADERS = ("from_pretrained", "from_config", "load_dataset")


def test_no_loader_in_the_source_is_left_to_its_default():
    """Every call that may find foreign code gets `code_options`, and nothing is unpickled."""
    wrong = []
    for file in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called, name = ast.unparse(node.func), node.func.attr
            named = {keyword.arg or ast.unparse(keyword.value) for keyword in node.keywords}
            allowed = {"code_options", "options", "code"}  # as a call, or as what was filled by one
            harmless = re.search(
                r"Peft(Model|Config)|GenerationConfig|AutoHfQuantizer|Scheduler|CONFIGS|super\(\)|peft_config", called
            )
            if (name in LOADERS or called == "DiffusionPipeline.download") and not harmless:
                if not allowed & {text.partition("(")[0] for text in named}:
                    wrong.append(f"{file.name}:{node.lineno}: {called} without code_options")
            elif name == "snapshot_download" and "allow_patterns" not in named:
                wrong.append(f"{file.name}:{node.lineno}: {called} of everything")
            elif called == "torch.load" and "weights_only" not in named:
                wrong.append(f"{file.name}:{node.lineno}: {called} without weights_only")
            elif called in ("pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"):
                wrong.append(f"{file.name}:{node.lineno}: {called}")
    assert wrong == [], "\n".join(wrong)
