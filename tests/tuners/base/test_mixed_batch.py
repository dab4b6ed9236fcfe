"""Batches that mix adapters: each sample gets what it would get alone, whichever way its products are made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from pica import PicaConfig
from pica.tuners.base import matrix_stack
from pica.tuners.base import mixed_batch as mixed
from pica.tuners.base.bank import MatrixBank, get_bank
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


WAYS = {"one by one": (100, 0), "batched": (0, 0), "bags": (100, 100)}
"""Adapters that count as few, and tokens of a sample that counts as short."""


def choose(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    few, short = WAYS[way]
    monkeypatch.setattr(mixed, "FEW_ADAPTERS", few)
    monkeypatch.setattr(mixed, "SHORT_SAMPLES", short)


@pytest.mark.parametrize("tokens", [(), (1,), (3,), (2, 4), (0,)])
@pytest.mark.parametrize("names", ORDERS, ids=" ".join)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("grad", [False, True])
def test_each_sample_gets_its_own_adapter(
    model: PeftModel,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    grad: bool,
    names: list[str],
    tokens: tuple[int, ...],
):
    choose(monkeypatch, way)
    x = torch.randn(len(names), *tokens, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = alone(model, x, names)
    with torch.set_grad_enabled(grad):
        found = model(x, adapter_names=names)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", ["one by one", "batched"])
def test_gradients_reach_each_adapter_as_if_alone(model: PeftModel, monkeypatch: pytest.MonkeyPatch, way: str):
    choose(monkeypatch, way)
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


def grown() -> tuple[PeftModel, MatrixBank]:
    """Five layers of one group, with adapters a0 to a5, none of which is being trained."""
    torch.manual_seed(3)
    base = nn.Sequential(*(nn.Linear(6, 6, dtype=torch.float64) for _ in range(5)))
    model = None
    for index in range(6):
        config = PicaConfig(r=3, target_modules="all-linear", init_weights=False)
        if model is None:
            model = get_peft_model(base, config, adapter_name="a0")  # pyright: ignore[reportArgumentType]
        else:
            model.add_adapter(f"a{index}", config)
    assert isinstance(model, PeftModel)
    bank = get_bank(model.get_base_model())
    assert bank is not None
    return model.eval().requires_grad_(False), bank


X = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def check(model: PeftModel, names: list[str], x: torch.Tensor = X) -> None:
    """A mixed batch of these adapters computes what each of them does alone."""
    x = x[: len(names)]
    with torch.no_grad():
        found = model(x, adapter_names=names)
        expected = []
        for sample, name in zip(x, names):
            model.set_adapter(name)
            model.requires_grad_(False)
            expected.append(model(sample[None]))
    tolerance = 1e-12 if x.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found, torch.cat(expected), rtol=tolerance, atol=tolerance)


def test_matrices_are_stacked_once_for_all_layers_of_a_group_and_all_calls(monkeypatch: pytest.MonkeyPatch):
    model, bank = grown()
    calls = []
    original = matrix_stack.MatrixStack.placed
    monkeypatch.setattr(matrix_stack.MatrixStack, "placed", lambda *a: calls.append(original(*a)) or calls[-1])
    check(model, ["a0", "a1"])
    assert len(calls) == 1  # for five layers
    (stack,) = bank.stacks.values()
    held = stack.rows
    poisoned = held.clone()
    held[0].zero_()  # a0's: nothing but the matrix itself says what it is
    with pytest.raises(AssertionError):
        check(model, ["a0", "a1"])
    held.copy_(poisoned)
    check(model, ["a1", "a0", "a1"])
    assert len(calls) == 3
    assert stack.rows is held
    assert bank.stacks.nbytes == 2 * 3 * 6 * 8  # adapters, rank, width, float64


def changes() -> dict[str, Callable[[PeftModel, MatrixBank], None]]:
    def matrix(bank: MatrixBank, name: str = "a1") -> nn.Parameter:
        (found,) = bank.matrices(name).values()
        return found

    def in_place(_model: PeftModel, bank: MatrixBank) -> None:
        with torch.no_grad():
            matrix(bank).mul_(-2.0)

    def by_slice(_model: PeftModel, bank: MatrixBank) -> None:
        matrix(bank).detach()[2:4] = 7.0

    def new_memory(_model: PeftModel, bank: MatrixBank) -> None:
        matrix(bank).data = -matrix(bank).data

    def memory_there_and_back(_model: PeftModel, bank: MatrixBank) -> None:
        before = matrix(bank).data.clone()
        matrix(bank).data = before.clone() * 3.0
        matrix(bank).data = before * 5.0

    def new_parameter(_model: PeftModel, bank: MatrixBank) -> None:
        (group,) = bank.matrices("a1")
        bank.matrices("a1")[group] = nn.Parameter(-matrix(bank).detach(), requires_grad=False)

    def state_dict(model: PeftModel, _bank: MatrixBank) -> None:
        state = {k: -v if ".a1." in k and v.is_floating_point() else v for k, v in model.state_dict().items()}
        model.load_state_dict(state)

    def training_step(model: PeftModel, bank: MatrixBank) -> None:
        model.set_adapter("a1")
        optimizer = torch.optim.SGD([matrix(bank)], lr=1.0)
        model.train()(X).square().sum().backward()
        optimizer.step()
        model.eval().requires_grad_(False)

    def training_without_versions(model: PeftModel, bank: MatrixBank) -> None:
        """As kernels do that are given an address."""
        model.set_adapter("a1")
        model.train()(X).square().sum().backward()
        matrix(bank).data.mul_(-3.0)
        model.eval().requires_grad_(False)

    def trainable_without_versions(model: PeftModel, bank: MatrixBank) -> None:
        matrix(bank).requires_grad_(True)
        check_only(model)
        matrix(bank).data.mul_(-3.0)
        check_only(model)
        matrix(bank).requires_grad_(False)

    def check_only(model: PeftModel) -> None:
        with torch.no_grad():
            model(X[:2], adapter_names=["a0", "a1"])

    def deleted_and_made_anew(model: PeftModel, _bank: MatrixBank) -> None:
        model.delete_adapter("a1")
        model.add_adapter("a1", PicaConfig(r=2, target_modules="all-linear", init_weights=False))
        model.requires_grad_(False)

    def larger_rank(model: PeftModel, _bank: MatrixBank) -> None:
        model.delete_adapter("a1")
        model.add_adapter("a1", PicaConfig(r=5, target_modules="all-linear", init_weights=False))
        model.requires_grad_(False)

    def renamed(_model: PeftModel, bank: MatrixBank) -> None:
        (one,), (other,) = bank.matrices("a1").values(), bank.matrices("a2").values()
        one.data, other.data = other.data, one.data

    def merged_and_back(model: PeftModel, _bank: MatrixBank) -> None:
        model.merge_adapter(["a1"])
        with pytest.raises(ValueError, match="merged"):
            model(X[:2], adapter_names=["a0", "a1"])
        model.unmerge_adapter()

    def disabled_for_a_while(model: PeftModel, _bank: MatrixBank) -> None:
        with model.disable_adapter():
            assert torch.equal(model(X), model.get_base_model()(X))

    def cast(model: PeftModel, _bank: MatrixBank) -> None:
        model.to(torch.float32)

    def cast_and_back(model: PeftModel, _bank: MatrixBank) -> None:
        model.to(torch.float32).to(torch.float64)

    def copied(model: PeftModel, bank: MatrixBank) -> None:
        twin = copy.deepcopy(model)
        assert not cast_bank(twin).stacks
        matrix(bank).data = -matrix(bank).data
        check(twin, ["a0", "a1"])

    def cast_bank(model: PeftModel) -> MatrixBank:
        found = get_bank(model.get_base_model())
        assert found is not None
        return found

    kinds = (in_place, by_slice, new_memory, memory_there_and_back, new_parameter, state_dict, training_step)
    kinds += (training_without_versions, trainable_without_versions, deleted_and_made_anew, larger_rank, renamed)
    kinds += (merged_and_back, disabled_for_a_while, cast, cast_and_back, copied)
    return {kind.__name__: kind for kind in kinds}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("change", changes())
def test_a_stack_follows_its_matrices(change: str, inference: bool):
    model, bank = grown()
    with torch.inference_mode(inference):
        model(X[:3], adapter_names=["a0", "a1", "a2"])
    changes()[change](model, bank)
    dtype = next(model.parameters()).dtype
    check(model, ["a0", "a1", "a2", "a1"], X.to(dtype))
    with torch.inference_mode(inference):
        again = model(X[:3].to(dtype), adapter_names=["a0", "a1", "a2"])
    check(model, ["a2", "a1", "a0"], X.to(dtype))
    assert again.dtype == dtype


def test_a_stack_gives_back_what_is_not_used(monkeypatch: pytest.MonkeyPatch):
    model, bank = grown()
    one = 3 * 6 * 8
    names = [f"a{i}" for i in range(6)]
    check(model, names)
    assert bank.stacks.nbytes == 6 * one
    for name in names[:4]:
        model.delete_adapter(name)
    assert bank.stacks.nbytes == 2 * one
    check(model, names[4:])
    model.add_adapter("b", PicaConfig(r=3, target_modules="all-linear", init_weights=False))
    model.requires_grad_(False)
    check(model, ["b", *names[4:]])
    assert bank.stacks.nbytes == 3 * one
    monkeypatch.setattr(matrix_stack, "IDLE_CALLS", 3)
    for _ in range(6):
        check(model, ["a4"])
    assert bank.stacks.nbytes == one
    check(model, ["b", "a5", "a4"])
    model.double()  # a move or cast, even to where it is
    assert not bank.stacks
    check(model, ["b"])
    model.train()
    assert not bank.stacks


def test_an_adapter_that_is_not_finite_spoils_no_other_sample(monkeypatch: pytest.MonkeyPatch):
    for way in WAYS:
        choose(monkeypatch, way)
        model, bank = grown()
        with torch.no_grad():
            for matrix in bank.matrices("a1").values():
                matrix.fill_(torch.nan)
            found = model(X[:4], adapter_names=["a0", "a1", "__base__", "a2"])
        assert torch.isfinite(found[[0, 2, 3]]).all()
        assert found[1].isnan().any()


def test_layouts_are_those_of_the_layers_whatever_happens(model: PeftModel, tmp_path: Path):
    """What is remembered of adapters' places is what the layers say now."""
    bank = get_bank(model.get_base_model())
    assert bank is not None
    names = sorted(ADAPTERS)
    x = torch.randn(8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def agree() -> None:
        present = [name for name in names if name in bank]
        with torch.no_grad():
            model(x[: len(present)], adapter_names=present)
        for name in bank:
            remembered = bank.layouts.of(name, bank.matrices(name).layers)
            for path, layer in bank.matrices(name).layers.items():
                assert isinstance(layer, PicaLinear)
                assert remembered.place(path) == layer.method.place_of(name)

    agree()
    layer = next(m for m in model.modules() if isinstance(m, PicaLinear))
    layer.method.limit("b", 3)
    agree()
    layer.method.forget_choices("b")
    agree()
    layer.method.use("a", layer.bases.get(layer.method.key_of("e")))
    agree()
    model.add_adapter("g", PicaConfig(r=6, target_modules=TARGETS, init_weights=False))
    names.append("g")
    agree()
    model.delete_adapter("c")
    agree()
    model.save_pretrained(str(tmp_path), selected_adapters=["b"])
    model.load_adapter(str(tmp_path / "b"), "h")
    names.append("h")
    agree()


def test_compiled_mixed_batches_are_right_and_compiled_once_for_a_batch():
    torch._dynamo.reset()
    model, _ = grown()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, given: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    names = ["a0", "a1", "a2", "a3", "a4", "a5"]
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        for batch in (names, names[::-1]):
            expected = model(X[:6], adapter_names=batch)
            torch.testing.assert_close(compiled(X[:6], adapter_names=batch), expected)
            made = len(graphs)
            torch.testing.assert_close(compiled(X[:6], adapter_names=batch), expected)
            assert len(graphs) == made > 0
    torch._dynamo.reset()
