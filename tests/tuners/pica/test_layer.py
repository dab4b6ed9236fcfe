"""PiCa's layer by itself: what it keeps for the backward pass, awkward weights, targets and coverage."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from pica import PicaConfig, coverage
from pica.errors import ConfigError, TargetError
from tests.shared import Blocks, layers_of


@pytest.mark.parametrize(("inn", "out"), [(48, 32), (32, 48)], ids=["output side", "input side"])
def test_only_h_is_saved_for_backward(inn, out):
    """Of each token the adapter keeps r numbers; nothing as wide as the layer's input or output."""
    rank, tokens = 4, 7
    model = get_peft_model(Blocks(inn, out, count=1), PicaConfig(r=rank, target_modules=["fc"]))
    (layer,) = layers_of(model)
    matrix = layer.matrix("default")
    projector = layer.bases.rows("principal")
    assert projector is not None
    known = {p.data_ptr() for p in (matrix, projector, layer.weight)}
    saved: list[Tensor] = []
    x = torch.randn(tokens, inn, requires_grad=True)

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    assert sum(t.numel() * t.element_size() for t in saved) == rank * tokens * 4
    y.sum().backward()
    assert matrix.grad is not None


def test_a_rank_beyond_the_layer_uses_what_it_has_and_warns_once():
    with pytest.warns(
        UserWarning, match=r"larger than what some layers allow.*layers\.0\.fc \(32 x 48: 32\) and 2 more"
    ) as seen:
        model = get_peft_model(Blocks(48, 32), PicaConfig(r=100, target_modules=["fc"]))
    assert len([w for w in seen if "PiCa" in str(w.message)]) == 1
    assert [tuple(p.shape) for p in model.parameters() if p.requires_grad] == [(32, 32)]


def test_rank_deficient_and_zero_weights_use_the_directions_they_have():
    base = Blocks(48, 32)
    with torch.no_grad():
        base.layers[1]["fc"].weight.copy_(torch.ones(32, 1) @ torch.arange(48.0)[None])  # pyright: ignore
        base.layers[2]["fc"].weight.zero_()  # pyright: ignore
    with pytest.warns(UserWarning, match=r"fewer directions.*1 of 4"):
        model = get_peft_model(base, PicaConfig(r=4, target_modules=["fc"], init_weights=False))
    assert [layer.method.usable_rank("default") for layer in layers_of(model)] == [4, 1, 0]
    x = torch.randn(5, 48)
    with torch.no_grad():
        apart = model(x)
        assert torch.isfinite(apart).all()
        torch.testing.assert_close(model.merge_and_unload()(x), apart, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "q_prjo"], r"\{'q_prjo'\} not found.*near: .*q_proj"),
        (["zzz"], r"\{'zzz'\} not found.*Its modules are named: .*q_proj"),
        (r".*\.qq_proj", r"not found.*near: .*q_proj"),
        (["input_layernorm"], r"input_layernorm \(LlamaRMSNorm\) is not supported"),
    ],
)
def test_targets_that_match_nothing_or_cannot_be_adapted_are_errors(tiny_llama, targets, message):
    base = tiny_llama()
    with pytest.raises(TargetError, match=message):
        get_peft_model(base, PicaConfig(r=4, target_modules=targets))
    assert not layers_of(base)


def test_coverage_tells_pattern_layers_shapes_group_and_parameters(tiny_llama):
    config = PicaConfig(r=4, target_modules=["q_proj", "mlp.down_proj"], rank_pattern={"down_proj": 6})
    table = coverage(get_peft_model(tiny_llama(), config))
    rows = {row.pattern: row for row in table.rows}
    assert set(rows) == {"q_proj", "mlp.down_proj"}
    assert (rows["q_proj"].layers, rows["q_proj"].shapes, rows["q_proj"].trainable) == (3, ((64, 64),), 256)
    assert (rows["mlp.down_proj"].rank, rows["mlp.down_proj"].trainable) == (6, 64 * 6)
    assert table.trainable == 256 + 384
    assert table.layers == 6
    for part in ("q_proj", "64x112", "model-layers-N-mlp-down_proj-64", "640"):
        assert part in str(table)


def test_coverage_of_a_model_without_adapters_is_an_error(tiny_llama):
    with pytest.raises(ConfigError, match="it has none"):
        coverage(tiny_llama())


def test_layers_to_transform_and_exclude_modules(tiny_llama):
    some = get_peft_model(tiny_llama(), PicaConfig(r=4, target_modules=["q_proj"], layers_to_transform=[0, 2]))
    assert [layer.path.split(".")[2] for layer in layers_of(some)] == ["0", "2"]
    rest = get_peft_model(
        tiny_llama(), PicaConfig(r=4, target_modules="all-linear", exclude_modules=["down_proj", "lm_head"])
    )
    assert {layer.path.split(".")[-1] for layer in layers_of(rest)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("projection", ["principal", "minor"])
def test_half_precision_computes_what_a_merge_adds(projection, dtype):
    """The output of a wide layer says little about directions that it all but suppresses."""
    linear = nn.Linear(96, 24, bias=False)
    u, _, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    linear.weight.data = (u * torch.logspace(0, -3, 24)) @ v
    base = nn.Sequential(linear)
    settings = PicaConfig(r=4, target_modules=["0"], projection=projection, init_weights=False)
    model = get_peft_model(base.to(dtype), settings)  # pyright: ignore[reportArgumentType]
    (layer,) = layers_of(model)
    x = torch.randn(200, 96).to(dtype)
    with torch.no_grad():
        found = model(x).float() - layer.get_base_layer()(x).float()
        expected = x.float() @ layer.get_delta_weight("default").float().T
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("inn", "out"), [(192, 48), (48, 192), (48, 48)])
@pytest.mark.parametrize("rank", [1, 3, 30, 48])
def test_half_precision_of_low_rank_computes_what_a_merge_adds(rank, inn, out, dtype):
    base = Blocks(inn, out, count=1)
    left, right = torch.randn(out, rank), torch.randn(rank, inn)
    (weight,) = base.parameters()
    weight.data = left @ right / (inn * rank) ** 0.5 if rank < 48 else torch.randn(out, inn) / 14
    model = get_peft_model(base.to(dtype), PicaConfig(r=8, target_modules=["fc"], init_weights=False))
    (layer,) = layers_of(model)
    assert layer.method.usable_rank("default") == min(rank, 8)
    layer.matrix("default").data.mul_(3)
    x = torch.randn(64, inn).to(dtype)
    with torch.no_grad():
        update = model(x).double() - x.double() @ layer.frozen.read().double().T
        exact = x.double() @ layer.get_delta_weight("default").double().T
    assert float((update - exact).norm() / exact.norm()) < 0.01
