"""Embeddings on request: the linear layer of one-hot inputs, whose output is all that the update needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import pica
from pica import PicaConfig, SvftConfig
from pica.errors import ExportError, TargetError
from pica.tuners.pica.layer import PicaLinear
from tests.families import make

IDS = torch.tensor([[3, 7, 7, 11, 0], [5, 4, 3, 2, 63]])


def logits(model: nn.Module, **more: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS, **more).logits


def adapted(name: str, **settings: Any) -> Any:
    config = PicaConfig(**{"r": 5, "target_modules": ["embed_tokens"], "init_weights": False, **settings})
    return get_peft_model(make(name), config)


# Gemma multiplies what it looks up
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
@pytest.mark.parametrize("projection", ["principal", "random"])
def test_the_update_is_that_of_the_formula(name: str, projection: Any):
    model = adapted(name, projection=projection).double()
    (layer,) = [m for m in model.modules() if isinstance(m, PicaLinear)]
    table: Any = layer.get_base_layer()
    weight = table.weight.detach().T  # (out, in): width, vocabulary
    projection_key = layer.bases.key_of["default"]
    rows = layer.method.directions(projection_key, weight)
    if projection == "principal":
        assert layer.bases.side(projection_key) == "out"
        plain = torch.linalg.svd(weight, full_matrices=False)[2][:5]
        plain = plain * torch.sign((plain * rows).sum(1, keepdim=True))
        torch.testing.assert_close(rows, plain, atol=1e-4, rtol=1e-4)  # the basis was solved in float32
    full = weight + layer.matrix("default").detach() @ rows
    scale = getattr(table, "embed_scale", torch.ones(()))
    torch.testing.assert_close(layer(IDS), full.T[IDS] * scale, atol=1e-9, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:Model has `tie_word")
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM"])  # the second one's head is tied to it
def test_trained_saved_loaded_merged_and_exported(name: str, tmp_path: Path):
    base = logits(make(name))
    model: Any = adapted(name, target_modules=["embed_tokens", "q_proj"], init_weights=True)
    torch.testing.assert_close(logits(model), base, atol=1e-6, rtol=1e-6)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    for _ in range(2):
        model(IDS).logits.square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
        optimizer.step()
        optimizer.zero_grad()
    after = logits(model)
    assert (after - base).abs().max() > 1e-3 * after.abs().max()
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(make(name), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), after, atol=1e-6, rtol=1e-6)
    pica.export_lora(loaded, tmp_path / "lora")
    lora = PeftModel.from_pretrained(make(name), tmp_path / "lora")
    assert isinstance(lora.base_model, peft.LoraModel)
    torch.testing.assert_close(logits(lora), after, atol=1e-5, rtol=1e-4)
    with pytest.raises(ExportError, match="vllm cannot load a LoRA on an embedding"):
        pica.export_lora(loaded, tmp_path / "served", engine="vllm")
    merging: Any = loaded
    head = merging.get_base_model().get_output_embeddings().weight.detach().clone()
    merged = merging.merge_and_unload()
    torch.testing.assert_close(logits(merged), after, atol=1e-5, rtol=1e-4)
    assert torch.equal(merged.get_output_embeddings().weight, head)


def test_a_mixed_batch_looks_up_in_each_samples_own_table():
    model = adapted("LlamaForCausalLM")
    model.add_adapter("b", PicaConfig(r=2, target_modules=["embed_tokens"], init_weights=False))
    mixed = logits(model, adapter_names=["default", "b"])
    torch.testing.assert_close(mixed[:1], logits(model)[:1])
    model.set_adapter("b")
    torch.testing.assert_close(mixed[1:], logits(model)[1:])


def test_svft_and_tables_that_renormalise_are_refused():
    with pytest.raises(TargetError, match=r"embed_tokens \(Embedding\) is not supported: SVFT"):
        get_peft_model(make("LlamaForCausalLM"), SvftConfig(target_modules=["embed_tokens"]))
    table = nn.Sequential(nn.Embedding(8, 4, max_norm=1.0))
    with pytest.raises(TargetError, match="embeddings without max_norm"):
        get_peft_model(table, PicaConfig(r=2, target_modules=["0"]))
