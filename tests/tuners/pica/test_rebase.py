"""Base weights that are replaced after an adapter was added: the basis follows, or saving says that it cannot."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from pica import PicaConfig, SvftConfig
from pica.errors import BasisMismatchError
from pica.tuners.base.layer import SharedLayer
from pica.tuners.pica.layer import PicaLinear
from tests.tuners.pica.small_llama import base, logits

TARGETS = ["q_proj", "down_proj", "up_proj"]  # read from the input, and from the output
METHODS: dict[str, PeftConfig] = {
    "pica": PicaConfig(r=4, target_modules=TARGETS),
    "svft": SvftConfig(target_modules=TARGETS),
    "svft top_k": SvftConfig(target_modules=TARGETS, pattern="top_k", off_diagonals=1),
}


def wrapped(seed: int = 0, method: str = "pica", **settings: Any) -> PeftModel:
    config = copy.deepcopy(METHODS[method])
    for name, value in settings.items():
        setattr(config, name, value)
    return get_peft_model(base(seed), config)


def train(model: nn.Module) -> None:
    for seed, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        # through .data, which leaves no trace in the version counter
        parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))


def checkpoint(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Another base model's weights under the names that they have in `model`."""
    state = base(seed).state_dict()
    return {
        name: state[name.replace("base_layer.", "")]
        for name in model.state_dict()
        if name.replace("base_layer.", "") in state
    }


