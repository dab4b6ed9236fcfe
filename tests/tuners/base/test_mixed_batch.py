"""Batches that mix adapters: each sample gets what it would get alone, whichever way its products are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from pica import PicaConfig
from pica.tuners.base import mixed_batch as mixed
from pica.tuners.pica.layer import PicaLinear

TARGETS = ["tall", "wide"]


class Body(nn.Module):
    """A tall layer (projector on the input) and a wide one (projector on the output), one with a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tall = nn.Linear(6, 10, bias=False, dtype=torch.float64)
        self.wide = nn.Linear(10, 5, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wide(torch.tanh(self.tall(x)))


# adapters of other ranks, on other layers, that share otherwise, and of another projection
ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 2},
    "b": {"r": 5},
    "c": {"r": 3, "share": "none"},
    "d": {"r": 4, "target_modules": ["wide"]},
    "e": {"r": 3, "projection": "random"},
    "f": {"r": 1, "rank_pattern": {"wide": 4}},
}


@pytest.fixture
def model() -> PeftModel:
    torch.manual_seed(1)
    made = None
    for name, fields in ADAPTERS.items():
        config = PicaConfig(**{"target_modules": TARGETS, "init_weights": False, **fields})
        if made is None:
            made = get_peft_model(Body(), config, adapter_name=name)  # pyright: ignore[reportArgumentType]
        else:
            made.add_adapter(name, config)
    assert isinstance(made, PeftModel)
    return made.eval()


def alone(model: PeftModel, x: torch.Tensor, names: list[str]) -> torch.Tensor:
    rows = []
    for sample, name in zip(x, names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(sample[None]))
        else:
            model.set_adapter(name)
            model.get_submodule("base_model.model.pica_M").requires_grad_(True)  # activating one freezes the others
            rows.append(model(sample[None]))
    return torch.cat(rows)


ORDERS = [
    ["a", "a", "b", "b"],
    ["b", "a", "__base__", "a", "b"],
    ["e", "a", "e", "__base__", "d", "c", "f", "b", "a"],
    ["__base__", "__base__"],
    ["d"],
]


@pytest.mark.parametrize("tokens", [(), (1,), (3,), (2, 4)])
@pytest.mark.parametrize("names", ORDERS, ids=" ".join)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_each_sample_gets_its_own_adapter(
    model: PeftModel,
    monkeypatch: pytest.MonkeyPatch,
    batched: bool,
    grad: bool,
    names: list[str],
    tokens: tuple[int, ...],
):
    monkeypatch.setattr(mixed, "BATCHED_ADAPTERS", 0 if batched else 100)
    x = torch.randn(len(names), *tokens, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = alone(model, x, names)
    with torch.set_grad_enabled(grad):
        found = model(x, adapter_names=names)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batched", [False, True])
def test_gradients_reach_each_adapter_as_if_alone(model: PeftModel, monkeypatch: pytest.MonkeyPatch, batched: bool):
    monkeypatch.setattr(mixed, "BATCHED_ADAPTERS", 0 if batched else 100)
    names = ["b", "a", "__base__", "a", "e"]
    x = torch.randn(len(names), 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    matrices = [p for n, p in model.named_parameters() if ".pica_M." in n and n.split("pica_M.")[1][0] in "abe"]
    expected = torch.autograd.grad(alone(model, x, names).square().sum(), matrices, materialize_grads=True)
    found = torch.autograd.grad(model(x, adapter_names=names).square().sum(), matrices, materialize_grads=True)
    torch.testing.assert_close(found, expected)


def test_the_output_of_a_base_layer_that_a_hook_kept_is_not_overwritten(model: PeftModel):
    kept = []
    layer = next(m for m in model.modules() if isinstance(m, PicaLinear))
    layer.base_layer.register_forward_hook(lambda _module, _args, out: kept.append((out, out.clone())))
    with torch.no_grad():
        model(torch.ones(2, 6, dtype=torch.float64), adapter_names=["a", "b"])
    assert torch.equal(*kept[0])


def test_matrices_are_stacked_once_for_all_layers_of_a_group(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mixed, "BATCHED_ADAPTERS", 0)
    made = []
    original = mixed.MixedBatch._stack

    def spy(self: mixed.MixedBatch, *args: Any) -> torch.Tensor:
        made.append(original(self, *args))
        return made[-1]

    monkeypatch.setattr(mixed.MixedBatch, "_stack", spy)
    base = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    model = get_peft_model(base, PicaConfig(r=2, target_modules="all-linear", init_weights=False))  # pyright: ignore[reportArgumentType]
    model.add_adapter("second", PicaConfig(r=3, target_modules="all-linear", init_weights=False))
    with torch.no_grad():
        model.eval()(torch.ones(2, 6), adapter_names=["default", "second"])
    assert len(made) == 5
    assert len({id(stack) for stack in made}) == 1
