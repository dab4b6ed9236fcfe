"""Recipes: what can be written, and that every mistake is reported at once."""

import dataclasses
from pathlib import Path
from typing import get_args

import pytest
import yaml
from docstring_parser import parse_from_object
from jsonargparse import ArgumentError

import pica
from pica import PicaConfig, SvftConfig
from pica.basis import CALIBRATED, PROJECTIONS
from pica.errors import ConfigError
from pica.experiments.methods import METHODS, configuration
from pica.experiments.recipes import checks
from pica.experiments.recipes.parsing import (
    builtin_recipes,
    dump_recipe,
    field_help,
    load_recipe,
    option_parser,
    read_field,
    section_names,
)
from pica.experiments.recipes.recipe import AdapterSection, Recipe
from pica.tuners.pica.settings import Projection

SECTIONS = [Recipe, *(field.type for field in dataclasses.fields(Recipe) if dataclasses.is_dataclass(field.type))]


def problems_of(text: str, folder: Path, *overrides: tuple[str, object]) -> list[str]:
    path = folder / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path), overrides)
    return [line.removeprefix("- ") for line in str(caught.value).splitlines()]


def test_without_anything_all_defaults_hold():
    assert load_recipe(None) == Recipe()


def test_overrides_are_read_as_their_types():
    recipe = load_recipe(
        None,
        [
            ("adapter.r", "64"),
            ("adapter.target_modules", "[q_proj, v_proj]"),
            ("adapter.share", "2"),
            ("adapter.rank_pattern", "{k_proj: 8}"),
            ("trainer.learning_rate", "1e-4"),
            ("trainer.learning_rates", "[1e-3, 0.01]"),
            ("trainer.max_steps", "null"),
            ("model.trust_remote_code", "true"),
            ("adapter.r", "16"),
        ],
    )
    assert recipe.adapter.r == 16
    assert recipe.adapter.target_modules == ["q_proj", "v_proj"]
    assert recipe.adapter.share == 2
    assert recipe.adapter.rank_pattern == {"k_proj": 8}
    assert recipe.trainer.learning_rate == 1e-4
    assert recipe.trainer.learning_rates == [0.001, 0.01]
    assert recipe.trainer.max_steps is None
    assert recipe.model.trust_remote_code is True


def test_one_regular_expression_stays_text():
    assert load_recipe(None, [("adapter.target_modules", r".*\.[qv]_proj")]).adapter.target_modules == r".*\.[qv]_proj"


def test_dump_and_load_give_the_same_recipe(tmp_path: Path):
    recipe = load_recipe(None, [("adapter.share", "{attn: '.*attn.*'}"), ("trainer.learning_rate", 3e-5)])
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(str(path)) == recipe


