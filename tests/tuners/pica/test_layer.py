"""The adapted layer by itself: what it saves, what it holds, awkward weights, targets and coverage."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pica import PicaConfig, coverage
from pica.errors import BasisError, ConfigError, TargetError
from pica.tuners.base.bank import get_bank
from pica.tuners.pica.layer import PicaLinear


class Blocks(nn.Module):
    def __init__(self, inn: int = 48, out: int = 32, count: int = 3, bias: bool = False) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(inn, out, bias=bias)}) for _ in range(count))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=g)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([block["fc"](x) for block in self.layers]).sum(0)  # pyright: ignore


def layers_of(model: nn.Module) -> list[PicaLinear]:
    return [m for m in model.modules() if isinstance(m, PicaLinear)]


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


def test_one_projector_serves_every_adapter_of_its_projection():
    model = get_peft_model(Blocks(), PicaConfig(r=4, target_modules=["fc"]))
    model.add_adapter("wider", PicaConfig(r=9, target_modules=["fc"]))
    model.add_adapter("narrow", PicaConfig(r=2, target_modules=["fc"]))
    model.add_adapter("other", PicaConfig(r=3, target_modules=["fc"], projection="random"))
    for layer in layers_of(model):
        shapes = {name: tuple(b.shape) for name, b in layer.named_buffers() if name.startswith("pica_basis")}
        assert shapes == {"pica_basis_principal": (9, 32), "pica_basis_random_0": (3, 48)}
    assert not [k for k in model.state_dict() if "pica_basis" in k]


def test_a_rank_beyond_the_layer_uses_what_it_has_and_warns_once():
    with pytest.warns(
        UserWarning, match=r"larger than what some layers allow.*layers\.0\.fc \(32 x 48: 32\) and 2 more"
    ) as seen:
        model = get_peft_model(Blocks(), PicaConfig(r=100, target_modules=["fc"]))
    assert len([w for w in seen if "PiCa" in str(w.message)]) == 1
    assert [tuple(p.shape) for p in model.parameters() if p.requires_grad] == [(32, 32)]


def test_rank_deficient_and_zero_weights_use_the_directions_they_have():
    base = Blocks()
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


def test_a_weight_that_is_not_finite_is_named_and_the_model_left_as_it_was():
    base = Blocks()
    base.layers[1]["fc"].weight.data[0, 0] = float("nan")  # pyright: ignore
    with pytest.raises(BasisError, match=r"layers\.1\.fc: the frozen weight holds NaN"):
        get_peft_model(base, PicaConfig(r=4, target_modules=["fc"]))
    assert not layers_of(base)
    assert "pica_M" not in dict(base.named_children())


def test_weights_on_the_meta_device_wait_until_they_are_there(tiny_llama, tmp_path):
    real = tiny_llama()
    ids = torch.arange(3, 12).unsqueeze(0)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(real.config)
    model = get_peft_model(empty, PicaConfig(r=8))
    assert all(layer.bases.rows("principal") is None for layer in layers_of(model))
    with pytest.raises(BasisError, match="meta device"):
        layers_of(model)[0].frozen.read()
    state = real.state_dict()
    names = {k.replace(".base_layer", ""): k for k in model.get_base_model().state_dict() if "pica_M" not in k}
    inner = model.get_base_model()
    inner.load_state_dict({names[k]: v for k, v in state.items()}, assign=True, strict=False)
    bank = get_bank(inner)
    assert bank is not None
    slot = bank.matrices("default")
    for group in list(slot):
        slot[group] = nn.Parameter(torch.zeros(slot[group].shape))
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:  # rotary tables, which no state dict holds
            owner = model.get_submodule(name.rpartition(".")[0])
            setattr(owner, name.rpartition(".")[2], real.get_buffer(name.removeprefix("base_model.model.")))
    eager = get_peft_model(tiny_llama(), PicaConfig(r=8))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, eager(ids).logits)
    for late, early in zip(layers_of(model), layers_of(eager)):
        assert torch.equal(late.bases.rows("principal"), early.bases.rows("principal"))  # pyright: ignore


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


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_precisions_of_the_matrix_and_the_projector(tiny_llama, dtype, expected):
    model = get_peft_model(tiny_llama(dtype=dtype), PicaConfig(r=4))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {expected}
    assert {layer.bases.rows("principal").dtype for layer in layers_of(model)} == {dtype}  # pyright: ignore
    as_base = get_peft_model(tiny_llama(dtype=dtype), PicaConfig(r=4), autocast_adapter_dtype=False)
    assert {p.dtype for p in as_base.parameters() if p.requires_grad} == {dtype}


def test_a_forward_hook_on_the_base_layer_sees_the_base_output():
    """The update is added in place only where nobody else holds the output."""
    model = get_peft_model(Blocks(count=1), PicaConfig(r=4, target_modules=["fc"], init_weights=False))
    (layer,) = layers_of(model)
    seen: list[Tensor] = []
    layer.get_base_layer().register_forward_hook(lambda m, a, out: seen.append(out))  # pyright: ignore
    x = torch.randn(5, 48)
    y = model(x)
    torch.testing.assert_close(seen[0], x @ layer.base_layer.weight.T)  # pyright: ignore
    assert (y - seen[0]).abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(48,), (0, 48), (2, 0, 48), (2, 3, 4, 48)], ids=str)
def test_any_number_of_leading_dimensions_zero_tokens_included(shape):
    model = get_peft_model(Blocks(count=1), PicaConfig(r=4, target_modules=["fc"], init_weights=False))
    x = torch.randn(shape)
    y = model(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 32)
    torch.testing.assert_close(y, model.merge_and_unload()(x), atol=1e-3, rtol=1e-4)


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


def test_a_layer_with_another_methods_adapter_is_refused_by_what_it_is(tiny_llama):
    base = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).get_base_model()
    with pytest.raises(
        TargetError, match=r"q_proj is not supported: it has an adapter of another method \(peft.tuners.lora"
    ):
        get_peft_model(base, PicaConfig(r=4, target_modules=["q_proj"]))
