"""Weights as no training leaves them: the basis is right, or refused in a sentence; what is applied is what a merge adds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from pica import PicaConfig, SvftConfig
from pica.errors import BasisError
from pica.tuners.base.layer import SharedLayer

SHAPES = {"square": (12, 12), "tall": (20, 8), "wide": (8, 20), "row": (1, 16), "column": (16, 1), "one": (1, 1)}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
METHODS: dict[str, Any] = {
    "principal": lambda: PicaConfig(r=32, target_modules=["0"], init_weights=False),  # more than any layer has
    "minor": lambda: PicaConfig(r=4, projection="minor", target_modules=["0"], init_weights=False),
    "random": lambda: PicaConfig(r=4, projection="random", target_modules=["0"], init_weights=False),
    "SVFT": lambda: SvftConfig(target_modules=["0"], init_weights=False),
    "SVFT top_k": lambda: SvftConfig(target_modules=["0"], init_weights=False, pattern="top_k", off_diagonals=2),
}


def hostile(out: int, inn: int) -> dict[str, Tensor]:
    plain = torch.randn(out, inn, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one_entry = plain.clone()
    one_entry[0, 0] = 1e38
    single = torch.zeros_like(plain)
    single[-1, -1] = 1
    return {
        "plain": plain,
        "zero": 0 * plain,
        "constant": 0 * plain + 1,
        "one entry": single,
        "one direction": plain[:, :1] @ plain[:1],
        "one huge entry": one_entry,
        "near the largest float32": 5e37 * plain,
        "large": 1e4 * plain,
        "small": 1e-7 * plain,
        "near the smallest float32": 1e-38 * plain,
        "subnormal": 1e-43 * plain,
        "falling by 60 decades": plain * torch.logspace(0, -60, inn, dtype=torch.float64),
        "near the largest float64": 1e307 * plain,
        "subnormal float64": 1e-310 * plain,
    }


def base_of(weight: Tensor) -> Any:
    base = nn.Sequential(nn.Linear(*weight.T.shape, bias=False)).to(weight.dtype)
    base[0].weight.data = weight.clone()
    return base


def layer_of(model: nn.Module) -> SharedLayer:
    (layer,) = (module for module in model.modules() if isinstance(module, SharedLayer))
    return layer


def adapted(weight: Tensor, method: str) -> tuple[PeftModel, SharedLayer]:
    model = get_peft_model(base_of(weight), METHODS[method]())
    assert isinstance(model, PeftModel)
    return model, layer_of(model)


@pytest.mark.filterwarnings("ignore:PiCa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_finite_weight_has_its_basis(shape: str, method: str, dtype: torch.dtype):
    near = {torch.float32: 1e-3, torch.float64: 1e-6}.get(dtype, 0.03)
    for name, wide in hostile(*SHAPES[shape]).items():
        weight = wide.to(dtype)
        if not weight.isfinite().all():
            continue
        model, layer = adapted(weight, method)
        count = layer.method.usable_directions("default")
        left, rows = layer.method.frames("default")
        rows = rows[:count].double()
        assert (rows @ rows.T - torch.eye(count)).norm() < near, f"{name}: directions that are not orthonormal"
        exact = weight.double() / max(float(weight.double().abs().max()), 1e-300)
        values = torch.linalg.svdvals(exact)
        if method == "principal":
            rest = (exact - exact @ rows.T @ rows).norm()
            assert rest <= (1 + near) * values[count:].norm() + near * values[0], f"{name}: not the leading ones"
        if left is not None:
            turned = left[:, :count].double().T @ exact @ rows.T
            assert (turned - torch.diag(values[:count])).norm() <= 3 * near * values[0], f"{name}: no singular vectors"
        update = layer.get_delta_weight("default").double()
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)
        with torch.no_grad():
            y, base = model(x).double(), layer.get_base_layer()(x).double()
        if not base.isfinite().all():
            continue  # the base model's own output overflows
        update = x.double() @ update.T
        rounding = 40 * torch.finfo(dtype).eps * (base.norm() + update.norm())
        assert (y - base - update).norm() <= near * update.norm() + rounding, f"{name}: the update is another"
        model.merge_adapter()
        model.unmerge_adapter()
        assert torch.equal(layer.frozen.raw(), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused_in_a_sentence(value: float, method: str, dtype: torch.dtype):
    weight = torch.randn(8, 20).to(dtype)
    weight[-1, -1] = value
    with pytest.raises(BasisError, match=r"^0: the frozen weight holds NaN or infinity, so it has no basis\."):
        adapted(weight, method)


@pytest.mark.filterwarnings("ignore:PiCa")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ["principal", "SVFT"])
def test_an_adapter_on_any_finite_weight_loads_onto_it(method: str, dtype: torch.dtype, tmp_path: Path):
    for name, wide in hostile(*SHAPES["wide"]).items():
        weight = wide.to(dtype)
        if not weight.isfinite().all():
            continue
        model, layer = adapted(weight, method)
        model.save_pretrained(str(tmp_path))
        again = layer_of(PeftModel.from_pretrained(base_of(weight), str(tmp_path)))
        update = layer.get_delta_weight("default")
        assert torch.allclose(again.get_delta_weight("default"), update, rtol=1e-3, atol=1e-6), name
