"""Texts longer than the model's positions, tokens that it has no embedding for, and padding that changes nothing."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from pica.errors import ConfigError, DataError
from pica.experiments.evaluate.evaluation import answers, completion_losses
from pica.experiments.limits import Limits, limits_of, planned_limits
from pica.experiments.pipelines import make_pipeline
from pica.experiments.recipes.recipe import ModelSection, Recipe
from pica.experiments.reporting import Silent
from pica.tasks import Example, LabelledText, get_task

WORDS = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{n}" for n in range(36))]
SMALL: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS: dict[str, Any] = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=20, **IDS))


def opt() -> PreTrainedModel:
    sizes = {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 20}
    return OPTForCausalLM(OPTConfig(**sizes, **IDS))


def roberta() -> PreTrainedModel:
    return RobertaModel(
        RobertaConfig(**SMALL, intermediate_size=32, max_position_embeddings=22, type_vocab_size=1, **IDS)
    )


def bart() -> PreTrainedModel:
    sizes = {"vocab_size": 40, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    return BartForCausalLM(BartConfig(**sizes, max_position_embeddings=20, is_decoder=True, **IDS))


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=32, max_position_embeddings=20, **IDS))


def saved(folder: Path, make: Callable[[], PreTrainedModel], *, more: int = 0, **options: Any) -> str:
    """A model with random weights and a tokenizer of whole words, with `more` tokens than the model."""
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():  # large enough for every position and token to show in the outputs
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    words = WORDS + [f"x{n}" for n in range(more)]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if make is roberta:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", **options}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def generator(recipe: Callable[..., Recipe]) -> Callable[..., Any]:
    def make(path: str, **options: Any) -> Any:
        task = {"task__name": "math", "task__template": "plain", "data__train": "hub:a/b", "data__test": "hub:a/b"}
        return make_pipeline(recipe(model__path=path, **task, **options))

    return make


@pytest.fixture
def classifier(recipe: Callable[..., Recipe]) -> Callable[..., Any]:
    def make(path: str, **options: Any) -> Any:
        data = {"data__train": "hub:a/b", "data__test": "hub:a/b"}
        task = {"task__name": "sentiment", "task__max_new_tokens": None, "task__labels": ["0", "1"]}
        return make_pipeline(recipe(model__path=path, **task, **data, **options))

    return make


@pytest.mark.parametrize(("make", "positions"), [(gpt2, 20), (opt, 20), (roberta, 20), (bart, 20), (llama, None)])
def test_positions_are_those_that_the_model_has(
    tmp_path: Path, make: Callable[[], PreTrainedModel], positions: int | None
):
    model = make().eval()
    assert limits_of(model) == Limits(positions, 40)
    auto_class = AutoModel if make is roberta else AutoModelForCausalLM
    assert planned_limits(ModelSection(path=saved(tmp_path, make)), auto_class) == Limits(positions, 40)
    with torch.no_grad():
        model(input_ids=torch.full((1, 20), 5))
        if positions is None:
            model(input_ids=torch.full((1, 30), 5))
        else:
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, positions + 1), 5))


def test_long_texts_to_classify_are_cut_and_that_is_said(tmp_path: Path, classifier: Callable[..., Any], caplog):
    with caplog.at_level(logging.WARNING):
        pipeline = classifier(saved(tmp_path / "m", roberta))
        texts = [LabelledText("w1 " * count, "0") for count in (1, 18, 19, 60)]
        found = pipeline.evaluate(pipeline.load_base(), texts, reporter=Silent(), label="")
    assert found.examples == 4
    assert "trainer.max_length = 512 is more than the model's 20 positions: texts are cut off there" in caplog.text
    assert "2 of 4 texts are cut off at 20 tokens" in caplog.text


@pytest.mark.parametrize("make", [gpt2, opt])
def test_long_questions_lose_their_beginning_and_that_is_said(
    tmp_path: Path, generator: Callable[..., Any], make: Callable[[], PreTrainedModel], caplog
):
    pipeline = generator(saved(tmp_path, make))
    prompts = ["w1 w2", "w3 " * 17, "w4 " * 18, "w5 " * 60]
    examples = [Example(prompt, "w6 w7", "1") for prompt in prompts] + [Example("w8", "w9 " * 40, "1")]
    with caplog.at_level(logging.WARNING):
        found = pipeline.evaluate(pipeline.load_base(), examples, reporter=Silent(), label="")
    assert found.tokens == 4 * 3 + 19, "each completion counts, as far as there are positions"
    assert "2 of 5 prompts lose their beginning: the model has 20 positions, and task.max_new_tokens = 4" in caplog.text
    assert max(len(ids) for ids in pipeline.encode(examples[:3])["input_ids"]) == 20
    with pytest.raises(
        ConfigError, match="task.max_new_tokens = 20: the model has 20 positions for question and answer"
    ):
        generator(str(tmp_path), task__max_new_tokens=20)


@pytest.mark.parametrize(("make", "side"), [(gpt2, "left"), (opt, "left"), (opt, "right"), (bart, "right")])
def test_answers_and_losses_do_not_depend_on_the_batch(
    tmp_path: Path, generator: Callable[..., Any], make: Callable[[], PreTrainedModel], side: str
):
    pipeline = generator(saved(tmp_path, make, padding_side=side))
    model, examples = pipeline.load_base(), [Example(f"w{n} " * n, f"w{n} w1", "1") for n in range(1, 9)]
    task: Any = get_task("math")
    found = [answers(model, pipeline.tokenizer, task, examples, size, 6, Silent(), "") for size in (1, 3, 8)]
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) > 1
    losses = [completion_losses(model, pipeline.tokenizer, examples, batch_size=size) for size in (1, 8)]
    assert [loss for loss, _ in losses[0]] == pytest.approx([loss for loss, _ in losses[1]], rel=1e-4)


@pytest.mark.parametrize("make", [gpt2, opt])
def test_classes_do_not_depend_on_the_batch_where_a_tokenizer_pads_on_the_left(
    tmp_path: Path, classifier: Callable[..., Any], make: Callable[[], PreTrainedModel]
):
    path = saved(tmp_path / "m", make, padding_side="left")
    texts = [LabelledText(f"w{n} " * n, "0") for n in range(1, 9)]
    shares = []
    for size in (1, 8):
        pipeline = classifier(path, trainer__eval_batch_size=size)
        found = pipeline.evaluate(pipeline.load_base(), texts, reporter=Silent(), label="")
        shares.append([row["probabilities"]["0"] for row in found.predictions])
    assert shares[0] == pytest.approx(shares[1], abs=1e-5)
    assert max(shares[0]) - min(shares[0]) > 0.01


def test_padding_that_the_model_does_not_know_is_exchanged_and_other_tokens_are_named(
    tmp_path: Path, classifier: Callable[..., Any], generator: Callable[..., Any]
):
    path = saved(tmp_path / "m", gpt2, more=2, pad_token="x1")
    pipeline = generator(path)
    examples = [Example("w1", "w2", "1"), Example("w1 w2 w3", "w4", "1", place="a.jsonl, line 2")]
    assert pipeline.evaluate(pipeline.load_base(), examples, reporter=Silent(), label="").examples == 2
    beyond = [*examples, Example("w1 x0", "w4", "1", place="a.jsonl, line 3")]
    message = (
        "a.jsonl, line 3: the text has token 'x0', number 40, .* embeddings for 40 tokens only .its tokenizer knows 42"
    )
    with pytest.raises(DataError, match=message):
        pipeline.encode(beyond)
    with pytest.raises(DataError, match=message):
        pipeline.evaluate(pipeline.load_base(), beyond, reporter=Silent(), label="")
    pipeline = classifier(path)
    texts = [LabelledText("w1", "0"), LabelledText("w1 w2", "1"), LabelledText("x0", "1", place="a.jsonl, line 3")]
    assert pipeline.evaluate(pipeline.load_base(), texts[:2], reporter=Silent(), label="").examples == 2
    with pytest.raises(DataError, match=message):
        pipeline.encode(texts)
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "unk_token"):
        config[name] = "x0"
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="pads with token 41, and the model has embeddings for 40 tokens only"):
        classifier(path)
