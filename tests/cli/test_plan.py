"""`pica plan` as a user calls it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests import results

from pica.cli.plan import duration, parse_budget, size
from pica.errors import ConfigError


def test_a_folder_with_nothing_but_a_config(pica: Callable, model_folder: Path, tmp_path: Path):
    (tmp_path / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    outcome = pica("plan", tmp_path, "--r", 4, "--batch", 1, 2, "--length", 8, 16, "--lora-rank", 3)
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert "LlamaForCausalLM" in lines[0]
    assert lines[2].split() == ["group", "layers", "in", "out", "r", "parameters", "basis"]
    assert lines[3].split()[:4] == ["model-layers-N-self_attn-q_proj-32", "2", "32", "32"]
    assert max(map(len, lines[1:])) <= 120  # the first names the folder, however deep it lies
    for step in ("batch 1 x 8", "batch 2 x 16"):
        assert f"{step}: total" in outcome.out
    assert "LoRA r=3" in outcome.out
    assert "unknown" not in outcome.out


def test_json_has_bytes_and_adds_up(pica: Callable, model_folder: Path, tmp_path: Path):
    outcome = pica("plan", model_folder, "--budget", "1000", "--batch", 2, "--length", 8, "--json")
    assert outcome.status == 0, outcome.err
    (tmp_path / "plan.json").write_text(outcome.out)
    results.check_file("plan", tmp_path / "plan.json")
    plan = json.loads(outcome.out)
    assert plan["parameters"] == sum(g["parameters"] for g in plan["groups"]) <= 1000
    assert plan["r"] == 1000 // sum(g["out_features"] for g in plan["groups"])
    for entry in plan["memory"]:
        fixed = sum(entry[part] for part in ("weights", "basis", "adapter", "optimizer"))
        (step,) = entry["steps"]
        assert step["total"] == fixed + step["activations"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "many"], "--budget 'many' must be a number"),
        (["--budget", "3"], "too small"),
        (["--length", "100000"], "more than the 512 positions"),
        (["--share", "by-colour"], "share='by-colour' is unknown"),
        (["--r", "4", "--budget", "1M"], "not allowed with"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str, pica: Callable, model_folder: Path):
    outcome = pica("plan", model_folder, *arguments)
    assert outcome.status == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("500000", (500_000, False)),
        ("500k", (500_000, False)),
        ("1.5M", (1_500_000, False)),
        ("2_000", (2_000, False)),
        ("4MB", (4_000_000, True)),
        ("4 MiB", (4 * 2**20, True)),
        ("800kB", (800_000, True)),
        (None, (None, False)),
    ],
)
def test_budgets(text: str | None, expected: tuple[int | None, bool]):
    assert parse_budget(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-3", "4 apples", "MB", "1e6"])
def test_budgets_that_mean_nothing(text: str):
    with pytest.raises(ConfigError, match="--budget"):
        parse_budget(text)


def test_sizes_and_times_are_readable():
    assert [size(n) for n in (512, 3 * 2**20, 40 * 2**30, None)] == ["0.5 KiB", "3.0 MiB", "40.0 GiB", "unknown"]
    assert [duration(s) for s in (0.034, 5, 600, 9000)] == ["0.03 s", "5.0 s", "10 min", "2.5 h"]
