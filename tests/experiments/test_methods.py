"""Every method that a recipe can name, on a real (tiny) model with PEFT's own classes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pica.errors import ConfigError, TargetError
from pica.experiments.adapters import attach, parameter_counts, peft_config
from pica.experiments.compare.comparison import load_comparison
from pica.experiments.methods import METHODS
from pica.experiments.models import load_adapter, load_model
from pica.experiments.recipes.recipe import AdapterSection, ModelSection
from pica.experiments.train.training import save_adapter

TARGETS = ["q_proj", "v_proj", "up_proj"]
OPTIONS = {"vblora": {"vector_length": 8, "num_vectors": 16}}
IDS = torch.arange(2, 14).reshape(2, 6)


def section(method: str, **more) -> AdapterSection:
    return AdapterSection(
        **{"method": method, "r": 4, "target_modules": TARGETS, "options": OPTIONS.get(method, {}), **more}
    )


@pytest.mark.parametrize("method", METHODS)
def test_each_method_learns_and_reads_back(method: str, model_folder: Path, tmp_path: Path):
    base = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    with torch.no_grad():
        untouched = base(IDS).logits
    if method == "head":
        model = attach(base, section(method, target_modules=None), seed=0, modules_to_save=["up_proj"])
    else:
        model = attach(base, section(method), seed=0)
    assert parameter_counts(model).trainable > 0
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    losses = []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert changed <= {name for name, value in model.named_parameters() if value.requires_grad}, "the base is frozen"
    model.eval()
    with torch.no_grad():
        expected = model(IDS).logits
    assert not torch.allclose(expected, untouched, atol=1e-3)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load_model(ModelSection(path=str(model_folder))), tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, expected, atol=2e-4, rtol=2e-4)


def test_full_trains_the_weights_of_the_targets_and_nothing_else(model_folder: Path):
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    expected = sum(value.numel() for name, value in base.named_parameters() if any(f".{t}." in name for t in TARGETS))
    model = attach(base, section("full"), seed=0)
    assert (parameter_counts(model).trainable, parameter_counts(model).head) == (expected, 0)


def test_full_beside_a_head_counts_the_head_alone_as_head(model_folder: Path):
    model = attach(
        AutoModelForCausalLM.from_pretrained(model_folder), section("full"), seed=0, modules_to_save=["k_proj"]
    )
    heads = [value for name, value in model.named_parameters() if "k_proj.modules_to_save" in name]
    assert parameter_counts(model).head == sum(value.numel() for value in heads) > 0


def test_head_trains_new_layers_alone_and_refuses_a_model_without_any(model_folder: Path):
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    expected = sum(value.numel() for name, value in base.named_parameters() if ".k_proj." in name)
    with pytest.raises(TargetError, match="this model has none"):
        attach(base, section("head", target_modules=None), seed=0)
    model = attach(base, section("head", target_modules=None), seed=0, modules_to_save=["k_proj"])
    assert (parameter_counts(model).trainable, parameter_counts(model).head) == (expected, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (section("boft", options={"boft_blok_size": 8}), "no option 'boft_blok_size'; did you mean 'boft_block_size'"),
        (section("lora", options={"target_modules": ["x"]}), "method lora has no option 'target_modules'"),
        (section("full", options={"r": 3}), "method full has no option 'r'; it takes none."),
        (section("full", target_modules="all-linear"), "method full needs a list of module names"),
        (section("head"), "adapter.target_modules: method head has no such setting"),
        (section("vera", rank_pattern={"q_proj": 2}), "adapter.rank_pattern: method vera has no such setting"),
        (section("svft", pattern="banded"), "off_diagonals"),
        (section("lora", options={"bias": "all", "use_dora": True, "lora_bias": True}), "method lora refuses"),
    ],
)  # fmt: skip
def test_wrong_settings_are_told(given: AdapterSection, message: str):
    with pytest.raises(ConfigError) as caught:
        peft_config(given)
    assert message in str(caught.value)


def test_options_reach_the_configuration():
    assert peft_config(section("boft", options={"boft_block_size": 8})).boft_block_size == 8  # pyright: ignore[reportAttributeAccessIssue]


def test_the_default_comparison_shares_at_equal_parameters():
    comparison = load_comparison("arithmetic-tiny")
    group = next(group for group in comparison.ablations if group.title == "Sharing")
    counts = set()
    for row in comparison.rows:
        if row.label in group.labels:
            recipe = comparison.recipe(row, 0, row.learning_rates)
            counts.add(parameter_counts(attach(load_model(recipe.model), recipe.adapter, seed=0)).trainable)
    assert counts == {16896}
