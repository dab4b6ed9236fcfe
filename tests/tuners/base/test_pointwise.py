"""Convolutions with kernel 1 as linear layers over channels: against the plain formula, and in every file."""

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
from pica.errors import TargetError
from pica.tuners.base.layer import SharedLayer
from pica.tuners.pica.layer import PicaLinear

KINDS: dict[str, Any] = {"1d": nn.Conv1d, "2d": nn.Conv2d, "3d": nn.Conv3d}


class Pictures(nn.Module):
    """Two blocks of a convolution of the given kind, and one that nobody adapts."""

    def __init__(self, kind: str = "2d", inn: int = 6, out: int = 10, **settings: Any) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            make = KINDS[kind]
            self.blocks = nn.ModuleList(nn.ModuleDict({"mix": make(inn, out, 1, **settings)}) for _ in range(2))
            self.wide = make(out, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([block["mix"](x) for block in self.blocks]).sum(0)  # pyright: ignore


def pictures(kind: str, channels: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, channels, *(5, 4, 3)[: int(kind[0])], generator=torch.Generator().manual_seed(1), dtype=dtype)


def by_formula(model: nn.Module, adapter: str, x: Tensor) -> Tensor:
    """sum over layers of (W + M P) x + b in float64, P from a plain SVD, its signs those of the layer's own."""
    total = torch.zeros(())
    for layer in (m for m in model.modules() if isinstance(m, PicaLinear)):
        base: Any = layer.base_layer
        weight = base.weight.detach().double().flatten(1)
        own = layer.method.directions(layer.bases.key_of[adapter], layer.frozen.read()).double()
        rows = torch.linalg.svd(weight)[2][: layer.method.rank_of[adapter]]
        rows = rows * torch.sign((rows * own).sum(1, keepdim=True))
        torch.testing.assert_close(own, rows, atol=1e-5, rtol=1e-5)
        full = weight + layer.matrix(adapter).detach().double() @ rows
        steps = (slice(None), slice(None), *(slice(None, None, s) for s in base.stride))
        y = torch.einsum("oi,ni...->no...", full, x[steps].double())
        total = total + y + base.bias.detach().double().view(-1, *[1] * (x.ndim - 2))
    return total


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inn", "out"), [(6, 10), (10, 6)], ids=["input side", "output side"])
@pytest.mark.parametrize("stride", [1, 2])
def test_output_and_gradients_are_those_of_the_formula(kind: str, inn: int, out: int, stride: int):
    model = get_peft_model(Pictures(kind, inn, out, stride=stride).double(), PicaConfig(r=3, target_modules=["mix"]))
    randomise(model)
    (matrix,) = [p for p in model.parameters() if p.requires_grad]
    x = pictures(kind, inn)
    weights = torch.randn(by_formula(model, "default", x).shape, dtype=torch.float64)
    for memory in (x, x.transpose(1, -1).contiguous().transpose(1, -1)):
        memory = memory.detach().requires_grad_()
        y = model(memory)
        torch.testing.assert_close(y, by_formula(model, "default", x), atol=1e-9, rtol=1e-9)
        matrix.grad = None
        (y * weights).sum().backward()
        merged = [
            layer.frozen.read() + layer.get_delta_weight("default").flatten(1)
            for layer in model.modules()
            if isinstance(layer, PicaLinear)
        ]
        steps = (slice(None), slice(None), *[slice(None, None, stride)] * (x.ndim - 2))
        dx = torch.zeros_like(x)
        dx[steps] = sum(torch.einsum("oi,no...->ni...", w, weights) for w in merged)
        assert memory.grad is not None
        torch.testing.assert_close(memory.grad, dx, atol=1e-9, rtol=1e-9)
        assert matrix.grad is not None
        h = sum(
            torch.einsum("ri,ni...->nr...", layer.method.directions("principal", layer.frozen.read()), x[steps])
            for layer in model.modules()
            if isinstance(layer, PicaLinear)
        )
        dm = torch.einsum("nop,nrp->or", weights.flatten(2), h.flatten(2))  # pyright: ignore
        torch.testing.assert_close(matrix.grad, dm, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("method", [PicaConfig(r=3, target_modules=["mix"]), SvftConfig(target_modules=["mix"])])
def test_trained_saved_loaded_merged_unmerged_and_exported(method: Any, tmp_path: Path):
    x = pictures("2d", 6, torch.float32)
    model = get_peft_model(Pictures(), method)
    before = model(x)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        trained = model(x)
        assert trained.square().mean() < before.square().mean()
        model.save_pretrained(str(tmp_path / "adapter"))
        loaded = PeftModel.from_pretrained(Pictures(), tmp_path / "adapter")
        assert torch.equal(loaded(x), trained)
        pica.export_lora(model, tmp_path / "lora", check_inputs={"x": x})
        lora = PeftModel.from_pretrained(Pictures(), tmp_path / "lora")
        assert isinstance(lora.base_model, peft.LoraModel)
        torch.testing.assert_close(lora(x), trained, atol=1e-5, rtol=1e-4)
        plain = Pictures()
        loaded.merge_adapter()
        torch.testing.assert_close(loaded(x), trained, atol=1e-5, rtol=1e-4)
        loaded.unmerge_adapter()
        for (_, was), layer in zip(
            [(n, m) for n, m in plain.named_modules() if isinstance(m, nn.Conv2d) and n.endswith("mix")],
            [m for m in loaded.modules() if isinstance(m, SharedLayer)],
        ):
            assert torch.equal(layer.get_base_layer().weight, was.weight)  # pyright: ignore
        torch.testing.assert_close(loaded.merge_and_unload()(x), trained, atol=1e-5, rtol=1e-4)  # pyright: ignore


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_output_lies_in_memory_as_the_base_layers_and_only_h_is_kept(channels_last: bool):
    model = get_peft_model(Pictures(inn=10, out=6), PicaConfig(r=3, target_modules=["mix"]))
    randomise(model)
    (layer, _) = [m for m in model.modules() if isinstance(m, PicaLinear)]
    x = pictures("2d", 10, torch.float32)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    known = {layer.base_layer.weight.data_ptr(), layer.matrix("default").data_ptr()}  # pyright: ignore
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x.requires_grad_())
    assert y.stride() == layer.base_layer(x).stride()
    spots = 3 * 5 * 4
    known |= {x.data_ptr(), layer.method.require("principal").data_ptr()}
    ours = {t.data_ptr(): t.numel() for t in kept if t.data_ptr() not in known}
    assert sum(ours.values()) == spots * 3  # h; the base convolution itself keeps x


def test_a_mixed_batch_gives_each_picture_its_own_adapter():
    model = get_peft_model(Pictures(), PicaConfig(r=3, target_modules=["mix"], init_weights=False)).eval()
    model.add_adapter("b", PicaConfig(r=2, target_modules=["mix"], init_weights=False))
    x = pictures("2d", 6, torch.float32)
    with torch.no_grad():
        mixed = model(x, adapter_names=["default", "__base__", "b"])
        for row, name in enumerate(["default", None, "b"]):
            if name is None:
                with model.disable_adapter():
                    alone = model(x)
            else:
                model.set_adapter(name)
                alone = model(x)
            torch.testing.assert_close(mixed[row], alone[row])
        one = model(x[0])  # a picture without a batch
        torch.testing.assert_close(one, model(x)[0])
    assert mixed.is_contiguous()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"target_modules": ["wide"]}, r"wide \(Conv2d\) is not supported: .* its kernel is 3x3. Leave it out"),
        ({"target_modules": ["mix"], "groups": 2}, r"mix \(Conv2d\) .* it has 2 groups"),
        ({"target_modules": ["mix"], "padding": 1}, r"mix \(Conv2d\) .* its padding is 1x1"),
    ],
)
def test_other_convolutions_are_refused_in_one_sentence(settings: dict[str, Any], why: str):
    targets = settings.pop("target_modules")
    with pytest.raises(TargetError, match=why):
        get_peft_model(Pictures(**settings), PicaConfig(r=3, target_modules=targets))
