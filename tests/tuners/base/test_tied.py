"""An output head that shares its weight with the input embedding: the embedding stays what it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import pica
from pica import PicaConfig, SvftConfig
from tests.shared import logits


@pytest.mark.filterwarnings("ignore:Model has `tie_word")
@pytest.mark.parametrize("method", [PicaConfig(r=4), SvftConfig()], ids=["pica", "svft"])
def test_a_merge_leaves_the_embedding_and_unmerge_ties_again(method: Any, tiny_llama, tmp_path: Path):
    method.target_modules, method.init_weights = {"lm_head", "v_proj"}, False
    base = tiny_llama(tie_word_embeddings=True)
    embedding: Any = base.get_input_embeddings().weight
    before = embedding.detach().clone()
    assert base.lm_head.weight is embedding
    model = get_peft_model(base, method)
    apart = logits(model)
    with pytest.warns(UserWarning, match=r"weight of lm_head is tied to another module's"):
        model.merge_adapter()
    torch.testing.assert_close(logits(model), apart, atol=1e-4, rtol=1e-4)
    assert torch.equal(embedding, before)
    model.unmerge_adapter()
    assert base.lm_head.get_base_layer().weight is embedding
    assert torch.equal(embedding, before)

    model.save_pretrained(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=True), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), apart, atol=1e-6, rtol=1e-6)
    pica.export_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=True), tmp_path / "lora")
    torch.testing.assert_close(logits(lora), apart, atol=1e-4, rtol=1e-4)

    with pytest.warns(UserWarning, match="no longer tied"):
        merged = model.merge_and_unload()
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(str(tmp_path / "merged"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), apart, atol=1e-4, rtol=1e-4)
    table: Any = again.get_input_embeddings()
    assert torch.equal(table.weight, before)


def test_heads_of_their_own_are_merged_in_place(tiny_llama, recwarn):
    base = tiny_llama(tie_word_embeddings=False)
    weight = base.lm_head.weight
    model = get_peft_model(base, PicaConfig(r=4, target_modules=["lm_head"], init_weights=False))
    model.merge_adapter()
    assert base.lm_head.get_base_layer().weight is weight
    assert not [w for w in recwarn if "tied" in str(w.message)]
