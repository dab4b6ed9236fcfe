"""Packed rows train as single ones do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import is_flash_attn_2_available
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pica.errors import ConfigError
from pica.experiments.chat import packing
from pica.experiments.chat.packing import BY_SEQUENCE, Collate, PackedCollator, as_dataset, packed, packing_collator
from pica.experiments.chat.rendering import Rows

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def made(config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).double()


def llama(attention: str) -> PreTrainedModel:
    return made(LlamaConfig(**SIZES), attention)


def mistral(attention: str) -> PreTrainedModel:
    """A model whose tokens see the three before them only."""
    return made(MistralConfig(**SIZES, sliding_window=4), attention)


def some_rows() -> Rows:
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 64, (length,), generator=g).tolist() for length in (5, 9, 3, 12, 7, 4)]
    labels = [[-100, -100, *row[2:]] for row in ids]
    return Rows(ids, labels, list(range(len(ids))))


def assert_trains_as_single_rows_do(model: PreTrainedModel, collate: Collate, alone_in: str) -> None:
    """Loss and gradients of a packed batch are those of its rows one by one, with the attention `alone_in`."""
    rows = some_rows()
    dataset = packed(as_dataset(rows), max_length=16)
    assert len(dataset) < len(rows.input_ids)
    assert sum(map(sum, dataset["seq_lengths"])) == sum(map(len, rows.input_ids))
    batch = collate(list(dataset))  # pyright: ignore[reportArgumentType]
    together = model(**batch, use_cache=False).loss  # as TRL's trainer calls it: with a cache positions are not heeded
    together.backward()
    head: torch.Tensor = model.lm_head.weight  # pyright: ignore[reportAssignmentType, reportAttributeAccessIssue]
    assert head.grad is not None
    gradient = head.grad.clone()
    model.zero_grad()
    model.set_attn_implementation(alone_in)
    count = sum(label != -100 for row in rows.labels for label in row)
    alone = torch.zeros((), dtype=torch.float64)
    for ids, labels in zip(rows.input_ids, rows.labels):
        tokens = sum(label != -100 for label in labels)
        alone = alone + model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss * tokens / count
    alone.backward()
    torch.testing.assert_close(together.double(), alone, rtol=1e-6, atol=0)  # transformers takes losses in float32
    torch.testing.assert_close(gradient, head.grad, rtol=1e-5, atol=1e-9)


JOINED = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)


@pytest.mark.parametrize("make", [llama, mistral])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("collate", [PackedCollator(padding=0), JOINED], ids=["apart", "joined"])
def test_loss_and_gradients_of_packed_rows_are_those_of_single_ones(make: Any, attention: str, collate: Collate):
    assert_trains_as_single_rows_do(make(attention), collate, alone_in=attention)


@pytest.mark.parametrize("make", [llama, mistral])
@pytest.mark.parametrize("adapted", [False, True])
def test_rows_are_joined_and_attended_to_sequence_by_sequence_where_the_attention_is_sdpa(
    make: Any, adapted: bool, monkeypatch: pytest.MonkeyPatch
):
    model = make("sdpa")
    outer = get_peft_model(model, LoraConfig(target_modules=["q_proj"])) if adapted else model
    collate = packing_collator(outer, 0)
    assert model.config._attn_implementation == BY_SEQUENCE
    lengths = list[int]()
    real = packing.sdpa_attention_forward

    def noted(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        lengths.append(query.shape[2])
        return real(module, query, *args, **kwargs)

    monkeypatch.setattr(packing, "sdpa_attention_forward", noted)
    rows = some_rows()
    outer(**collate(list(packed(as_dataset(rows), max_length=16))), use_cache=False)  # pyright: ignore[reportArgumentType]
    assert sorted(lengths) == sorted(2 * [len(row) for row in rows.input_ids])  # once in each of two layers
    if not adapted:
        assert_trains_as_single_rows_do(make("sdpa"), collate, alone_in="sdpa")
        assert_trains_as_single_rows_do(model, collate, alone_in="sdpa")


def test_rows_stay_apart_where_attention_knows_no_sequences():
    model = llama("eager")
    assert isinstance(packing_collator(model, 0), PackedCollator)
    assert model.config._attn_implementation == "eager"


def test_rows_stay_apart_where_a_model_has_an_sdpa_of_its_own(monkeypatch: pytest.MonkeyPatch):
    def other(*args: Any, **kwargs: Any) -> Any:
        output, weights = packing.sdpa_attention_forward(*args, **kwargs)
        return 2 * output, weights

    monkeypatch.setattr(packing, "attention_by_sequence", other)
    model = llama("sdpa").float()
    assert isinstance(packing_collator(model, 0), PackedCollator)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.skipif(
    not (is_flash_attn_2_available() and torch.cuda.is_available()),
    reason="flash attention needs its package and an NVIDIA device",
)
def test_flash_attention_is_given_joined_rows():
    model: Any = llama("flash_attention_2")
    model.to("cuda", torch.bfloat16)
    assert packing_collator(model, 0) == JOINED


def test_rows_that_see_each_other_in_a_batch_are_found(monkeypatch: pytest.MonkeyPatch):
    """As with flash attention, which heeds positions in a batch of one row only."""

    def heeds_one_row(self: PackedCollator, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = as_it_was(self, rows)
        if len(rows) > 1:
            batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        return batch

    as_it_was = PackedCollator.__call__
    monkeypatch.setattr(PackedCollator, "__call__", heeds_one_row)
    with pytest.raises(ConfigError, match="packed sequences see each other"):
        packing_collator(llama("eager"), 0)


def test_models_that_heed_positions_pass_and_others_are_refused():
    torch.manual_seed(0)
    packing_collator(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)), 0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(ConfigError, match="trainer.packing: in this model packed sequences see each other"):
        packing_collator(mamba, 0)
