"""The adapted layer against the dense formula W' = U (S + T) V^T in float64, and what it keeps."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from pica import SvftConfig
from pica.errors import TargetError
from pica.tuners.base.bank import SVFT_BANK
from tests.shared import Blocks, layers_of

PATTERNS = {
    "plain": {},
    "narrow band": {"pattern": "banded", "off_diagonals": 1},
    "wide band": {"pattern": "banded", "off_diagonals": 7},
    "random": {"pattern": "random", "off_diagonals": 2},
    "top_k": {"pattern": "top_k", "off_diagonals": 2},
}


def dense_formula(model: nn.Module, x: Tensor, name: str = "default") -> Tensor:
    """U (S + T) V^T x + b with torch's own decomposition, T filled in entry by entry."""
    total = torch.zeros((), dtype=torch.float64)
    for layer in layers_of(model):
        base = cast(nn.Linear, layer.get_base_layer())
        u, s, vt = torch.linalg.svd(base.weight.detach().double(), full_matrices=False)
        right = layer.method.sides(name)[1].double()
        signs = (vt * right).sum(1).sign()  # the layer's own, which a solver leaves open
        u, vt = u * signs, vt * signs[:, None]
        t = torch.zeros(len(s), len(s), dtype=torch.float64)
        for position, value in zip(layer.method.positions(name).tolist(), layer.matrix(name).detach().double()):
            t[position // len(s), position % len(s)] = value
        total = total + x.double() @ (u @ (torch.diag(s) + t) @ vt).T + base.bias.detach().double()
    return total


@pytest.mark.parametrize("share", ["none", "role"])
@pytest.mark.parametrize(("inn", "out"), [(24, 24), (24, 30), (30, 24), (24, 60)], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_layer_is_the_dense_formula(pattern, inn, out, share):
    config = SvftConfig(target_modules=["fc"], init_weights=False, share=share, **PATTERNS[pattern])
    model = get_peft_model(Blocks(inn, out, bias=True).double(), config)
    x = torch.randn(5, inn, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        found = model(x)
        assert (found - model.get_base_model()(x)).abs().max() < 1e-12
        with model.disable_adapter():
            assert (model(x) - found).abs().max() > 1.0
        torch.testing.assert_close(found, dense_formula(model, x), atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(model.merge_and_unload()(x), found, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_are_those_of_the_dense_formula(pattern):
    config = SvftConfig(target_modules=["fc"], init_weights=False, share="role", **PATTERNS[pattern])
    model = get_peft_model(Blocks(24, 30, bias=True).double(), config)
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (model(x) * weights).sum().backward()
    (parameter,) = [p for p in model.parameters() if p.requires_grad]
    wanted_t = torch.zeros(24, 24, dtype=torch.float64)
    wanted_x = torch.zeros_like(x)
    for layer in layers_of(model):
        left, right = layer.method.sides("default")
        wanted_t += (weights.flatten(0, 1) @ left).T @ (x.detach().flatten(0, 1) @ right.T)
        merged = cast(nn.Linear, layer.get_base_layer()).weight.detach() + layer.get_delta_weight("default")
        wanted_x += weights @ merged
    torch.testing.assert_close(parameter.grad, wanted_t.flatten()[layer.method.positions("default").long()])
    torch.testing.assert_close(x.grad, wanted_x)


def test_the_adapter_starts_as_the_base_model_and_trains_its_entries_only():
    base = Blocks(24, 30, bias=True)
    x = torch.randn(5, 24)
    expected = base(x)
    model = get_peft_model(base, SvftConfig(target_modules=["fc"]))
    assert torch.equal(model(x), expected)
    model(x).square().sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.grad is not None}
    assert {n.split(".")[-3] for n in trained} == {SVFT_BANK}
    assert [tuple(p.shape) for p in trained.values()] == [(24,)] * 3
    assert all(p.grad.abs().min() > 0 for p in trained.values())  # pyright: ignore


def test_directions_that_the_weight_does_not_have_are_without_effect():
    base = Blocks(24, 30, count=1, bias=True)
    with torch.no_grad():
        base.layers[0]["fc"].weight[6:] = 0.0  # pyright: ignore
    model = get_peft_model(base, SvftConfig(target_modules=["fc"], init_weights=False))
    (layer,) = layers_of(model)
    delta = layer.get_delta_weight("default")
    assert int(torch.linalg.matrix_rank(delta)) == 6
    assert delta[6:].abs().max() < 1e-6
    model(torch.randn(4, 24)).sum().backward()
    grad = layer.matrix("default").grad
    assert grad is not None
    assert not grad[6:].any()
    assert grad[:6].all()


def test_shared_top_k_entries_are_those_that_align_most_over_the_group():
    model = get_peft_model(
        Blocks(24, 24, bias=True), SvftConfig(target_modules=["fc"], pattern="top_k", off_diagonals=1, share="role")
    )
    layers = layers_of(model)
    total = torch.zeros(24, 24)
    for layer in layers:
        left, right = layer.method.sides("default")
        total += (left.T @ right.T).square()
    wanted = total.flatten().topk(70).indices.sort().values
    for layer in layers:
        assert torch.equal(layer.method.positions("default").long(), wanted)


def test_targets_that_cannot_be_adapted_are_errors(tiny_llama):
    with pytest.raises(TargetError, match=r"embed_tokens \(Embedding\) is not supported: SVFT adapts linear layers"):
        get_peft_model(tiny_llama(), SvftConfig(target_modules=["embed_tokens"]))
