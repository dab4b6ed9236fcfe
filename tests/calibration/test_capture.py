"""Cap: shares of the first gradient against plain autograd in float64, and what the model is left like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

import pica
from pica.calibration.capture import captured_gradient
from pica.calibration.making import directions, target_layers
from pica.errors import BasisError, ConfigError
from pica.theory import random_directions

PATHS = ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"]


def batch(padded: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(3))
    if not padded:
        return {"input_ids": ids, "labels": ids}
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def plain_gradient(model: Any, path: str, read: dict[str, Tensor]) -> Tensor:
    """dL/dW (out, in), float64: of the mean negative log-likelihood of each token that has one before it in its text.

    The model's own loss takes its logits in float32.
    """
    weight: Any = model.get_submodule(path).weight
    logits = model(input_ids=read["input_ids"], attention_mask=read.get("attention_mask")).logits
    guesses = logits[:, :-1].double().log_softmax(-1)
    gold = read["labels"][:, 1:]
    counted = gold != -100
    likelihoods = guesses.gather(-1, gold.clamp(min=0)[..., None])[..., 0][counted]
    return torch.autograd.grad(-likelihoods.mean(), weight)[0].double()


def bases_of(model: Any, paths: list[str], r: int = 6) -> dict[str, dict[str, Tensor]]:
    widths = {path: model.get_submodule(path).in_features for path in paths}
    return {
        name: {path: random_directions(r, width, seed=seed) for path, width in widths.items()}
        for seed, name in enumerate(("one", "other"))
    }


@pytest.mark.parametrize("padded", [True, False])
def test_shares_are_those_of_the_plain_gradient(tiny_llama: Callable[..., Any], padded: bool):
    model = tiny_llama().double().eval()
    bases, read = bases_of(model, PATHS), batch(padded)
    found = captured_gradient(model, bases, read)
    assert list(found) == PATHS
    for path, layer in found.items():
        gradient = plain_gradient(tiny_llama().double().eval(), path, read)
        assert layer.in_features == gradient.shape[1]
        assert layer.energy == pytest.approx(float(gradient.square().sum()), rel=1e-6)
        for name, rows in bases.items():
            held = float((gradient @ rows[path].T).square().sum())
            assert layer.shares[name] == pytest.approx(held / layer.energy, rel=1e-6)
        assert layer.shares["one"] != pytest.approx(layer.shares["other"], rel=1e-3)


def test_the_whole_space_holds_all_and_the_gradients_own_directions_the_most(tiny_llama: Callable[..., Any]):
    model, path = tiny_llama().eval(), PATHS[0]
    best = torch.linalg.svd(plain_gradient(tiny_llama().eval(), path, batch()))[2]
    bases = {"all": {path: torch.eye(64)}, "best": {path: best[:6]}, "worst": {path: best[-6:]}}
    shares = captured_gradient(model, bases, batch())[path].shares
    assert shares["all"] == pytest.approx(1, abs=1e-12)
    assert shares["worst"] < 1e-3 < 6 / 64 < shares["best"] < 1


def test_principal_directions_are_those_of_the_weight(tiny_llama: Callable[..., Any]):
    model: Any = tiny_llama().eval()
    config = pica.PicaConfig(r=6, target_modules=["q_proj", "down_proj"])
    with target_layers(model, config) as layers:
        rows = directions(model, layers, config)
    shares = captured_gradient(model, {"principal": rows}, batch())
    gradient = plain_gradient(tiny_llama().eval(), PATHS[1], batch())
    top = torch.linalg.svd(model.get_submodule(PATHS[1]).weight.detach().double())[2][:6]
    held = float((gradient @ top.T).square().sum() / gradient.square().sum())
    assert shares[PATHS[1]].shares["principal"] == pytest.approx(held, rel=1e-4)


def test_a_weight_that_is_stored_the_other_way_round():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    path = "transformer.h.0.mlp.c_fc"
    rows = random_directions(4, 16, seed=0)
    layer = captured_gradient(model, {"random": {path: rows}}, batch())[path]
    gradient = plain_gradient(model, path, batch()).T
    assert layer.in_features == 16
    assert gradient.shape == (64, 16)
    held = float((gradient @ rows.T).square().sum() / gradient.square().sum())
    assert layer.shares["random"] == pytest.approx(held, rel=1e-5)


def test_the_model_is_left_as_it_was(tiny_llama: Callable[..., Any]):
    model = tiny_llama().train()
    model.get_submodule(PATHS[0]).weight.requires_grad_(False)
    kept = model.get_submodule(PATHS[1]).weight.grad = torch.ones_like(model.get_submodule(PATHS[1]).weight)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    captured_gradient(model, bases_of(model, PATHS), batch())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(module.training for module in model.modules())
    assert model.get_submodule(PATHS[1]).weight.grad is kept
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith(PATHS[1]))


def test_what_has_no_first_gradient_is_refused_in_a_sentence(tiny_llama: Callable[..., Any]):
    model = tiny_llama().eval()
    bases = bases_of(model, PATHS)
    with pytest.raises(ConfigError, match="gives no loss on this batch"):
        captured_gradient(model, bases, {"input_ids": batch()["input_ids"]})
    model.get_submodule(PATHS[0]).weight.data.fill_(float("nan"))
    with pytest.raises(BasisError, match="not finite"):
        captured_gradient(model, bases, batch())
    tied = tiny_llama().eval()
    other = "model.layers.1.self_attn.q_proj"
    tied.get_submodule(other).weight = tied.get_submodule(PATHS[0]).weight
    with pytest.raises(ConfigError, match="one and the same weight"):
        captured_gradient(tied, bases_of(tied, [PATHS[0], other]), batch())


def test_a_layer_that_the_loss_does_not_depend_on():
    small: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert, self.idle = BertModel(BertConfig(vocab_size=96, **small)), nn.Linear(16, 16)

        def forward(self, labels: Tensor, **inputs: Tensor) -> Any:
            found = self.bert(**inputs)
            found.loss = found.pooler_output.square().mean()
            return found

    with pytest.raises(BasisError, match="idle: the loss does not depend on this layer"):
        captured_gradient(Pooled(), {"random": {"idle": torch.eye(16)}}, batch())
