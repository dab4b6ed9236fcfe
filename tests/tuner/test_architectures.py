"""One tiny model of each family: adapted with default targets, trained, saved, loaded, merged, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import pica
from pica import PicaConfig

WIDTH: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER: dict[str, Any] = {
    "vocab_size": 64,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    **WIDTH,
}
GROUPED = {**DECODER, "num_key_value_heads": 2}
HEADED = {**GROUPED, "head_dim": 8}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}

# class of the model: settings of its configuration
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": GROUPED,
    "MistralForCausalLM": GROUPED,
    "GemmaForCausalLM": HEADED,
    "Gemma2ForCausalLM": HEADED,
    "Gemma3ForCausalLM": HEADED,
    "Qwen2ForCausalLM": GROUPED,
    "Qwen3ForCausalLM": HEADED,
    "SmolLM3ForCausalLM": GROUPED,
    "GraniteForCausalLM": GROUPED,
    "Olmo2ForCausalLM": GROUPED,
    "StableLmForCausalLM": GROUPED,
    "PhiForCausalLM": GROUPED,
    "MixtralForCausalLM": {**GROUPED, "num_local_experts": 2},
    "OPTForCausalLM": {
        "vocab_size": 64,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 32,
        **WIDTH,
    },
    "BloomForCausalLM": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "FalconForCausalLM": {"vocab_size": 64, **WIDTH},
    "MptForCausalLM": {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32},
    "GPT2LMHeadModel": GPT,
    "GPTJForCausalLM": {**GPT, "rotary_dim": 4},
    "CodeGenForCausalLM": {**GPT, "rotary_dim": 4},
    "GPTBigCodeForCausalLM": GPT,
    "GPTNeoXForCausalLM": DECODER,
    "BertForMaskedLM": DECODER,
    "RobertaForMaskedLM": {**DECODER, "max_position_embeddings": 40},
    "ElectraForMaskedLM": {**DECODER, "embedding_size": 32},
    "DebertaV2ForMaskedLM": DECODER,
    "T5ForConditionalGeneration": {
        "vocab_size": 64,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
    },
    "BartForConditionalGeneration": {
        "vocab_size": 64,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 32,
    },
}
IDS = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(1))


def make(name: str) -> Any:
    kind = getattr(transformers, name)
    config = kind.config_class(**MODELS[name])
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).eval()


def logits(model: nn.Module) -> Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


@pytest.mark.parametrize("name", MODELS)
def test_default_targets_train_save_load_merge_and_export(name: str, tmp_path: Path):
    base = logits(make(name))
    model = get_peft_model(make(name), PicaConfig(r=4))
    assert torch.equal(logits(model), base)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
        optimizer.step()
        optimizer.zero_grad()
    after = logits(model)
    assert not torch.allclose(after, base, atol=1e-4)

    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(make(name), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), after, atol=1e-5, rtol=1e-4)
    pica.export_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(make(name), tmp_path / "lora")
    assert isinstance(lora.base_model, peft.LoraModel)
    torch.testing.assert_close(logits(lora), after, atol=1e-4, rtol=1e-3)
    merged = loaded.merge_and_unload()  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(logits(merged), after, atol=1e-4, rtol=1e-3)
