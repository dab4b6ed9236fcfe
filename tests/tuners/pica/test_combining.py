"""Adapters added up with `add_weighted_adapter`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from pica import PicaConfig
from pica.errors import ConfigError
from pica.tuners.base.bank import MatrixBank, get_bank
from pica.tuners.pica.layer import PicaLinear
from tests.shared import IDS


def config(**settings: Any) -> PicaConfig:
    return PicaConfig(**{"r": 8, "init_weights": False, "task_type": "CAUSAL_LM", **settings})


def two(tiny_llama: Any, first: PicaConfig, second: PicaConfig) -> PeftModel:
    model = get_peft_model(tiny_llama(), first, adapter_name="one")
    model.add_adapter("two", second)
    return model


def bank_of(model: PeftModel) -> MatrixBank:
    bank = get_bank(model.get_base_model())
    assert bank is not None
    return bank


def updates(model: nn.Module, name: str) -> dict[str, Tensor]:
    return {
        layer.path: layer.get_delta_weight(name).double() for layer in model.modules() if isinstance(layer, PicaLinear)
    }


@pytest.mark.parametrize("ranks", [(8, 8), (4, 8), (8, 4)])
@pytest.mark.parametrize("share", ["role", "none"])
def test_the_update_is_the_weighted_sum(tiny_llama, ranks: tuple[int, int], share: Any):
    model = two(tiny_llama, config(r=ranks[0], share=share), config(r=ranks[1], share=share))
    model.add_weighted_adapter(["one", "two"], [0.5, -2.0], "both")
    first, second, found = (updates(model, name) for name in ("one", "two", "both"))
    assert found.keys() == first.keys()
    for path, update in found.items():
        torch.testing.assert_close(update, 0.5 * first[path] - 2.0 * second[path], atol=2e-6, rtol=1e-5)
    combined = model.peft_config["both"]
    assert isinstance(combined, PicaConfig)
    assert combined.r == 8
    assert model.active_adapter == "one"


def test_it_is_saved_and_loaded_like_any_other(tiny_llama, tmp_path: Path):
    model = two(tiny_llama, config(), config(r=4))
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both")
    model.set_adapter("both")
    model.eval()
    with torch.no_grad():
        expected = model(IDS).logits
    model.save_pretrained(str(tmp_path), selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "both")).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, expected)


def test_adapters_that_brought_their_basis_are_added_on_it(tiny_llama, tmp_path: Path):
    """The basis of a file that is not this model's own: the combined adapter uses it, and stores it."""
    other = tiny_llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.03 * parameter.std() * torch.randn_like(parameter)
    get_peft_model(other, config(save_basis=True)).save_pretrained(str(tmp_path / "foreign"))
    model = get_peft_model(tiny_llama(), config(), adapter_name="own")
    model.load_adapter(str(tmp_path / "foreign"), "one")
    with pytest.raises(ConfigError, match="different bases"):
        model.add_weighted_adapter(["one", "own"], [1.0, 1.0], "both")
    model.add_weighted_adapter(["one", "one"], [1.0, 1.0], "both")
    first, found = updates(model, "one"), updates(model, "both")
    for path, update in found.items():
        torch.testing.assert_close(update, 2 * first[path], atol=2e-6, rtol=1e-5)
    model.save_pretrained(str(tmp_path / "out"), selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "out" / "both"))
    for path, update in updates(loaded, "default").items():
        torch.testing.assert_close(update, found[path], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("how", ["magnitude_prune", "ties", "dare_linear", "dare_ties"])
def test_ways_that_leave_entries_out(tiny_llama, how: str):
    model = two(tiny_llama, config(), config())
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "all", how, density=1.0)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "few", how, density=0.2)
    for group, matrix in bank_of(model).matrices("few").items():
        full = bank_of(model).matrices("all")[group]
        assert 0 < (matrix != 0).float().mean() < 0.5
        assert full.count_nonzero() == full.numel()


@pytest.mark.parametrize(
    ("second", "why"),
    [
        ({"share": "none"}, "share matrices between different layers"),
        ({"projection": "minor"}, "different bases"),
        ({"target_modules": ["q_proj"]}, "only one of them adapts"),
        ({"rank_pattern": {r".*layers\.0\..*": 4}}, "ranks"),
    ],
)
def test_what_cannot_be_added_up_is_refused_and_the_model_left_alone(tiny_llama, second: dict[str, Any], why: str):
    model = two(tiny_llama, config(), config(**second))
    with pytest.raises(ConfigError, match=why):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both")
    assert set(model.peft_config) == {"one", "two"}
    assert set(bank_of(model)) == {"one", "two"}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((["one"], [1.0, 2.0], "both"), "one weight"),
        (([], [], "both"), "one weight"),
        ((["one", "three"], [1.0, 1.0], "both"), "'three' is not in the model"),
        ((["one"], [1.0], "two"), "exists already"),
        ((["one"], [1.0], "both", "svd"), "unknown; use one of linear"),
        ((["one"], [1.0], "both", "ties"), "needs a density"),
    ],
)
def test_bad_arguments(tiny_llama, arguments: tuple[Any, ...], why: str):
    model = two(tiny_llama, config(), config())
    with pytest.raises(ConfigError, match=why):
        model.add_weighted_adapter(*arguments)


def test_heads_are_not_lost_without_a_word(tiny_llama):
    """PEFT would give the combined adapter the base model's head."""
    model = two(tiny_llama, config(modules_to_save=["lm_head"]), config())
    with pytest.raises(ConfigError, match="'one' has more than shared matrices, 'lm_head'"):
        model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "both")
    assert "both" not in model.peft_config
    assert "both" not in bank_of(model)
