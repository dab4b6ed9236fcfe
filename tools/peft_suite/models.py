"""Tiny models under the names that PEFT's tests fetch from the Hub, laid out as a local Hub cache.

Every model is a real architecture with random weights from a fixed seed. With the cache in place and `HF_HUB_OFFLINE=1`,
`from_pretrained` needs neither a network nor a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tr

COMMIT = "0" * 40  # the only revision of each model
VOCABULARY = 1024

_LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}


def _gpt2() -> tr.PreTrainedModel:
    config = tr.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=128,
        n_embd=32,
        n_layer=3,
        n_head=4,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tr.GPT2LMHeadModel(config)


def _gptj() -> tr.PreTrainedModel:
    config = tr.GPTJConfig(
        vocab_size=VOCABULARY,
        n_positions=128,
        n_embd=32,
        n_layer=3,
        n_head=4,
        rotary_dim=4,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tr.GPTJForCausalLM(config)


def _opt() -> tr.PreTrainedModel:
    config = tr.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        word_embed_proj_dim=16,
        ffn_dim=4,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        init_std=0.1,
    )
    return tr.OPTForCausalLM(config)


def _gemma3() -> tr.PreTrainedModel:
    config = tr.Gemma3TextConfig(**{**_LLAMA_LIKE, "head_dim": 8, "sliding_window": 16})  # pyright: ignore
    return tr.Gemma3ForCausalLM(config)


def _t5() -> tr.PreTrainedModel:
    config = tr.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=37,
        num_layers=3,
        num_heads=4,
        initializer_factor=0.5,
    )
    config.decoder_start_token_id = 0
    return tr.T5ForConditionalGeneration(config)


def _bart() -> tr.PreTrainedModel:
    config = tr.BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=64,
        init_std=0.3,
        forced_eos_token_id=None,  # pyright: ignore[reportCallIssue] - a field of older versions
    )
    return tr.BartForConditionalGeneration(config)


def _deberta(version: int) -> tr.PreTrainedModel:
    shape = {**_BERT_LIKE, "relative_attention": True, "position_biased_input": False, "pos_att_type": ["c2p", "p2c"]}
    if version == 1:
        return tr.DebertaModel(tr.DebertaConfig(**shape))
    return tr.DebertaV2Model(tr.DebertaV2Config(**shape))


def _roberta_config() -> tr.RobertaConfig:
    return tr.RobertaConfig(**{**_BERT_LIKE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2})


def _gpt_neox() -> tr.PreTrainedModel:
    config = tr.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.1,
    )
    return tr.GPTNeoXForCausalLM(config)


MODELS: dict[str, Callable[[], tr.PreTrainedModel]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt,
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _gpt2,
    "peft-internal-testing/opt-125m": _opt,
    "hf-internal-testing/tiny-random-gpt2": _gpt2,
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": _gpt_neox,
    "peft-internal-testing/tiny-random-GPTJForCausalLM": _gptj,
    "trl-internal-testing/tiny-random-LlamaForCausalLM": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**_LLAMA_LIKE)),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**_LLAMA_LIKE)),
    "hf-internal-testing/tiny-random-MistralForCausalLM": lambda: tr.MistralForCausalLM(
        tr.MistralConfig(**_LLAMA_LIKE)
    ),
    "peft-internal-testing/tiny-dummy-qwen2": lambda: tr.Qwen2ForCausalLM(tr.Qwen2Config(**_LLAMA_LIKE)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": _gemma3,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _t5,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": _t5,
    "peft-internal-testing/tiny-random-t5": _t5,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _bart,
    "peft-internal-testing/tiny-random-BertModel": lambda: tr.BertModel(tr.BertConfig(**_BERT_LIKE)),
    "peft-internal-testing/tiny-random-RobertaModel": lambda: tr.RobertaModel(_roberta_config()),
    "peft-internal-testing/tiny-random-DebertaModel": lambda: _deberta(1),
    "peft-internal-testing/tiny-random-DebertaV2Model": lambda: _deberta(2),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": lambda: tr.BertForSequenceClassification(
        tr.BertConfig(**_BERT_LIKE)
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: tr.RobertaForSequenceClassification(
        _roberta_config()
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": lambda: tr.LlamaForSequenceClassification(
        tr.LlamaConfig(**_LLAMA_LIKE)
    ),
}
PIPELINE = "hf-internal-testing/tiny-sd-pipe"


def snapshot_dir(hub: Path, name: str) -> Path:
    """Folder of the model `name` in the Hub cache `hub`."""
    return hub / f"models--{name.replace('/', '--')}" / "snapshots" / COMMIT


def build_hub(hub: Path) -> None:
    """Write all models into the Hub cache folder `hub`, which the caller passes on as HF_HUB_CACHE."""
    tokenizer = _tokenizer()
    for name in [*MODELS, PIPELINE]:
        refs = snapshot_dir(hub, name).parent.parent / "refs"
        refs.mkdir(parents=True)
        (refs / "main").write_text(COMMIT)
    with torch.random.fork_rng(devices=[]):
        for name, make in MODELS.items():
            torch.manual_seed(0)
            make().save_pretrained(snapshot_dir(hub, name))
            tokenizer.save_pretrained(snapshot_dir(hub, name))
        torch.manual_seed(0)
        _stable_diffusion(snapshot_dir(hub, PIPELINE))


def _stable_diffusion(folder: Path) -> None:
    """A Stable Diffusion pipeline of four tiny parts."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    )
    sizes: dict[str, Any] = {  # diffusers' annotations allow one block only
        "block_out_channels": (32, 64),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    vae = AutoencoderKL(latent_channels=4, **sizes)
    text_config = tr.CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=tr.CLIPTextModel(text_config),
        tokenizer=_tokenizer(),  # pyright: ignore[reportArgumentType] - any tokenizer does
        scheduler=DDIMScheduler(clip_sample=False),  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    ).save_pretrained(folder)


def _tokenizer() -> tr.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"word{i}" for i in range(VOCABULARY - 4))]
    words[4:4] = ["this", "is", "a", "test", "prompt"]
    vocabulary = {word: i for i, word in enumerate(words[:VOCABULARY])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return tr.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=77,
    )
