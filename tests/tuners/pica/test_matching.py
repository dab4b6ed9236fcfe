"""Expressions of a configuration, which anybody may have written, end: matched as PEFT matches them, or refused."""

from __future__ import annotations

import json
import time
import warnings
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule

from pica import PicaConfig, SvftConfig
from pica.errors import ConfigError
from pica.tuners.base import matching
from pica.tuners.base.matching import matches, problem_of_pattern, resolved, start_counting
from tests.families import make

NEVER = r"((\w|\.)*)*X"  # which takes `re` for ever, and `regex` no time
SLOW = r"(.|..|...)*(?<=X)"  # which takes `regex` for ever, too
ONCE = ["target_modules", "exclude_modules", "share", "layers_pattern", "modules_to_save"]

pytestmark = pytest.mark.timeout(60)


def settings(what: str, pattern: str) -> dict[str, Any]:
    """A configuration's fields, with an expression in one of them."""
    field: dict[str, Any] = {
        "target_modules": {"target_modules": pattern},
        "exclude_modules": {"exclude_modules": pattern},
        "share": {"share": {pattern: "one"}},
        "layers_pattern": {"layers_to_transform": [0], "layers_pattern": pattern},
        "modules_to_save": {"modules_to_save": [pattern]},
        "rank_pattern": {"rank_pattern": {pattern: 4}},
    }[what]
    return {"target_modules": ["q_proj"], **field}


@pytest.mark.parametrize("what", [*ONCE, "rank_pattern"])
def test_an_expression_that_re_would_never_be_through_with_ends(tiny_llama, what: str):
    with suppress(ValueError):  # it matches nothing, which some settings are refused for
        get_peft_model(tiny_llama(num_hidden_layers=1), PicaConfig(r=2, **settings(what, NEVER)))


@pytest.mark.parametrize(
    ("method", "what"),
    [*((PicaConfig, what) for what in [*ONCE, "rank_pattern"]), *((SvftConfig, what) for what in ONCE)],
    ids=lambda value: getattr(value, "method", value),
)
def test_one_that_no_engine_is_through_with_is_refused_in_a_sentence(tiny_llama, monkeypatch, method: Any, what: str):
    monkeypatch.setattr(matching, "SECONDS", 0.05)
    base = tiny_llama(num_hidden_layers=1)
    modules = [name for name, _ in base.named_modules()]
    with pytest.raises(ConfigError, match=rf"{what}='.*' takes too long to compare with the names of modules"):
        get_peft_model(base, method(**settings(what, SLOW)))
    assert [name for name, _ in base.named_modules()] == modules
    assert not hasattr(base, "peft_config")


def test_the_experts_of_target_parameters_are_matched_within_the_limit(monkeypatch):
    monkeypatch.setattr(matching, "SECONDS", 0.05)
    fields: dict[str, Any] = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    with pytest.raises(ConfigError, match="rank_pattern='.*' takes too long"):
        get_peft_model(make("Qwen3MoeForCausalLM"), PicaConfig(r=2, rank_pattern={SLOW: 4}, **fields))
    with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match any targeted module"):
        get_peft_model(make("Qwen3MoeForCausalLM"), PicaConfig(r=2, rank_pattern={NEVER: 4}, **fields))


