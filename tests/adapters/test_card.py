"""The card in an adapter's folder: what it says, what it does not give away, and when it is left alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification

from pica import PicaConfig, save_adapter, save_whole
from pica.adapters.card import card_text, is_local, public_name, write_card


@pytest.fixture
def adapter(tiny_llama, tmp_path: Path) -> PeftModel:
    tiny_llama().save_pretrained(tmp_path / "my base")
    base = type(tiny_llama()).from_pretrained(tmp_path / "my base")
    model = get_peft_model(base, PicaConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert isinstance(model, PeftModel)
    return model


def test_a_save_says_what_it_is_and_how_to_use_it(adapter: PeftModel, tmp_path: Path):
    save_adapter(adapter, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert ModelCard(text).data.to_dict() == {
        "base_model": "my base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:my base", "peft", "pica"],
    }
    assert str(tmp_path) not in text, "no path of this machine"
    for said in ("pip install pica-peft", "import pica  # first", "KeyError: 'PICA'", "pica merge", "--for vllm"):
        assert said in text
    assert "| parameters | 256 |" in text  # one group of a 64 wide output, r = 4
    save_whole(adapter).save_pretrained(str(tmp_path / "whole"))
    assert (tmp_path / "whole" / "README.md").read_text(encoding="utf-8") == text


def test_what_it_says_of_the_missing_import_is_so(adapter: PeftModel, tmp_path: Path):
    save_adapter(adapter, tmp_path / "out")
    code = f"from peft import PeftConfig\nPeftConfig.from_pretrained({str(tmp_path / 'out')!r})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.stderr.strip().splitlines()[-1] == "KeyError: 'PICA'"


def test_a_card_of_ones_own_stays(adapter: PeftModel, tmp_path: Path):
    save_adapter(adapter, tmp_path / "out")
    card = tmp_path / "out" / "README.md"
    generated = card.read_text(encoding="utf-8")
    card.write_text("---\nlicense: mit\n---\n\n# Mine\n", encoding="utf-8")
    save_adapter(adapter, tmp_path / "out")
    assert card.read_text(encoding="utf-8") == "---\nlicense: mit\n---\n\n# Mine\n"
    save_whole(adapter).save_pretrained(str(tmp_path / "out"))
    assert "# Mine" in card.read_text(encoding="utf-8")
    assert ModelCard.load(card).data.to_dict()["license"] == "mit"
    card.write_text(generated.replace("PiCa", "old"), encoding="utf-8")  # ours: written anew
    save_adapter(adapter, tmp_path / "out")
    assert card.read_text(encoding="utf-8") == generated
    card.write_text(generated.replace("PiCa", "old"), encoding="utf-8")
    save_whole(adapter).save_pretrained(str(tmp_path / "out"))
    assert card.read_text(encoding="utf-8") == generated


def test_other_methods_keep_the_card_that_peft_writes(tiny_llama, tmp_path: Path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert isinstance(model, PeftModel)
    save_adapter(model, tmp_path / "lora")
    assert "pica" not in (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    write_card(tmp_path / "lora", facts={"task": "chat"})  # unless a run knows more of it
    text = (tmp_path / "lora" / "README.md").read_text(encoding="utf-8")
    assert "| method | LORA, r = 2 |" in text
    assert "import pica" not in text
    assert "pica export" not in text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a/b", "a/b"),
        ("gpt2", "gpt2"),
        ("/home/ann/models/b/", "b"),
        ("./b", "b"),
        ("C:\\models\\b", "b"),
        ("models/of/b", "b"),
    ],
)
def test_a_folder_is_named_by_its_last_part(name: str, shown: str):
    assert public_name(name) == shown
    assert is_local(name) == (name != shown)


def test_names_from_files_do_not_break_it(adapter: PeftModel, tmp_path: Path):
    save_adapter(adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "a/b: c\n- x", "revision": "<script>`\x1b", "target_modules": ["q|p"]}
    text = card_text(tmp_path / "out", config, title="<b>\n# x", facts={"a|b": "c|d\n<script>"}, tags=["x: y"])
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "a/b: c\n- x"
    assert "x: y" in data["tags"]
    assert "<script>" not in text
    assert "\x1b" not in text
    assert "\n# x" not in text
    assert "| a\\|b | c\\|d &lt;script> |" in text


def test_a_head_is_loaded_with_its_number_of_outputs(tmp_path: Path):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 20,
    }
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **sizes, num_labels=5))
    adapted = get_peft_model(model, PicaConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    assert isinstance(adapted, PeftModel)
    save_adapter(adapted, tmp_path / "out", save_embedding_layers=False)
    assert "num_labels=5)" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
