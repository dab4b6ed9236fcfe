from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from peft import PeftConfig, PeftType

import pica
from pica import PicaConfig
from pica.errors import ConfigError


def test_the_public_surface_is_a_decision():
    assert sorted(pica.__all__) == sorted(set(pica.__all__))
    for name in pica.__all__:
        assert getattr(pica, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        pica.no_such_name  # noqa: B018 - the access is what is tested


def test_registration_extends_the_enum_once():
    pica.register()
    pica.register()
    assert [m for m in PeftType if m.value == "PICA"] == [PeftType("PICA")]
    assert PeftType["PICA"].name == "PICA"
    assert hash(PeftType("PICA")) == hash("PICA")
    assert PicaConfig().peft_type is PeftType("PICA")


OWN_FIELDS = [
    f for f in dataclasses.fields(PicaConfig) if f.name not in {b.name for b in dataclasses.fields(PeftConfig)}
]


@pytest.mark.parametrize("field", OWN_FIELDS, ids=lambda f: f.name)
def test_every_field_is_described_in_whole_sentences(field):
    assert field.metadata["help"].endswith(".")


def test_all_problems_are_listed_at_once():
    with pytest.raises(ConfigError) as error:
        PicaConfig(r=0, projection="top", share="all", rank_pattern={"q": -1}, bias="some")  # pyright: ignore
    for part in ("r=0", "projection='top'", "share='all'", "rank_pattern['q']=-1", "bias='some'"):
        assert part in str(error.value)


@pytest.mark.parametrize("r", [True, 2.0, "8", None])
def test_a_rank_is_a_whole_number(r):
    with pytest.raises(ConfigError, match="r="):
        PicaConfig(r=r)


def test_layers_to_transform_needs_a_list_of_names():
    with pytest.raises(ConfigError, match="layers_to_transform"):
        PicaConfig(target_modules=".*q_proj", layers_to_transform=[1])
    with pytest.raises(ConfigError, match="layers_pattern"):
        PicaConfig(layers_pattern="layers")


def test_a_config_survives_its_file(tmp_path):
    config = PicaConfig(
        r=7,
        target_modules=["v_proj", "q_proj"],
        share={"q_proj": "queries"},
        projection="random",
        projection_seed=5,
        rank_pattern={"v_proj": 3},
    )
    config.save_pretrained(str(tmp_path))
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "PICA"
    assert stored["target_modules"] == ["q_proj", "v_proj"]  # sorted: the same config gives the same file
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, PicaConfig)
    assert loaded == dataclasses.replace(config, basis_format=1)  # stored, so a file may be expected to follow


def test_a_broken_regular_expression_is_told_before_anything_is_matched():
    with pytest.raises(ConfigError, match=r"target_modules='\(' is not a regular expression"):
        PicaConfig(target_modules="(")


@pytest.mark.parametrize("field", ["share", "rank_pattern"])
def test_a_mapping_keeps_its_order_in_the_file(tmp_path, field):
    """The first expression that matches counts, and PEFT writes mappings sorted."""
    entries: Any = {"layers.0.q_proj": 2, ".*q_proj": 3, ".*": 4}
    if field == "share":
        entries = {key: f"group{number}" for key, number in entries.items()}
    settings: Any = {field: entries}
    PicaConfig(**settings).save_pretrained(str(tmp_path))
    again = getattr(PicaConfig.from_pretrained(str(tmp_path)), field)
    assert list(again.items()) == list(entries.items())
    settings[field] = dict(sorted(entries.items()))
    assert PicaConfig(**settings).to_dict()[field] == settings[field]
