"""`SvftConfig`, the registration, and the numbers of parameters of the paper's models on the meta device."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GemmaConfig

import pica
from pica import SvftConfig
from pica.errors import ConfigError

GEMMA_2B = GemmaConfig(
    vocab_size=256000,
    hidden_size=2048,
    intermediate_size=16384,
    num_hidden_layers=18,
    num_attention_heads=8,
    num_key_value_heads=1,
    head_dim=256,
)
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "diagonal"}, "pattern='diagonal' is unknown; use one of plain, banded"),
        ({"pattern": "banded"}, "pattern='banded' needs off_diagonals"),
        ({"off_diagonals": 2}, "does not go with pattern='plain'"),
        ({"pattern": "banded", "off_diagonals": -1}, "off_diagonals=-1 must be at least 0"),
        ({"pattern": "banded", "off_diagonals": 1.5}, "off_diagonals=1.5 must be a whole number or null"),
        ({"pattern_seed": "x"}, "pattern_seed='x' must be a whole number"),
        ({"share": "layer"}, "share='layer' is unknown"),
        ({"bias": "pica_only"}, "'svft_only'"),
    ],
)
def test_wrong_values_are_named(settings, message):
    with pytest.raises(ConfigError) as error:
        SvftConfig(**settings)
    assert message in str(error.value)
    assert str(error.value).startswith("SvftConfig: ")


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(GEMMA_2B)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 193_536),
        ({"pattern": "banded", "off_diagonals": 16}, 6_352_416),
        ({"pattern": "random", "off_diagonals": 16}, 6_352_416),
        ({"pattern": "top_k", "off_diagonals": 16}, 6_352_416),
        ({"share": "role"}, 5 * 2048 + 2 * 256),
        ({"share": 9}, 2 * (5 * 2048 + 2 * 256)),
    ],
    ids=["plain", "banded", "random", "top_k", "plain shared", "plain shared by 9"],
)
def test_trainable_parameters_are_the_papers(settings, expected):
    model = get_peft_model(on_meta(), SvftConfig(target_modules=SEVEN, **settings))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert pica.coverage(model).trainable == expected


def test_more_off_diagonals_than_a_layer_has_train_all_its_entries():
    with pytest.warns(UserWarning, match=r"off_diagonals=9 is more than some layers have; 0 \(width 4\)"):
        model = get_peft_model(
            nn.Sequential(nn.Linear(6, 4)), SvftConfig(pattern="banded", off_diagonals=9, target_modules=["0"])
        )
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 16
