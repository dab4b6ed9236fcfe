"""Whatever loads an adapter and whatever is wrong with its file: it computes what it was trained as, or is refused whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pica import PicaConfig, PicaModel, SvftConfig
from pica.errors import AdapterFileError, PicaError
from pica.tuners.base.bank import find_banks
from pica.tuners.base.layer import SharedLayer
from tests.tuners.pica.small_llama import base, logits

WEIGHTS = "adapter_model.safetensors"
TARGETS = ["q_proj", "v_proj", "down_proj"]
METHODS: dict[str, Callable[[], PeftConfig]] = {
    "pica": lambda: PicaConfig(r=4, target_modules=TARGETS),
    "stored basis": lambda: PicaConfig(r=4, target_modules=TARGETS, save_basis=True),
    "svft": lambda: SvftConfig(target_modules=TARGETS, pattern="top_k", off_diagonals=1),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """For each method, a good adapter's folder and what it computes; and the base models' folders."""
    root = tmp_path_factory.mktemp("saved")
    for seed in (0, 1):
        base(seed).save_pretrained(root / f"base{seed}")
    found = {}
    for name, config in METHODS.items():
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(root / "base0"), config())
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        expected = logits(model)
        assert not torch.allclose(expected, logits(base()), atol=0.1)
        model.save_pretrained(str(root / name))
        found[name] = (root / name, expected)
    return found


# ---- ways of loading: (base model, folder, name of the adapter) -> the model with the adapter -------------------------


def from_pretrained(model: Any, folder: Path) -> Any:
    return PeftModel.from_pretrained(model, str(folder))


def other(folder: Path) -> PeftConfig:
    """The configuration of another adapter of the same method."""
    if "SVFT" in (folder / "adapter_config.json").read_text():
        return SvftConfig(target_modules=["v_proj"])
    return PicaConfig(r=2, target_modules=["v_proj"])


def beside_another(model: Any, folder: Path) -> Any:
    peft_model = get_peft_model(model, other(folder), "first")
    peft_model.load_adapter(str(folder), "default")
    peft_model.set_adapter("default")
    return peft_model


def load_adapter(model: Any, folder: Path) -> Any:
    model.load_adapter(str(folder))
    return model


def load_adapter_beside_another(model: Any, folder: Path) -> Any:
    model.add_adapter(other(folder), "first")
    model.load_adapter(str(folder), adapter_name="second")
    return model


def inject_and_set(model: Any, folder: Path) -> Any:
    inject_adapter_in_model(PeftConfig.from_pretrained(str(folder)), model)
    set_peft_model_state_dict(model, load_file(folder / WEIGHTS))
    return model


def torch_state(model: Any, folder: Path) -> Any:
    """As people do who have only heard of torch: the file's tensors under the names that the model has."""
    inject_adapter_in_model(PeftConfig.from_pretrained(str(folder)), model)
    found = load_file(folder / WEIGHTS)
    entry = {k.split("pica_M.")[-1].split("svft_T.")[-1]: v for k, v in found.items()}
    bank = next(name for name, _ in find_banks(model))
    model.load_state_dict({f"{bank}.default.{k}": v for k, v in entry.items() if "basis:" not in k}, strict=False)
    return model


WAYS = [from_pretrained, beside_another, load_adapter, load_adapter_beside_another, inject_and_set, torch_state]

# ---- damages ---------------------------------------------------------------------------------------------------------


def _print_of(tensors: dict[str, Tensor]) -> str:
    return next(name for name in tensors if name.endswith("fingerprint"))


def _matrix_of(tensors: dict[str, Tensor]) -> str:
    return next(n for n, t in tensors.items() if t.is_floating_point() and ":" not in n)


def no_fingerprint(tensors: dict[str, Tensor]) -> None:
    del tensors[_print_of(tensors)]


def zeroed_fingerprint(tensors: dict[str, Tensor]) -> None:
    tensors[_print_of(tensors)].zero_()


def cut_fingerprint(tensors: dict[str, Tensor]) -> None:
    tensors[_print_of(tensors)] = tensors[_print_of(tensors)][:-9].clone()


