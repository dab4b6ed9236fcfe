"""Packed rows train as single ones do."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from pica.errors import ConfigError
from pica.experiments.chat.packing import PackedCollator, as_dataset, check_packing, packed
from pica.experiments.chat.rendering import Rows


def llama(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config._attn_implementation = attention
    return LlamaForCausalLM(config).double()


def some_rows() -> Rows:
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 64, (length,), generator=g).tolist() for length in (5, 9, 3, 12, 7, 4)]
    labels = [[-100, -100, *row[2:]] for row in ids]
    return Rows(ids, labels, list(range(len(ids))))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradients_of_packed_rows_are_those_of_single_ones(attention: str):
    model, rows = llama(attention), some_rows()
    dataset = packed(as_dataset(rows), max_length=16)
    assert len(dataset) < len(rows.input_ids)
    assert sum(map(sum, dataset["seq_lengths"])) == sum(map(len, rows.input_ids))
    batch = PackedCollator(padding=0)(list(dataset))  # pyright: ignore[reportArgumentType]
    together = model(**batch, use_cache=False).loss  # as TRL's trainer calls it: with a cache positions are not heeded
    together.backward()
    assert model.lm_head.weight.grad is not None
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()
    count = sum(label != -100 for row in rows.labels for label in row)
    alone = torch.zeros((), dtype=torch.float64)
    for ids, labels in zip(rows.input_ids, rows.labels):
        tokens = sum(label != -100 for label in labels)
        alone = alone + model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss * tokens / count
    alone.backward()
    torch.testing.assert_close(together.double(), alone, rtol=1e-6, atol=0)  # transformers takes losses in float32
    torch.testing.assert_close(gradient, model.lm_head.weight.grad, rtol=1e-5, atol=1e-9)


def test_models_that_heed_positions_pass_and_others_are_refused():
    check_packing(llama("sdpa").float(), 0)
    torch.manual_seed(0)
    check_packing(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)), 0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(ConfigError, match="trainer.packing: in this model packed sequences see each other"):
        check_packing(mamba, 0)
