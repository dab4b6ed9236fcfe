"""Reading two models weight by weight: shards, prefixes, layouts, and adapters of every kind of method."""

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

import pica
from pica.basis.checkpoint import renaming
from pica.errors import AdapterFileError, ConfigError
from pica.experiments.analyze.weights import TunedAdapter, TunedFolder, linear_weights, open_folder
from tests.experiments.tiny import write_tiny_llama

NAMES = ["q_proj", "v_proj", "down_proj"]
METHODS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(target_modules=NAMES, r=4),
    "dora": lambda: peft.LoraConfig(target_modules=NAMES, r=4, use_dora=True),
    "pissa": lambda: peft.LoraConfig(target_modules=NAMES, r=4, init_lora_weights="pissa"),
    "pica": lambda: pica.PicaConfig(target_modules=NAMES, r=8),
    "pica, basis stored": lambda: pica.PicaConfig(target_modules=NAMES, r=8, save_basis=True),
    "loha": lambda: peft.LoHaConfig(target_modules=NAMES, r=4),
    "lokr": lambda: peft.LoKrConfig(target_modules=NAMES, r=4),
    "ia3": lambda: peft.IA3Config(target_modules=NAMES, feedforward_modules=["down_proj"]),
    "oft": lambda: peft.OFTConfig(target_modules=NAMES, oft_block_size=16, use_cayley_neumann=False),
    "boft": lambda: peft.BOFTConfig(target_modules=NAMES, boft_block_size=4),
    "hra": lambda: peft.HRAConfig(target_modules=NAMES, r=4),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=4),
    "fourierft": lambda: peft.FourierFTConfig(target_modules=NAMES, n_frequency=50),
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_any_method_gives_the_weights_that_merging_it_gives(
    model_folder: Path, tmp_path: Path, method: str
):
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), METHODS[method]())
    g = torch.Generator().manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=g)
    adapted.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path)
    merged = loaded.merge_and_unload().state_dict()  # pyright: ignore[reportCallIssue]

    base = open_folder(str(model_folder))
    tuned = TunedAdapter(base, tmp_path)
    found = [target for target in linear_weights(base) if tuned.has(target)]
    assert len(found) == (2 if method == "vera" else 6)
    before = {name: base.load(name) for name in base.entries}
    for target in found:
        weight = tuned.load(target)
        assert (weight - merged[target.name]).abs().max() < 1e-5
        assert (weight - before[target.name]).abs().max() > 1e-3  # and there is an update
        assert torch.equal(tuned.load(target), weight)  # nothing is left behind of the first merge
    assert all(torch.equal(base.load(name), tensor) for name, tensor in before.items())  # the files are untouched


def test_an_adapter_without_weights_is_refused(model_folder: Path, tmp_path: Path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), config).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterFileError, match="changes no weights"):
        TunedAdapter(open_folder(str(model_folder)), tmp_path)


def test_an_adapter_with_other_outputs_and_more_tokens_than_its_base(model_folder: Path, tmp_path: Path):
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=5)
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 2)
    config = pica.PicaConfig(r=4, task_type="SEQ_CLS", init_weights=False, modules_to_save=["embed_tokens"])  # pyright: ignore[reportArgumentType]
    adapted = peft.get_peft_model(model, config)
    adapted.save_pretrained(str(tmp_path))
    merged = adapted.merge_and_unload().state_dict()  # pyright: ignore[reportCallIssue]
    base = open_folder(str(model_folder))
    tuned = TunedAdapter(base, tmp_path)
    found = [target for target in linear_weights(base) if tuned.has(target)]
    assert found
    for target in found:
        torch.testing.assert_close(tuned.load(target), merged[target.name], atol=1e-5, rtol=1e-5)
    assert base.load("model.embed_tokens.weight").shape[0] == rows


def test_sharded_and_single_files_hold_the_same(model_folder: Path, tmp_path: Path):
    AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(tmp_path, max_shard_size="20KB")
    sharded, single = open_folder(str(tmp_path)), open_folder(str(model_folder))
    assert len({entry.file for entry in sharded.entries.values()}) > 2
    targets = linear_weights(single)
    assert {t.name for t in linear_weights(sharded)} == {t.name for t in targets}
    assert all(torch.equal(sharded.load(t.name), single.load(t.name)) for t in targets)


def test_only_layers_are_analysed(model_folder: Path):
    paths = [target.path for target in linear_weights(open_folder(str(model_folder)))]
    assert len(paths) == 2 * 7
    assert not any("embed" in path or "lm_head" in path for path in paths)


def bert(**more) -> BertConfig:
    return BertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        **more,
    )


def test_a_body_finds_itself_in_a_model_with_a_head(tmp_path: Path):
    torch.manual_seed(0)
    body = BertModel(bert())
    headed = BertForSequenceClassification(bert(num_labels=3))
    headed.bert.load_state_dict(body.state_dict())
    body.save_pretrained(tmp_path / "body")
    headed.save_pretrained(tmp_path / "headed")
    for one, other in (("body", "headed"), ("headed", "body")):
        base = open_folder(str(tmp_path / one))
        tuned = TunedFolder(base, open_folder(str(tmp_path / other)))
        shared = [target for target in linear_weights(base) if tuned.has(target)]
        assert len(shared) == 2 * 6 + 1
        assert all(torch.equal(base.load(t.name), tuned.load(t)) for t in shared)
    assert renaming(["a.x", "a.y"], ["x", "y"])("a.x") == "x"
    assert renaming(["x", "y"], ["a.x", "a.y", "head"])("x") == "a.x"


def test_conv1d_is_transposed(tmp_path: Path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=16, n_inner=24)
    GPT2LMHeadModel(config).save_pretrained(str(tmp_path))
    targets = {t.path.rpartition("h.0.")[2]: t for t in linear_weights(open_folder(str(tmp_path)))}
    assert set(targets) == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert all(target.transposed for target in targets.values())


def test_names_decide_where_transformers_knows_no_such_model(tmp_path: Path):
    tensors = {
        "blocks.0.up.weight": torch.ones(4, 3),
        "tok_embeddings.weight": torch.ones(9, 3),
        "norm.weight": torch.ones(3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "of our own"}')
    assert [target.path for target in linear_weights(open_folder(str(tmp_path)))] == ["blocks.0.up"]


def test_an_adapter_in_place_of_the_base_is_told(model_folder: Path, tmp_path: Path):
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), METHODS["lora"]())
    adapted.save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match="is an adapter; give the model it belongs to as BASE"):
        open_folder(str(tmp_path))


def test_refusals(model_folder: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no safetensors file"):
        open_folder(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(ConfigError, match="cannot be read as safetensors"):
        open_folder(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../../secret.safetensors"}})
    )
    with pytest.raises(ConfigError, match="lacks secret.safetensors"):
        open_folder(str(tmp_path))