def test_all_problems_are_listed_in_one_go(tmp_path: Path):
    found = problems_of(
        """
        model: {path: /nowhere/model}
        data: {train: /nowhere/train.json, trainlimit: 5}
        task: 5
        optimizer: adam
        adapter: {r: abc, share: foo, method: lra, rank_pattern: {q_proj: 0}}
        trainer: {learning_rate: -1, batch_size: 0, precision: fp8, max_steps: [1], epochs: }
        """,
        tmp_path,
        ("trainer.lr", "3"),
        ("adapter", "3"),
    )
    assert found[0].endswith("has 17 problems:")
    expected = [
        "data.trainlimit: no such field; did you mean data.train_limit?",
        "task: expected fields below it, found 5.",
        "optimizer: no such field; its fields are name, output",
        "trainer.lr: no such field; did you mean trainer.learning_rate?",
        "adapter: is a section; set one of its fields",
        "adapter.r = 'abc': must be a whole number.",
        "trainer.precision = 'fp8': must be one of float32, bfloat16, float16.",
        "trainer.max_steps = [1]: must be a whole number or null.",
        "trainer.epochs: has no value; give one or remove the line.",
        "trainer.batch_size = 0: must be at least 1.",
        "trainer.learning_rate = -1.0: must be above 0 and finite.",
        "adapter.rank_pattern: 'q_proj' has rank 0",
        "adapter.share = 'foo' is unknown; use 'role', 'none', a whole number",
        "adapter.method = 'lra': unknown method; did you mean 'lora'?",
        "model.path: model folder '/nowhere/model' does not exist.",
        "data.train: file '/nowhere/train.json' does not exist",
        "data.test is required when data.train is a file",
    ]
    assert [text for text in expected if not any(line.startswith(text) for line in found)] == []
    assert len(found) == 1 + len(expected)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("{pattern: banded}", "adapter.pattern = 'banded' needs off_diagonals, for instance 16."),
        ("{off_diagonals: 3}", "adapter.off_diagonals = 3 does not go with pattern='plain'"),
        ("{pattern: random, off_diagonals: -3}", "adapter.off_diagonals = -3 must be at least 0."),
        ("{rank_pattern: {q_proj: 4}}", "adapter.rank_pattern does not go with method svft"),
        ("{pattern: diagonal}", "adapter.pattern = 'diagonal': must be one of plain, banded, random, top_k."),
    ],
)
def test_settings_that_do_not_fit_svft_are_named(tmp_path: Path, adapter, message):
    found = problems_of("adapter: " + adapter.replace("{", "{method: svft, ", 1), tmp_path)
    assert message in "\n".join(found)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ("{method: svft, projection: random}", "adapter.projection = 'random': only method pica has it"),
        ("{method: lora, projection: minor}", "adapter.projection = 'minor': only method pica has it"),
        ("{method: pica, pattern: banded}", "adapter.pattern = 'banded': only method svft has it"),
        (
            "{method: lora, share: role}",
            "adapter.share = 'role': only pica, svft have it, and method lora has not; leave it out.",
        ),
        ("{method: svft, save_basis: true}", "adapter.save_basis = True: only method pica has it"),
        ("{method: full, off_diagonals: 2}", "adapter.off_diagonals = 2: only method svft has it"),
        ("{method: pica, lora_alpha: 16}", "adapter.lora_alpha = 16.0: only lora, rslora, dora"),
        ("{method: vera, lora_dropout: 0.1}", "adapter.lora_dropout = 0.1: only lora, rslora, dora"),
    ],
)
def test_settings_of_another_method_are_not_passed_over(tmp_path: Path, adapter: str, message: str):
    assert message in "\n".join(problems_of(f"adapter: {adapter}", tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- a\n- b\n", "expected sections"),
        ("adapter:\n  r: 4\n r: 5\n", "line 3: not valid YAML"),
        ("model:\n  path: [1]\n", "model.path = \\[1\\]: must be text"),
        ("trainer:\n  learning_rate: .nan\n", "must be above 0"),
        ("trainer:\n  learning_rate: .inf\n", "must be above 0"),
        ("trainer:\n  warmup: -0.1\n", "must be 0 or more"),
        ("name: a/b\n", "plain word"),
        ("task: {name: math}\n", "task math has no embedded problems"),
        ("baseline: {method: lora, learning_rates: []}\n", "give at least one"),
        ("trainer: {learning_rates: [0.001, 1.0e-3, 0.01]}\n", "trainer.learning_rates: 0.001 occurs twice"),
        ("baseline: {method: lora, learning_rates: [1, 1]}\n", "baseline.learning_rates: 1 occurs twice"),
    ],
)
def test_one_problem_is_one_sentence(text: str, message: str, tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value)


def test_a_field_is_read_as_by_the_parser_of_the_whole_recipe():
    """Each alone, since the whole parser takes some 30 ms for every value: two seconds for a recorded recipe."""
    whole = option_parser("pica")
    for section, name, values in (
        ("data", "train", ["a.jsonl", "[a, b]", "{a: 1}", "{a: b}", {"a": 0.5}]),
        ("adapter", "share", ["role", "2", 3, "{a: b}", 1.5, True]),
        ("trainer", "max_steps", ["3", None, "1e3", 2.0, "x"]),
        ("model", "dtype", ["auto", "half"]),
    ):
        for value in values:
            try:
                expected = whole.parse_object({section: {name: value}})[f"{section}.{name}"]
            except (ArgumentError, TypeError, ValueError):
                with pytest.raises(ConfigError, match=f"{section}.{name}"):
                    load_recipe(None, [(f"{section}.{name}", value)])
            else:
                assert read_field(f"{section}.{name}", value) == expected