def assert_loads_on(seed: int, folder: Path, expected: Tensor) -> None:
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base(seed), str(folder))), expected, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(BasisMismatchError):
        PeftModel.from_pretrained(base(1 - seed), str(folder))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_that_arrives_late_brings_the_basis(method: str, assign: bool, tmp_path: Path):
    model = wrapped(0, method)
    inner = model.get_base_model()
    inner.load_state_dict(checkpoint(inner, 1), strict=False, assign=assign)
    train(model)
    expected = logits(model)
    fresh = wrapped(1, method)
    train(fresh)
    torch.testing.assert_close(expected, logits(fresh), rtol=1e-4, atol=1e-4)
    model.save_pretrained(str(tmp_path))
    assert_loads_on(1, tmp_path, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_a_full_state_dict_makes_a_random_base_the_trained_model(method: str, where: str, tmp_path: Path):
    trained = wrapped(1, method)
    train(trained)
    expected = logits(trained)
    with torch.device(where):
        model = get_peft_model(base(0), copy.deepcopy(METHODS[method]))
    model.load_state_dict(trained.state_dict(), assign=where == "meta")
    for name, buffer in trained.named_buffers() if where == "meta" else ():  # rotary frequencies are in no state dict
        if "inv_freq" in name:
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, buffer.clone())
    torch.testing.assert_close(logits(model.eval()), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(str(tmp_path))
    assert_loads_on(1, tmp_path, expected)


def overwrite(model: nn.Module, seed: int) -> None:
    """As an initialisation does, or a loader that knows nothing of modules."""
    new = checkpoint(model, seed)
    for name, parameter in model.named_parameters():
        if name in new:
            parameter.data.copy_(new[name])


@pytest.mark.parametrize("method", METHODS)
def test_an_untrained_adapter_follows_weights_that_were_overwritten(method: str, tmp_path: Path):
    model = wrapped(0, method)
    overwrite(model.get_base_model(), 1)
    model.save_pretrained(str(tmp_path))
    assert_loads_on(1, tmp_path, logits(base(1)))


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_adapter_is_not_saved_over_other_weights(method: str, tmp_path: Path):
    model = wrapped(0, method)
    train(model)
    overwrite(model.get_base_model(), 1)
    with pytest.raises(BasisMismatchError, match=r"weights were replaced after adapter 'default' was added \(model\.l"):
        model.save_pretrained(str(tmp_path))


def test_a_trained_adapter_is_saved_over_other_weights_with_its_basis(tmp_path: Path):
    model = wrapped(0, save_basis=True)
    train(model)
    overwrite(model.get_base_model(), 1)
    expected = logits(model)
    model.save_pretrained(str(tmp_path))
    assert_loads_on(1, tmp_path, expected)


def test_a_stored_basis_stays_whatever_weights_come(tmp_path: Path):
    """It may be none that the weights give: here it is another base model's."""
    model = wrapped(0, save_basis=True)
    train(model)
    overwrite(model.get_base_model(), 1)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(base(1), str(tmp_path))
    inner = loaded.get_base_model()
    inner.load_state_dict(checkpoint(inner, 2), strict=False)
    assert all(torch.equal(*pair) for pair in zip(directions(loaded), directions(model), strict=True))


def directions(model: nn.Module) -> list[Tensor]:
    layers = [module for module in model.modules() if isinstance(module, PicaLinear)]
    return [layer.method.require(layer.method.key_of("default")) for layer in layers]


def test_a_trained_adapter_is_refused_once_a_state_dict_brought_other_weights():
    model = wrapped(0)
    train(model)
    inner = model.get_base_model()
    inner.load_state_dict(checkpoint(inner, 1), strict=False)
    for _ in range(2):
        with pytest.raises(BasisMismatchError, match="another basis"):
            logits(model)
    inner.load_state_dict(checkpoint(inner, 0), strict=False)
    expected = wrapped(0)
    train(expected)
    torch.testing.assert_close(logits(model), logits(expected))


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_is_added_after_other_weights_came_has_their_basis(method: str):
    model = wrapped(0, method)
    overwrite(model.get_base_model(), 1)
    model.add_adapter("second", copy.deepcopy(METHODS[method]))
    model.set_adapter("second")
    train(model)
    fresh = wrapped(1, method)
    train(fresh)
    torch.testing.assert_close(logits(model), logits(fresh), rtol=1e-4, atol=1e-4)


def test_what_leaves_a_weight_as_it_is_is_no_replacement(tmp_path: Path):
    """Merging, another dtype, the model's own state, further training by a little."""

    def nudge(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, SharedLayer):
                weight: Any = module.get_base_layer().weight
                weight.data += 1e-3 * weight.norm() / weight.numel() ** 0.5

    changes = {
        "merged": lambda m: m.merge_adapter(),
        "unmerged": lambda m: (m.merge_adapter(), m.unmerge_adapter()),
        "bfloat16": lambda m: m.to(torch.bfloat16),
        "and back": lambda m: m.to(torch.bfloat16).float(),
        "its own state": lambda m: m.load_state_dict(m.state_dict()),
        "a copy": copy.deepcopy,
        "trained a little": nudge,
    }
    for (name, change), method in itertools.product(changes.items(), ("pica", "svft")):
        model = wrapped(0, method)
        train(model)
        logits(model)
        change(model)
        model.save_pretrained(str(tmp_path / name / method))


def short_base(rank: int, noise: float = 0.0) -> LlamaForCausalLM:
    """A base whose q_proj weights have `rank` directions, and beyond them only noise."""
    model = base()
    for index in range(2):
        weight = model.get_parameter(f"model.layers.{index}.self_attn.q_proj.weight").data
        left, values, right = torch.linalg.svd(weight)
        more = noise * torch.randn(weight.shape, generator=torch.Generator().manual_seed(index))
        weight.copy_((left[:, :rank] * values[:rank]) @ right[:rank] + more)
    return model


def usable(model: nn.Module, adapter: str = "default") -> set[int]:
    return {
        module.method.usable_directions(adapter)
        for name, module in model.named_modules()
        if isinstance(module, PicaLinear) and adapter in module.group_of and name.endswith("q_proj")
    }


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """A trained adapter that uses 2 of its 4 directions, since its base had no more."""
    model = get_peft_model(short_base(2), PicaConfig(r=4, target_modules=["q_proj"]))
    train(model)
    model.save_pretrained(str(tmp_path / "short"))
    return tmp_path / "short"


NOISE = 1e-6  # gives the weights of a short base all their directions back, and leaves the first as they are


def test_an_adapters_directions_go_with_it_and_a_new_one_of_its_name_has_its_own(short: Path, tmp_path: Path):
    model = PeftModel.from_pretrained(short_base(2, NOISE), str(short))
    assert usable(model) == {2}
    expected = logits(model)
    model.add_adapter("other", PicaConfig(r=4, target_modules=["q_proj"]))
    assert usable(model, "other") == {4}
    model.set_adapter("other")
    model.delete_adapter("default")
    assert not any("default" in m.method.usable_of for m in model.modules() if isinstance(m, PicaLinear))
    model.add_adapter("default", PicaConfig(r=4, target_modules=["q_proj"]))
    assert usable(model) == {4}
    model.set_adapter("default")
    train(model)
    again = logits(model)
    model.save_pretrained(str(tmp_path / "new"), selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(short_base(2, NOISE), str(tmp_path / "new"))
    assert usable(loaded) == {4}
    torch.testing.assert_close(logits(loaded), again)
    model.delete_adapter("default")
    model.load_adapter(str(short), "default")
    model.set_adapter("default")
    assert usable(model) == {2}
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("assign", [False, True])
def test_the_directions_of_an_untrained_adapter_are_those_of_weights_that_come_later(tmp_path: Path, assign: bool):
    get_peft_model(short_base(2), PicaConfig(r=4, target_modules=["q_proj"])).save_pretrained(str(tmp_path / "zero"))
    model = PeftModel.from_pretrained(short_base(2, NOISE), str(tmp_path / "zero"), is_trainable=True)
    assert usable(model) == {2}
    inner = model.get_base_model()
    inner.load_state_dict(checkpoint(inner, 1), strict=False, assign=assign)
    train(model)
    assert usable(model) == {4}
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "trained"))
    loaded = PeftModel.from_pretrained(base(1), str(tmp_path / "trained"))
    assert usable(loaded) == {4}
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)


def test_a_trained_adapters_directions_are_the_trained_ones_whatever_weights_come(short: Path):
    model = PeftModel.from_pretrained(short_base(2), str(short))
    expected = logits(model)
    inner, noisy = model.get_base_model(), short_base(2, NOISE).state_dict()
    inner.load_state_dict({n: noisy[n.replace("base_layer.", "")] for n in checkpoint(inner, 0)}, strict=False)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)
    assert usable(model) == {2}
    inner.load_state_dict(checkpoint(inner, 1), strict=False)
    with pytest.raises(BasisMismatchError):
        logits(model)
