"""Loading models and adapters, and merging the two."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pica.errors import AdapterFileError, ConfigError, OutputError
from pica.experiments.adapters import attach
from pica.experiments.merge.merging import merge
from pica.experiments.models import base_of, load_adapter, load_model, load_tokenizer, locate
from pica.experiments.recipes.recipe import AdapterSection, ModelSection, Recipe
from pica.experiments.train.training import save_adapter
from tests.experiments.tiny import write_tiny_llama

IDS = torch.arange(2, 40)[None]


def make_adapter(model_folder: Path, folder: Path, method: str = "pica") -> Path:
    """An adapter that changes the model's answers."""
    section = AdapterSection(method=method, r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    model = attach(load_model(ModelSection(path=str(model_folder))), section, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    save_adapter(model, folder)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("method", ["pica", "svft", "lora"])
def test_merged_model_answers_as_the_adapter_does(model_folder: Path, tmp_path: Path, method: str):
    adapter = make_adapter(model_folder, tmp_path / "adapter", method)
    merge(adapter, tmp_path / "merged")
    expected = logits(load_adapter(load_model(ModelSection(path=str(model_folder))), adapter))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, logits(load_model(ModelSection(path=str(model_folder)))), atol=1e-2)


def test_merged_folder_loads_without_pica_and_peft(model_folder: Path, tmp_path: Path):
    merge(make_adapter(model_folder, tmp_path / "adapter"), tmp_path / "merged")
    code = (
        "import sys; sys.modules['pica'] = sys.modules['peft'] = None\n"  # importing either would raise
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"AutoModelForCausalLM.from_pretrained({str(tmp_path / 'merged')!r})\n"
        f"assert AutoTokenizer.from_pretrained({str(tmp_path / 'merged')!r})('ab')['input_ids']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_half_precision_bases_are_merged_in_float32_and_rounded_once(tmp_path: Path):
    base = write_tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(base, tmp_path / "adapter")
    merge(adapter, tmp_path / "auto")
    merge(adapter, tmp_path / "full", dtype="float32")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "auto").state_dict()
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full").state_dict()
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert {value.dtype for value in full.values()} == {torch.float32}
    assert all(torch.equal(found[name], full[name].to(torch.bfloat16)) for name in full)


def test_merge_refuses_what_is_in_use_and_leaves_no_half(model_folder: Path, tmp_path: Path):
    adapter = make_adapter(model_folder, tmp_path / "adapter")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        merge(adapter, tmp_path / "used")
    with pytest.raises(ConfigError, match="does not exist"):
        merge(adapter, tmp_path / "new", base="/nowhere/model")
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    assert (merge(adapter, tmp_path / "empty") / "model.safetensors").is_file()


def test_values_that_do_not_fit_the_precision_are_refused(model_folder: Path, tmp_path: Path):
    big = load_model(ModelSection(path=str(model_folder)))
    with torch.no_grad():
        big.get_parameter("model.norm.weight")[3] = 1e6  # beyond float16
    big.save_pretrained(tmp_path / "big")
    load_tokenizer(ModelSection(path=str(model_folder))).save_pretrained(tmp_path / "big")
    adapter = make_adapter(tmp_path / "big", tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match="is not finite in torch.float16; choose another with --dtype"):
        merge(adapter, tmp_path / "merged", dtype="float16")
    assert not (tmp_path / "merged").exists()


def test_damaged_adapters_are_told_in_one_sentence(model_folder: Path, tmp_path: Path):
    def model():
        return load_model(ModelSection(path=str(model_folder)))

    with pytest.raises(AdapterFileError, match="holds no adapter_config.json"):
        load_adapter(model(), tmp_path)
    adapter = make_adapter(model_folder, tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(AdapterFileError, match="is damaged or cut short"):
        load_adapter(model(), adapter)
    weights.unlink()
    with pytest.raises(AdapterFileError, match="holds no adapter_model.safetensors"):
        load_adapter(model(), adapter)


def test_base_is_the_recorded_one_unless_named(model_folder: Path, tmp_path: Path):
    adapter = make_adapter(model_folder, tmp_path / "adapter")
    assert base_of(adapter) == str(model_folder)
    assert base_of(adapter, "other") == "other"
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/gone/away/model"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterFileError, match="'/gone/away/model' does not exist. Name it with --base"):
        base_of(adapter)
    config["base_model_name_or_path"] = "/elsewhere/site-packages/pica/assets/tiny-llama"
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert base_of(adapter) == "embedded"


def test_a_relative_model_folder_is_recorded_so_that_it_is_found_from_anywhere(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(model_folder.parent)
    assert locate(f"./{model_folder.name}") == str(model_folder)


def test_incomplete_model_folders_are_told_in_one_sentence(model_folder: Path, tmp_path: Path):
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(ModelSection(path=str(tmp_path / "model")))
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_model(ModelSection(path=str(tmp_path / "model")))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).unlink()
    with pytest.raises(ConfigError, match="cannot be loaded|no end-of-text token"):
        load_tokenizer(ModelSection(path=str(tmp_path / "model")))


def test_unknown_hub_names_are_told_in_one_sentence():
    with pytest.raises(ConfigError, match="is no local folder, and loading it from the hub failed"):
        load_model(ModelSection(path="pica-tests/no-such-model"))


def test_tokenizer_without_padding_token_pads_with_the_end(model_folder: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(model_folder / "config.json", tmp_path)
    loaded = load_tokenizer(ModelSection(path=str(tmp_path)))
    assert loaded.pad_token_id == loaded.eos_token_id


def test_attaching_depends_on_the_seed_alone(recipe: Callable[..., Recipe]):
    made = recipe()
    section = AdapterSection(method="lora", r=2, target_modules=["q_proj"])

    def first_matrix(seed: int) -> torch.Tensor:
        model = attach(load_model(made.model), section, seed=seed)
        return next(value for value in model.parameters() if value.requires_grad)

    assert torch.equal(first_matrix(0), first_matrix(0))
    assert not torch.equal(first_matrix(0), first_matrix(1))
