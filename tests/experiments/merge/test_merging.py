"""Merging adapters of every task, with what lies beside them."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

import pica
from pica.adapters.export.check import example_inputs, output_of
from pica.adapters.fitting import fit_embeddings
from pica.errors import AdapterFileError, ExportError
from pica.experiments.merge.merging import merge
from tests.experiments.tiny import write_tiny_llama
from tests.experiments.tiny_encoder import write_tiny_bert


def trained(model: Any, **options: Any) -> PeftModel:
    """An adapter on the model of which every trained number has moved."""
    adapted = get_peft_model(model, pica.PicaConfig(r=4, **options))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return adapted.eval()


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return output_of(model, example_inputs(getattr(model, "base_model", model), torch.device("cpu")))


def write_tiny_t5(folder: Path) -> Path:
    config = T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    config.decoder_start_token_id = 0
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def write_tiny_vit(folder: Path) -> Path:
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ViTModel(ViTConfig(image_size=16, patch_size=8, **sizes)).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


TASKS = [
    (write_tiny_bert, AutoModel, "FEATURE_EXTRACTION", {}),
    (write_tiny_bert, AutoModelForTokenClassification, "TOKEN_CLS", {"num_labels": 7}),
    (write_tiny_bert, AutoModelForQuestionAnswering, "QUESTION_ANS", {}),
    (write_tiny_bert, AutoModelForSequenceClassification, "SEQ_CLS", {"num_labels": 5}),
    (write_tiny_bert, AutoModelForSequenceClassification, "SEQ_CLS", {"num_labels": 1}),
    (write_tiny_llama, AutoModel, "FEATURE_EXTRACTION", {}),
    (write_tiny_llama, AutoModelForSequenceClassification, "SEQ_CLS", {"num_labels": 3}),
    (write_tiny_llama, AutoModelForCausalLM, None, {}),
    (write_tiny_t5, AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM", {}),
    (write_tiny_vit, AutoModelForImageClassification, None, {"num_labels": 10}),
]


@pytest.mark.parametrize(
    ("write", "auto", "task", "options"), TASKS, ids=[f"{w.__name__[11:]}-{a.__name__[4:]}" for w, a, *_ in TASKS]
)
def test_every_task_is_verified_exported_and_merged(tmp_path: Path, write: Any, auto: Any, task: Any, options: Any):
    """Heads have as many outputs as the adapter's file says, whatever the base model's configuration does."""
    base = auto.from_pretrained(write(tmp_path / "base"), **options)
    new = {AutoModelForImageClassification: ["classifier"], AutoModelForSequenceClassification: ["pooler"]}
    model = trained(base, task_type=task, modules_to_save=new.get(auto) if write is not write_tiny_llama else None)
    if task == "SEQ_CLS":
        model.config.pad_token_id = 0  # pyright: ignore[reportAttributeAccessIssue]
    model.save_pretrained(str(tmp_path / "adapter"))
    wanted = output(model)
    report = pica.verify(tmp_path / "adapter", str(tmp_path / "base"))
    assert report.ok, report
    assert [check.passed for check in report.checks] == [True] * 6
    done = pica.export_lora(tmp_path / "adapter", tmp_path / "lora")
    assert done.check is not None
    assert done.check.effect > 100 * done.check.logits
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.num_labels == base.config.num_labels
    torch.testing.assert_close(output(merged.eval()), wanted, atol=1e-4, rtol=1e-4)
    assert (tmp_path / "merged" / "tokenizer.json").is_file() == (tmp_path / "base" / "tokenizer.json").is_file()
    assert (tmp_path / "merged" / "preprocessor_config.json").is_file() == (write is write_tiny_vit)


def test_a_base_with_another_head_gets_the_adapters(tmp_path: Path):
    """A base that was trained to tell five classes apart, an adapter for three: question answering has two."""
    write_tiny_bert(tmp_path / "base")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5).save_pretrained(
        tmp_path / "base"
    )
    base = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "base", num_labels=2)
    model = trained(base, task_type="QUESTION_ANS")
    model.save_pretrained(str(tmp_path / "adapter"))
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(output(merged), output(model), atol=1e-4, rtol=1e-4)


def test_a_head_that_nobody_has_is_refused(tmp_path: Path):
    """transformers would make one up, another each time."""
    base = AutoModelForSequenceClassification.from_pretrained(write_tiny_bert(tmp_path / "base"))
    trained(base).save_pretrained(str(tmp_path / "adapter"))  # no task type: PEFT does not save the new head
    with pytest.raises(AdapterFileError, match=r"holds bert\.pooler\.dense\.bias, so the merged model would guess"):
        merge(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_lies_beside_the_adapter_goes_before_the_bases(tmp_path: Path):
    base = write_tiny_llama(tmp_path / "base")
    trained(AutoModelForCausalLM.from_pretrained(base), task_type="CAUSAL_LM").save_pretrained(
        str(tmp_path / "adapter")
    )
    GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.3).save_pretrained(base)
    merge(tmp_path / "adapter", tmp_path / "plain")
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").chat_template is None
    assert GenerationConfig.from_pretrained(tmp_path / "plain").max_new_tokens == 7
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for x in messages %}<{{ x.role }}>{{ x.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    GenerationConfig(max_new_tokens=9).save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "merged").max_new_tokens == 9


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("how", ["whole", "rows", "rows, no tokenizer", "resized only"])
def test_added_tokens_are_verified_exported_and_merged(tmp_path: Path, tie: bool, how: str):
    base = write_tiny_llama(tmp_path / "base")
    if not tie:
        AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=False).save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<think>", "</think>"])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = model.config.vocab_size
    model.resize_token_embeddings(len(tokenizer))
    new: dict[str, Any] = {"whole": {"modules_to_save": ["embed_tokens", "lm_head"]}}.get(how, {})
    if how.startswith("rows"):
        new = {"trainable_token_indices": [rows, rows + 1]}
    adapted = trained(model, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **new)
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=how == "resized only")
    if how != "rows, no tokenizer":
        tokenizer.save_pretrained(tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    for given in (str(base), plain):  # a model that is passed in is left alone
        report = pica.verify(tmp_path / "adapter", given)
        assert report.ok, report
    assert plain.config.vocab_size == rows
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    if how.startswith("rows"):
        with pytest.raises(ExportError, match="trained token embeddings too"):
            pica.export_lora(tmp_path / "adapter", tmp_path / "lora")
    else:
        pica.export_lora(tmp_path / "adapter", tmp_path / "lora")
        lora = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").eval()
        torch.testing.assert_close(output(lora), output(adapted), atol=1e-4, rtol=1e-4)
        with pytest.raises(ExportError, match="vllm cannot load that"):
            pica.export_lora(tmp_path / "adapter", tmp_path / "served", engine="vllm")
    merge(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == rows + 2 * (how != "rows, no tokenizer")
    assert merged.get_input_embeddings().num_embeddings == rows + 2
    ids = example_inputs(plain, torch.device("cpu"))["input_ids"]
    ids[:, 3] = rows + 1
    with torch.no_grad():
        torch.testing.assert_close(
            merged(input_ids=ids).logits[..., :rows], adapted(input_ids=ids).logits[..., :rows], atol=1e-4, rtol=1e-4
        )


def test_a_tokenizer_larger_than_what_the_adapter_holds_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    base = write_tiny_llama(tmp_path / "base")
    trained(AutoModelForCausalLM.from_pretrained(base), task_type="CAUSAL_LM").save_pretrained(
        str(tmp_path / "adapter")
    )
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    assert "has 259 tokens and the base model's embeddings have 258 rows" in caplog.text
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.vocab_size == 259


def test_resized_embeddings_that_are_adapted_themselves(tmp_path: Path):
    """The file holds the very weight that the basis is of."""
    base = write_tiny_llama(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=False)
    model.save_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<think>"])
    model.resize_token_embeddings(len(tokenizer))
    adapted = trained(model, task_type="CAUSAL_LM", target_modules=["embed_tokens", "q_proj"])
    adapted.save_pretrained(str(tmp_path / "adapter"))
    report = pica.verify(tmp_path / "adapter", str(base))
    assert report.ok, report


def test_embeddings_that_are_trained_whole_are_those_of_the_adapter_alone(tmp_path: Path):
    """The base gets new rows only: with the adapter switched off, its tokens are as they were."""
    base, adapter = write_tiny_llama(tmp_path / "base"), str(tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(base)
    rows = model.config.vocab_size
    model.resize_token_embeddings(rows + 1)
    adapted = trained(model, task_type="CAUSAL_LM", modules_to_save=["embed_tokens"])
    adapted.save_pretrained(adapter, save_embedding_layers=False)
    fitted = AutoModelForCausalLM.from_pretrained(base)
    before = fitted.model.embed_tokens.weight.detach().clone()
    fit_embeddings(fitted, tmp_path / "adapter", PeftConfig.from_pretrained(adapter))
    PeftModel.from_pretrained(fitted, adapter)
    embedding = fitted.model.embed_tokens
    assert torch.equal(
        embedding.modules_to_save["default"].weight, model.model.embed_tokens.modules_to_save["default"].weight
    )
    assert torch.equal(embedding.original_module.weight[:rows], before)


@pytest.mark.skipif(os.name != "posix", reason="file permissions")
def test_results_are_as_readable_as_the_umask_says(tmp_path: Path):
    base = write_tiny_llama(tmp_path / "base")
    adapted = trained(AutoModelForCausalLM.from_pretrained(base), task_type="CAUSAL_LM")
    before = os.umask(0o027)
    try:
        pica.save_adapter(adapted, tmp_path / "adapter")
        pica.export_lora(tmp_path / "adapter", tmp_path / "lora", check=False)
        merge(tmp_path / "adapter", tmp_path / "merged")
    finally:
        os.umask(before)
    for folder in ("adapter", "lora", "merged"):
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / folder).iterdir()}
        assert set(modes.values()) == {0o640}, modes


def test_what_changes_no_weights_is_not_merged(tmp_path: Path):
    base = write_tiny_llama(tmp_path / "base")
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), prompt).save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(AdapterFileError, match=r"\(PROMPT_TUNING\) changes no weights, so there is nothing to merge"):
        merge(tmp_path / "adapter", tmp_path / "merged")