@pytest.mark.parametrize("way", ["PeftModel", "transformers"])
def test_a_folder_with_such_an_expression_is_refused_and_the_model_as_it_was(
    tiny_llama, monkeypatch, tmp_path: Path, way: str
):
    model = get_peft_model(tiny_llama(num_hidden_layers=1), PicaConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank_pattern": {SLOW: 4}}))
    monkeypatch.setattr(matching, "SECONDS", 0.05)
    base = tiny_llama(num_hidden_layers=1)
    load = partial(PeftModel.from_pretrained, base) if way == "PeftModel" else base.load_adapter
    with pytest.raises(ConfigError, match="rank_pattern='.*' takes too long"):
        load(str(tmp_path))
    assert not any("pica" in name for name, _ in base.named_modules())


def test_all_names_together_have_a_limit_too(monkeypatch):
    """An expression may take a little less than the limit for each of a model's thousands of modules."""
    monkeypatch.setattr(matching, "SECONDS_IN_ALL", 0.3)
    start_counting()
    matched = 0
    with suppress(ConfigError):
        for number in range(10_000):
            assert matches(SLOW, f"layers.{number:05}", what="target_modules") is None
            matched += 1
    assert 1 < matched < 10_000
    with pytest.raises(ConfigError, match="takes too long"):
        matches("layers", "layers", what="target_modules")
    start_counting()  # the next adapter has a limit of its own
    assert matches("layers", "layers", what="target_modules")


@pytest.mark.parametrize(
    "pattern",
    [
        "((a{1000}){1000}){1000}",  # `regex` prepares each of them, in memory
        "(?:(?:(?:a?){1000}){1000}){1000}",
        "a{99999999}",
        "(?x)a{1 00 00 00 00}",
        "(?x:(?:a{1 000}){1 000})",
        "|".join(["layers"] * 50_000),
    ],
    ids=lambda pattern: pattern[:20],
)
def test_an_expression_too_large_to_prepare_is_refused(pattern: str):
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=r"repeats too much|verbose expression"):
        PicaConfig(target_modules=pattern)
    assert time.perf_counter() - began < 2


def test_counts_as_people_use_them_are_none_too_many():
    twenty = "|".join(rf"model\.layers\.\d{{1,2}}\.(self_attn|mlp){{1}}\.x{n}" for n in range(20))
    assert problem_of_pattern(twenty, "target_modules") is None
    long = "|".join(f"model.layers.{n}.self_attn.q_proj" for n in range(2_000))
    assert problem_of_pattern(long, "target_modules") is None


@pytest.mark.parametrize("what", [*ONCE, "rank_pattern"])
@pytest.mark.parametrize("pattern", ["q_proj(", r"\p{L}", "(?P<idx>q)(?P<idx>p)", "[", "(" * 5000 + ")" * 5000])
def test_what_is_no_expression_is_told_before_a_model_is_touched(what: str, pattern: str):
    with pytest.raises(ConfigError, match=rf"{what}=.* is not a regular expression"):
        PicaConfig(**settings(what, pattern))


def test_keys_of_rank_pattern_that_match_nothing_are_warned_of_as_peft_does(tiny_llama):
    ranks = {"k_proj": 3, "q_proj": 4, ".*0.*q_proj": 5}  # the last one matches, though another comes first
    config = PicaConfig(r=2, target_modules=["q_proj"], rank_pattern=ranks)
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys did not match .* ignored: \['k_proj'\]") as told:
        model = get_peft_model(tiny_llama(num_hidden_layers=1), config)
    assert len([w for w in told if "rank_pattern" in str(w.message)]) == 1
    assert config.rank_pattern == ranks, "the configuration is as it was given"
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.add_adapter("second", PicaConfig(r=2, target_modules=["q_proj"], rank_pattern={"q_proj": 4}))


KEYS = [
    "model.embed_tokens",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.mlp.experts.1.up_proj",
    "blocks.1.attn.q_proj",
    "q_proj",
    "q_proj_extra",
    "lm_head",
]
CHOICES: list[dict[str, Any]] = [
    {"target_modules": r".*\.(q|up)_proj"},
    {"target_modules": r"model\.layers\.(\d)\..*"},
    {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1\..*"},
    {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["layers.0|blocks"]},
    {"target_modules": r".*q_proj.*", "modules_to_save": ["self_attn.q_proj"]},
    {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["blocks", "layers"]},
    {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": r"(layers|experts)"},
    {"target_modules": ["q_proj"], "layers_to_transform": [], "layers_pattern": "layers"},
    {"target_modules": ["blocks.1.attn.q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [0]},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_modules_are_chosen_as_peft_chooses_them(choice: dict[str, Any]):
    config = PicaConfig(**choice)
    given = config.to_dict()
    for key in KEYS:
        wanted = BaseTuner._check_target_module_exists(config, key)
        found = BaseTuner._check_target_module_exists(resolved(config, key), key)
        assert (bool(found), isinstance(found, _ExcludedModule)) == (
            bool(wanted),
            isinstance(wanted, _ExcludedModule),
        ), key
    assert config.to_dict() == given, "what is found out is noted in copies"