def test_a_section_with_nothing_in_it_has_its_defaults(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\ntrainer:\n")
    assert load_recipe(str(path)) == Recipe(name="x")


def test_unknown_recipe_lists_the_built_in_ones():
    with pytest.raises(ConfigError, match="Did you mean 'arithmetic-tiny'.*smollm2-gsm8k"):
        load_recipe("arithmetic-tini")


def test_model_that_is_an_adapter_is_told_apart(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "this is an adapter" in str(checks.model_problem(str(tmp_path)))
    assert checks.model_problem("some-org/some-model") is None
    assert checks.model_problem("a/b/c") is not None


def test_built_in_recipes_were_found():
    assert len(builtin_recipes()) >= 4


@pytest.mark.parametrize("name", builtin_recipes())
def test_built_in_recipe_is_valid_but_for_the_places_that_only_the_user_knows(name: str, tmp_path: Path):
    data = tmp_path / "data.json"
    data.write_text("[]")
    given = yaml.safe_load(builtin_recipes()[name])
    draws = given["task"]["name"] == "dreambooth"  # whose pictures are a folder, and nothing but they need be given
    if draws:
        (tmp_path / "model_index.json").write_text("{}")
        (tmp_path / "one.png").write_bytes(b"")
    else:
        given["data"].setdefault("test", checks.REQUIRED if given["data"].get("train") == checks.REQUIRED else None)
    places = [
        (f"{section}.{key}", str(tmp_path if draws or section == "model" else data))
        for section in ("model", "data")
        for key, value in given[section].items()
        if value == checks.REQUIRED
    ]
    (tmp_path / "config.json").write_text("{}")
    recipe = load_recipe(name, places)
    assert recipe.name == name, "a run's folder is named after its recipe"
    if places:
        with pytest.raises(ConfigError, match="is not set: give a"):
            load_recipe(name)


@pytest.mark.parametrize("name", builtin_recipes())
def test_built_in_recipe_begins_with_its_command_and_says_what_it_costs(name: str):
    head = builtin_recipes()[name].split("\n\n")[0]
    assert head.startswith("# pica train")
    assert "# Hardware: " in head


def test_the_paper_run_has_the_papers_settings(tmp_path: Path):
    data = tmp_path / "data.json"
    data.write_text("[]")
    recipe = load_recipe("gemma-2b-metamathqa", [("data.test", str(data))])
    trainer = recipe.trainer
    config = configuration(recipe.adapter)
    assert isinstance(config, pica.PicaConfig)
    assert (config.r, config.share, config.projection) == (256, "role", "principal")
    assert recipe.adapter.target_modules == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert trainer.batch_size * trainer.accumulation == 64
    assert (trainer.learning_rate, trainer.schedule, trainer.warmup, trainer.weight_decay) == (1e-3, "cosine", 0.1, 0)
    assert (trainer.epochs, trainer.max_length, trainer.precision) == (2, 512, "bfloat16")


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_is_described(section: type):
    described = {parameter.arg_name: parameter.description for parameter in parse_from_object(section).params}
    for field in dataclasses.fields(section):
        assert (field.metadata.get("help") or described.get(field.name) or "").endswith((".", "s.")), (
            f"describe {section.__name__}.{field.name}"
        )


def test_help_shows_every_field():
    text = option_parser("pica").format_help()
    for section in section_names():
        for field in dataclasses.fields(getattr(Recipe(), section)):
            assert f"--{section}.{field.name} " in text


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        ("[-1, 0, 1]", ["-1", "0", "1"]),
        ('["-1", "0"]', ["-1", "0"]),
        ([-1, 0, 1.0], ["-1", "0", "1"]),
        ("[false, true]", ["false", "true"]),
        ("[good, bad]", ["good", "bad"]),
    ],
)
def test_labels_may_be_numbers_or_true_and_false(given: object, labels: list[str]):
    text = {"task.name": "sentiment", "model.path": "a/b", "data.train": "hub:a/b", "data.test": "hub:a/b"}
    assert load_recipe(None, [*text.items(), ("task.labels", given)]).task.labels == labels
    with pytest.raises(ConfigError, match="task.labels: give two or more different classes"):
        load_recipe(None, [*text.items(), ("task.labels", ["1", "1.0"])])
    with pytest.raises(ConfigError, match="task.labels = .*: must be a list of texts or null"):
        load_recipe(None, [*text.items(), ("task.labels", "[[1], a]")])


@pytest.mark.parametrize("kind", [PicaConfig, SvftConfig])
def test_fields_of_our_methods_take_help_and_default_from_the_configuration(kind: type[PicaConfig] | type[SvftConfig]):
    own = {field.name: field for field in dataclasses.fields(METHODS[kind.method.lower()].settings or object)}  # pyright: ignore[reportArgumentType]
    section = {field.name: field for field in dataclasses.fields(AdapterSection)}
    for field in dataclasses.fields(kind):
        if field.name in own and field.name in METHODS[kind.method.lower()].takes:
            assert field.metadata["help"][1:].split(".")[0] in field_help()[f"adapter.{field.name}"]
            assert section[field.name].default == field.default


def test_the_kinds_of_directions_are_those_that_bases_have():
    assert get_args(Projection) == (*PROJECTIONS, *CALIBRATED)