def garbled_fingerprint(tensors: dict[str, Tensor]) -> None:
    tensors[_print_of(tensors)][60:90] ^= 0x5A


def missing(tensors: dict[str, Tensor]) -> None:
    del tensors[_matrix_of(tensors)]


def all_missing(tensors: dict[str, Tensor]) -> None:
    for name in [n for n, t in tensors.items() if t.is_floating_point() and ":" not in n]:
        del tensors[name]


def nan(tensors: dict[str, Tensor]) -> None:
    tensors[_matrix_of(tensors)].view(-1)[3] = float("nan")


def infinite(tensors: dict[str, Tensor]) -> None:
    tensors[_matrix_of(tensors)].view(-1)[-1] = float("-inf")


def misshapen(tensors: dict[str, Tensor]) -> None:
    name = _matrix_of(tensors)
    tensors[name] = tensors[name][:-1].clone()


def extra(tensors: dict[str, Tensor]) -> None:
    name = _matrix_of(tensors)
    tensors[name.replace("proj", "gate_proj")] = tensors[name].clone()


def nothing(tensors: dict[str, Tensor]) -> None:
    pass


DAMAGES = [
    *(nothing, no_fingerprint, zeroed_fingerprint, cut_fingerprint, garbled_fingerprint),
    *(missing, all_missing, nan, infinite, misshapen, extra),
]
LEAVE_OUT = (load_adapter, load_adapter_beside_another, torch_state)
# what another base model is tried with: where the fingerprint is whole it decides alone, whatever else is wrong
ON_ANOTHER_BASE = (nothing, no_fingerprint, zeroed_fingerprint, all_missing)
CASES = [*((damage, 0) for damage in DAMAGES), *((damage, 1) for damage in ON_ANOTHER_BASE)]


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


