"""The adapted layer against the dense formula W' = U (S + T) V^T in float64, and what it keeps."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pica import SvftConfig, coverage
from pica.errors import BasisError, ConfigError, TargetError
from pica.tuners.base.bank import SVFT_BANK, get_bank
from pica.tuners.svft.layer import SvftLinear

PATTERNS = {
    "plain": {},
    "narrow band": {"pattern": "banded", "off_diagonals": 1},
    "wide band": {"pattern": "banded", "off_diagonals": 7},
    "random": {"pattern": "random", "off_diagonals": 2},
    "top_k": {"pattern": "top_k", "off_diagonals": 2},
}


class Blocks(nn.Module):
    def __init__(self, inn: int, out: int, count: int = 3, bias: bool = True) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(inn, out, bias=bias)}) for _ in range(count))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([block["fc"](x) for block in self.layers]).sum(0)  # pyright: ignore


def layers_of(model: nn.Module) -> list[SvftLinear]:
    return [m for m in model.modules() if isinstance(m, SvftLinear)]


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
    model = get_peft_model(Blocks(inn, out).double(), config)
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
    model = get_peft_model(Blocks(24, 30).double(), config)
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
    base = Blocks(24, 30)
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
    base = Blocks(24, 30, count=1)
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


def test_one_pair_of_sides_serves_every_adapter():
    model = get_peft_model(Blocks(24, 30), SvftConfig(target_modules=["fc"]))
    model.add_adapter("b", SvftConfig(target_modules=["fc"], pattern="top_k", off_diagonals=2))
    for layer in layers_of(model):
        sides = {name: tuple(b.shape) for name, b in layer.named_buffers() if "basis" in name}
        assert sides == {"svft_basis_left_w": (30, 24), "svft_basis_right_w": (24, 24)}
    assert not [k for k in model.state_dict() if "svft_basis" in k]


def test_shared_top_k_entries_are_those_that_align_most_over_the_group():
    model = get_peft_model(
        Blocks(24, 24), SvftConfig(target_modules=["fc"], pattern="top_k", off_diagonals=1, share="role")
    )
    layers = layers_of(model)
    total = torch.zeros(24, 24)
    for layer in layers:
        left, right = layer.method.sides("default")
        total += (left.T @ right.T).square()
    wanted = total.flatten().topk(70).indices.sort().values
    for layer in layers:
        assert torch.equal(layer.method.positions("default").long(), wanted)


def test_a_weight_that_is_not_finite_is_named_and_the_model_left_as_it_was():
    base = Blocks(8, 8)
    base.layers[1]["fc"].weight.data[0, 0] = float("nan")  # pyright: ignore
    with pytest.raises(BasisError, match=r"layers\.1\.fc: the frozen weight holds NaN"):
        get_peft_model(base, SvftConfig(target_modules=["fc"]))
    assert not layers_of(base)
    assert SVFT_BANK not in dict(base.named_children())


def test_targets_that_cannot_be_adapted_are_errors(tiny_llama):
    with pytest.raises(TargetError, match=r"embed_tokens \(Embedding\) is not supported: SVFT adapts linear layers"):
        get_peft_model(tiny_llama(), SvftConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ConfigError, match="it has none"):
        coverage(tiny_llama())


@pytest.mark.parametrize("pattern", ["random", "top_k"])
def test_weights_on_the_meta_device_wait_until_they_are_there(tiny_llama, pattern):
    config = SvftConfig(pattern=pattern, off_diagonals=2, share="role")
    real, ids = tiny_llama(), torch.arange(3, 12).unsqueeze(0)
    with torch.device("meta"):
        model = get_peft_model(AutoModelForCausalLM.from_config(real.config), config)
    inner = model.get_base_model()
    names = {k.replace(".base_layer", ""): k for k in inner.state_dict() if SVFT_BANK not in k}
    inner.load_state_dict({names[k]: v for k, v in real.state_dict().items()}, assign=True, strict=False)
    eager = get_peft_model(tiny_llama(), config)
    bank, ready = get_bank(inner, SVFT_BANK), get_bank(eager.get_base_model(), SVFT_BANK)
    assert bank is not None
    assert ready is not None
    slot, of_ready = bank.matrices("default"), ready.matrices("default")
    with torch.no_grad():
        for group, values in of_ready.items():
            values.copy_(torch.linspace(-0.2, 0.2, len(values)))
            slot[group] = nn.Parameter(values.clone())
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta and "positions" not in name:  # rotary tables, which no state dict holds
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], real.get_buffer(name.removeprefix("base_model.model.")))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, eager(ids).logits)
        assert (model(ids).logits - real(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_precisions_of_the_entries_and_the_sides(tiny_llama, dtype):
    model = get_peft_model(tiny_llama(dtype=dtype), SvftConfig(pattern="banded", off_diagonals=1))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.promote_types(dtype, torch.float32)}
    assert {side.dtype for layer in layers_of(model) for side in layer.method.sides("default")} == {dtype}


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 0, 24), (2, 3, 4, 24)], ids=str)
@pytest.mark.parametrize("pattern", ["plain", "narrow band", "random"])
def test_any_number_of_leading_dimensions_zero_tokens_included(shape, pattern):
    config = SvftConfig(target_modules=["fc"], init_weights=False, **PATTERNS[pattern])
    model = get_peft_model(Blocks(24, 30, count=1), config)
    x = torch.randn(shape)
    y = model(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 30)
    torch.testing.assert_close(y, model.merge_and_unload()(x), atol=1e-3, rtol=1e-4)
