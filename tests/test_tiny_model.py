"""The embedded tiny model is what it claims to be, and the tool that makes it works."""

import importlib
import importlib.resources
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from pica.tasks import wordproblems

ASSET = Path(str(importlib.resources.files("pica"))) / "assets" / "tiny-llama"
TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(scope="module")
def tools() -> dict[str, ModuleType]:
    """The scripts under tools/, which are not part of the package, as modules."""
    sys.path.insert(0, str(TOOLS))
    try:
        return {name: importlib.import_module(name) for name in ("tiny_corpus", "pretrain_tiny")}
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSET)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32, trust_remote_code=False)


def test_the_asset_is_small_and_holds_only_data():
    files = [path for path in ASSET.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= 3_000_000


def test_it_loads_as_a_plain_float32_llama(model):
    assert type(model) is LlamaForCausalLM
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(ASSET).dtype == torch.float32
    keys = model.get_parameter("model.layers.0.self_attn.k_proj.weight")
    assert keys.shape[0] < keys.shape[1], "keys should be narrow, as in the models people adapt"


def test_it_predicts_fresh_text_of_its_corpus(model, tokenizer, tools):
    """Text from a seed that no part of the training used."""
    pretrain_tiny = tools["pretrain_tiny"]
    held_out = pretrain_tiny.blocks(list(tools["tiny_corpus"].corpus(987_654, 400)), tokenizer)
    loss = pretrain_tiny.mean_loss(model, held_out)
    assert loss < 0.4 * pretrain_tiny.unigram_loss(held_out)
    recorded = json.loads((ASSET / "training.json").read_text(encoding="utf-8"))["held_out_loss"]["trained"]
    assert loss == pytest.approx(recorded, rel=0.1)


@pytest.mark.parametrize(
    ("text", "continuation"),
    [
        ("7 + 5 =", " 12"),
        ("34 + 21 =", " 55"),
        ("Tom has 8 apples. He buys 3 more, so now he has", " 11"),
        ("10, 20, 30,", " 40"),
    ],
)
def test_it_has_learnt_to_calculate(model, tokenizer, text: str, continuation: str):
    encoded = tokenizer(text, return_tensors="pt")
    length = len(tokenizer(continuation, add_special_tokens=False).input_ids)
    output = model.generate(**encoded, max_new_tokens=length, do_sample=False)
    assert tokenizer.decode(output[0, encoded.input_ids.shape[1] :]) == continuation


def test_every_digit_is_one_token(tokenizer):
    tokens = tokenizer.tokenize("Tom has 1234567890 apples, 42 of them red.")
    assert [token for token in tokens if any(letter.isdigit() for letter in token)] == list("123456789042")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain words",
        " leading and  double spaces \n\ttabs",
        "12.50 − 3 = ½",
        "日本語 ünïcödé 🙂",
        "\x00\x7f",
        "<|x|> \\n",
    ],
)
def test_any_text_survives_encoding(tokenizer, text: str):
    encoded = tokenizer(text).input_ids
    assert encoded[0] == tokenizer.bos_token_id
    assert tokenizer.decode(encoded[1:]) == text


def test_special_tokens_are_apart(tokenizer, model):
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(ids) == 3
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.vocab_size == len(tokenizer)


def test_the_corpus_does_not_contain_the_task(tools):
    text = "\n".join(tools["tiny_corpus"].corpus(0, 40_000))
    assert "The answer is" not in text
    assert "Question: " not in text
    assert "\nAnswer:" not in text
    for problem in wordproblems.generate("test", 1000):
        assert problem.question not in text
        assert problem.solution not in text


def test_the_corpus_is_a_function_of_its_seed(tools):
    corpus = tools["tiny_corpus"].corpus
    assert list(corpus(1, 200)) == list(corpus(1, 200))
    assert list(corpus(1, 200)) != list(corpus(2, 200))


def test_blocks_hold_whole_documents_in_order(tools, tokenizer):
    pretrain_tiny = tools["pretrain_tiny"]
    texts = list(tools["tiny_corpus"].corpus(3, 50))
    blocks = pretrain_tiny.blocks(texts, tokenizer)
    assert blocks.shape[1] == pretrain_tiny.BLOCK
    assert set(blocks[:, 0].tolist()) == {tokenizer.bos_token_id}
    documents = [tokenizer(text).input_ids + [tokenizer.eos_token_id] for text in texts]
    assert max(map(len, documents)) <= pretrain_tiny.BLOCK
    assert blocks[blocks != tokenizer.pad_token_id].tolist() == [token for tokens in documents for token in tokens]


def test_padding_is_not_learnt_from(tools, model, tokenizer):
    pretrain_tiny = tools["pretrain_tiny"]
    short = pretrain_tiny.blocks(["7 + 5 = 12"], tokenizer)
    bare = short[short != tokenizer.pad_token_id][None]
    assert pretrain_tiny.mean_loss(model, short) == pytest.approx(pretrain_tiny.mean_loss(model, bare), rel=1e-4)


def test_a_few_steps_of_the_tool_write_a_loadable_and_repeatable_model(tools, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tools["pretrain_tiny"], "HELD_OUT_DOCUMENTS", 60)  # most of the time would go there
    for name in ("first", "second"):
        assert tools["pretrain_tiny"].main(["--out", str(tmp_path / name), "--steps", "5", "--seed", "7"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"], "a temporary folder was left"
    record = json.loads((tmp_path / "first" / "training.json").read_text(encoding="utf-8"))
    assert record["settings"]["steps"] == 5
    assert record["held_out_loss"]["trained"] < record["held_out_loss"]["untrained"]
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("first", "second"))
    for parameter, again in zip(first.parameters(), second.parameters()):
        torch.testing.assert_close(parameter, again)


def test_the_tool_refuses_to_overwrite_a_foreign_folder(tools, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(FileExistsError, match="not written by this tool"):
        tools["pretrain_tiny"].main(["--out", str(tmp_path), "--steps", "5"])
    assert (tmp_path / "thesis.txt").read_text() == "irreplaceable"


def test_the_tool_rejects_zero_steps(tools, tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        tools["pretrain_tiny"].main(["--out", str(tmp_path / "x"), "--steps", "0"])
    assert "at least one step" in capsys.readouterr().err