@pytest.mark.parametrize(
    ("method", "way"),
    [("pica", way) for way in WAYS]
    + [(method, way) for method in ("stored basis", "svft") for way in (from_pretrained, load_adapter, torch_state)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_an_adapter_is_right_or_refused_and_leaves_nothing(saved, tmp_path: Path, way, method: str):
    good, expected = saved[method]
    for damage, seed in CASES:
        folder = tmp_path / f"{damage.__name__}{seed}"
        shutil.copytree(good, folder)
        tensors = load_file(folder / WEIGHTS)
        damage(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        plain = base(seed)
        before, flags = logits(plain), [(n, p.requires_grad) for n, p in plain.named_parameters()]
        what = f"{damage.__name__} on base {seed}"
        got = attempt(way, plain, folder, what)
        if got is not None:
            # what a loader finds no place for it leaves out; a stranger's matrix is no part of the adapter's meaning
            assert (seed, damage) == (0, nothing) or (seed, damage, way in LEAVE_OUT) == (0, extra, True), what
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
            continue
        assert damage is not nothing or seed == 1, what
        if any(bank.unverified for _, bank in find_banks(plain)):
            # a loader gave up in the middle, by itself: the method hears of it at the adapter's next use
            with pytest.raises(PicaError):
                logits(plain)
        assert torch.equal(logits(plain), before), what
        others = ["first"] if "beside" in way.__name__ else []
        layers = [m for m in plain.modules() if isinstance(m, SharedLayer)]
        assert bool(layers) == bool(others), what
        assert all(list(layer.group_of) in ([], others) for layer in layers), what
        assert all(list(bank) in ([], others) for _, bank in find_banks(plain)), what
        assert list(getattr(plain, "peft_config", {})) == others, what
        if not others:
            assert [(n, p.requires_grad) for n, p in plain.named_parameters()] == flags, what
        elif hasattr(plain, "active_adapters") and way is load_adapter_beside_another:
            assert plain.active_adapters() == others, what
        if (
            damage in (missing, no_fingerprint, misshapen) and seed == 0 and not others
        ):  # a good file, as if for the first time
            torch.testing.assert_close(logits(way(plain, good)), expected, rtol=1e-4, atol=1e-4)


def attempt(way: Callable[[Any, Path], Any], plain: nn.Module, folder: Path, what: str) -> Tensor | None:
    """What the model computes with the adapter; None where loading or the first forward pass refused it."""
    try:
        model = way(plain, folder)
    except PicaError:
        return None
    except RuntimeError as error:  # torch's and transformers' own refusals of a shape
        if "size" not in str(error):
            raise AssertionError(what) from error
        return None
    try:
        return logits(model)
    except PicaError:
        return None


def test_auto_classes_refuse_what_load_adapter_refuses(saved, tmp_path: Path):
    good, expected = saved["stored basis"]
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(good)), expected, rtol=1e-4, atol=1e-4)
    folder = tmp_path / "other"
    shutil.copytree(good, folder)
    edit(folder, base_model_name_or_path=str(good.parent / "base1"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = logits(base(1))
    with pytest.raises(PicaError, match=r"trained with another basis.*base1"):
        logits(model)
    assert torch.equal(logits(model), before)


USES: dict[str, Callable[[Any, SharedLayer, Path], Any]] = {
    "merge": lambda model, layer, folder: layer.merge(),
    "delta": lambda model, layer, folder: layer.get_delta_weight("default"),
    "save": lambda model, layer, folder: model.save_pretrained(folder),
    "combine": lambda model, layer, folder: cast(PicaModel, layer.bank.tuner[0]).add_weighted_adapter(
        ["default"], [1.0], "sum"
    ),
}


@pytest.mark.parametrize("use", USES)
def test_every_use_of_an_adapter_comes_after_the_check(saved, tmp_path: Path, use: str):
    good, _ = saved["pica"]
    model = base(1)
    model.load_adapter(str(good))
    layer = next(m for m in model.modules() if isinstance(m, SharedLayer))
    with pytest.raises(PicaError, match="another basis"):
        USES[use](model, layer, tmp_path / "saved")
    assert torch.equal(logits(model), logits(base(1)))
    assert not find_banks(model)


def test_a_saved_configuration_starts_new_adapters_on_any_base(saved):
    good, _ = saved["pica"]
    model = base(1)
    model.add_adapter(PeftConfig.from_pretrained(str(good)))
    assert torch.equal(logits(model), logits(base(1)))
    assert model.active_adapters() == ["default"]


def test_any_error_while_loading_takes_the_adapter_out(saved):
    good, expected = saved["pica"]
    tensors: dict[str, Any] = load_file(good / WEIGHTS)
    tensors[_print_of(tensors)] = "text"
    model = base()
    inject_adapter_in_model(PeftConfig.from_pretrained(str(good)), model)
    with pytest.raises(AttributeError):
        set_peft_model_state_dict(model, tensors)
    assert torch.equal(logits(model), logits(base()))
    assert not find_banks(model)
    model.load_adapter(str(good))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


# ---- fields that a later version may write ---------------------------------------------------------------------------


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("value", [None, False, {}, []])
def test_unknown_fields_without_a_value_are_noted_and_ignored(saved, tmp_path: Path, caplog, value):
    good, expected = saved["pica"]
    folder = tmp_path / "later"
    shutil.copytree(good, folder)
    edit(folder, field_of_tomorrow=value)
    for way in (from_pretrained, load_adapter):
        caplog.clear()
        torch.testing.assert_close(logits(way(base(), folder)), expected, rtol=1e-4, atol=1e-4)
        assert "'field_of_tomorrow'" in caplog.text


@pytest.mark.parametrize("value", [0, 0.5, "", True, [None], {"a": None}])
def test_unknown_fields_with_a_value_are_refused(saved, tmp_path: Path, value):
    good, _ = saved["pica"]
    folder = tmp_path / "later"
    shutil.copytree(good, folder)
    edit(folder, field_of_tomorrow=value)
    for way in (from_pretrained, load_adapter):
        with pytest.raises(AdapterFileError, match="'field_of_tomorrow'"):
            way(base(), folder)
    with pytest.raises(AdapterFileError, match="'field_of_tomorrow'"):
        PeftConfig.from_pretrained(str(folder))


def test_a_misspelt_argument_is_pythons_own_error():
    with pytest.raises(TypeError, match="unexpected keyword"):
        PicaConfig(rank=3)  # pyright: ignore[reportCallIssue]
