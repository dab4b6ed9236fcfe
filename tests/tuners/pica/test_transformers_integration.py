"""PiCa through transformers' own doors (`add_adapter`, `load_adapter`, `generate`) and TRL's trainer."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import pica
from pica import PicaConfig
from tests.shared import IDS, logits

MIXED = ["a", "__base__", "b"]


def config(**settings) -> PicaConfig:
    return PicaConfig(**{"r": 8, "init_weights": False, "task_type": "CAUSAL_LM", **settings})


def make(model_class, model_config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(model_config).eval()


def tiny_t5() -> T5ForConditionalGeneration:
    settings = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, initializer_factor=2.0)
    settings.decoder_start_token_id = 0
    return make(T5ForConditionalGeneration, settings)


@pytest.fixture
def base_folder(tiny_llama, tmp_path: Path) -> str:
    tiny_llama().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


# ---- adapters without a PeftModel ------------------------------------------------------------------------------------


def test_adapters_are_added_switched_disabled_and_deleted(tiny_llama):
    base = logits(tiny_llama())
    model = tiny_llama()
    model.add_adapter(config())
    first = logits(model)
    assert not torch.allclose(first, base, atol=1e-2)
    model.add_adapter(config(r=16), adapter_name="second")
    assert model.active_adapters() == ["second"]
    second = logits(model)
    assert not torch.allclose(second, first, atol=1e-2)

    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    assert torch.equal(logits(model), first)
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    assert not any(".default." in name for name, _ in model.named_parameters())


def test_only_the_matrices_train(tiny_llama):
    model = tiny_llama()
    model.add_adapter(config())
    model.train()
    model(IDS, labels=IDS).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 5
    assert all(name.startswith("pica_M.default.") for name in trained)


def test_files_of_transformers_and_of_peft_are_the_same(tiny_llama, base_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model.add_adapter(config())
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()

    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter")), expected)
    loaded = tiny_llama()
    loaded.load_adapter(str(tmp_path / "adapter"), adapter_name="x")
    assert torch.equal(logits(loaded), expected)
    # the folder's config names the base model, which is then loaded with the adapter on it
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)

    get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config()).save_pretrained(str(tmp_path / "peft"))
    loaded.load_adapter(str(tmp_path / "peft"), adapter_name="y")
    loaded.set_adapter("y")
    peft_model = PeftModel.from_pretrained(tiny_llama(), tmp_path / "peft")
    assert torch.equal(logits(loaded), logits(peft_model))


def test_an_adapter_is_not_left_behind_in_the_next_of_its_name(tiny_llama):
    model = tiny_llama()
    base = logits(model)
    model.add_adapter(config(), adapter_name="a")
    for name, module in list(model.named_modules()):  # as libraries do that take PEFT's layers out by themselves
        if isinstance(module, pica.tuners.pica.layer.PicaLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)
    del model.peft_config
    model._hf_peft_config_loaded = False
    assert torch.equal(logits(model), base)
    model.add_adapter(config(init_weights=True), adapter_name="a")
    assert torch.equal(logits(model), base)


# ---- generation and mixed batches ------------------------------------------------------------------------------------


def same_sequences(row: Tensor, other: Tensor) -> bool:
    """Equal up to padding: a batch is as long as its longest sequence."""
    length = min(len(row), len(other))
    return torch.equal(row[:length], other[:length]) and not row[length:].any() and not other[length:].any()


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
@pytest.mark.parametrize("num_beams", [1, 3])
def test_each_row_of_a_batch_generates_with_its_own_adapter(tiny_llama, kind, num_beams):
    if kind == "decoder":
        model = get_peft_model(tiny_llama(), config(), "a")
        model.add_adapter("b", config(r=16, projection="random"))
    else:
        settings = {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v", "wo"]}
        model = get_peft_model(tiny_t5(), config(**settings), "a")
        model.add_adapter("b", config(**{**settings, "target_modules": ["q", "k", "wi"]}))
    model.eval()
    request = {"input_ids": IDS, "max_new_tokens": 6, "num_beams": num_beams, "do_sample": False}
    alone = {}
    for name in ("a", "b"):
        model.set_adapter(name)
        alone[name] = model.generate(**request)
    with model.disable_adapter():
        alone["__base__"] = model.generate(**request)
    mixed = model.generate(**request, adapter_names=MIXED)
    assert all(same_sequences(row, alone[name][i]) for i, (row, name) in enumerate(zip(mixed, MIXED)))
    assert not same_sequences(mixed[0], alone["__base__"][0])


def test_rows_that_generate_adds_follow_their_input(tiny_llama):
    model = get_peft_model(tiny_llama(), config(), "a")
    model.add_adapter("b", config())
    model.eval()
    settings = GenerationConfig(num_beams=2, num_return_sequences=2, max_new_tokens=3, pad_token_id=0)
    assert len(model.generate(input_ids=IDS, generation_config=settings, adapter_names=MIXED)) == 6
    sampled = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 2}
    assert len(model.generate(input_ids=IDS, **sampled, adapter_names=MIXED)) == 9
    with pytest.raises(ValueError, match="non-existing adapter"):
        model.generate(input_ids=IDS, adapter_names=["a", "c", "b"])
    with pytest.raises(ValueError, match="same as the number of inputs"):
        model.generate(input_ids=IDS, adapter_names=["a", "b"])


# ---- other architectures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "bert", "t5"])
def test_default_targets_train_save_and_merge(kind, tmp_path):
    if kind == "gpt2":  # Conv1D
        settings = GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
        base, task, inputs = make(GPT2LMHeadModel, settings), "CAUSAL_LM", {"input_ids": IDS}
    elif kind == "bert":  # a head of its own in modules_to_save
        settings = BertConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
        base, task, inputs = make(BertForSequenceClassification, settings), "SEQ_CLS", {"input_ids": IDS}
    else:
        base, task, inputs = tiny_t5(), "SEQ_2_SEQ_LM", {"input_ids": IDS, "decoder_input_ids": IDS}
    weights = {n: p.clone() for n, p in base.state_dict().items()}
    model = get_peft_model(base, config(task_type=task))
    model(**inputs).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    expected = model(**inputs).logits
    model.save_pretrained(str(tmp_path))
    fresh = copy.deepcopy(model).unload()
    fresh.load_state_dict(weights)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(loaded(**inputs).logits, expected)
    tolerance = 1e-4 * float(expected.detach().abs().max())
    torch.testing.assert_close(loaded.merge_and_unload()(**inputs).logits, expected, atol=tolerance, rtol=1e-3)


# ---- TRL -------------------------------------------------------------------------------------------------------------


def test_sft_resumes_to_the_same_adapter(tiny_llama, tmp_path):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")
    rows = [{"input_ids": [1, *(3 + (i * j) % 90 for j in range(8))]} for i in range(16)]

    def train(folder: str, steps: int, resume: str | None = None) -> PeftModel:
        arguments = SFTConfig(
            output_dir=str(tmp_path / folder),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            use_cpu=True,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=tiny_llama(),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=PicaConfig(r=8, task_type="CAUSAL_LM"),
        )
        trainer.train(resume_from_checkpoint=resume)
        assert isinstance(trainer.model, PeftModel)
        return trainer.model.eval()

    straight = train("straight", 4)
    train("interrupted", 2)
    resumed = train("interrupted", 4, str(tmp_path / "interrupted" / "checkpoint-2"))
    assert not torch.allclose(logits(straight), logits(tiny_llama()), atol=1e-3)
    assert torch.equal(logits(resumed), logits(straight))
    saved = PeftModel.from_pretrained(tiny_llama(), tmp_path / "straight" / "checkpoint-4")
    assert torch.equal(logits(saved), logits(straight))


def test_loading_needs_no_more_than_the_folder(tiny_llama, base_folder, tmp_path):
    """The base model is found by its path in adapter_config.json, by transformers alone."""
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base_folder), config())
    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert loaded.active_adapters() == ["default"]
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.allclose(logits(loaded), logits(tiny_llama()), atol=1e-2)
