"""What helps one to begin: help by section, `pica recipes`, `init`, `schema` and `completion`."""

import dataclasses
import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastjsonschema
import pytest
import yaml

from pica.cli import COMMANDS, main
from pica.cli.options import fitted
from pica.cli.recipe_help import FIRST
from pica.errors import DataError
from pica.experiments.compare.comparison import builtin_comparisons
from pica.experiments.recipes.parsing import builtin_recipes, load_recipe, recipe_fields, section_names
from pica.experiments.recipes.recipe import Recipe
from pica.experiments.recipes.schema import comparison_schema, recipe_schema
from pica.experiments.recipes.starting import talking_task

Run = Callable[..., str]


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in 80 columns; returns what it prints."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str, status: int = 0) -> str:
        assert main(list(arguments)) == status
        found = capsys.readouterr()
        return found.out if status == 0 else found.err

    return run


def test_help_on_train_fits_two_screens(output: Run):
    lines = output("train", "--help").splitlines()
    assert len(lines) <= 96
    assert all(f"--{name} " in "\n".join(lines) for name in FIRST)
    assert not set(FIRST) - set(recipe_fields())


@pytest.mark.parametrize("arguments", [[], ["train", "--help-all"], *([name, "--help"] for name in COMMANDS)])
def test_help_is_no_wider_than_the_terminal(output: Run, arguments: list[str]):
    lines = output(*arguments).splitlines()
    assert [line for line in lines if len(line) > 80] == []


def test_a_text_keeps_its_words_and_its_commands_in_any_width(monkeypatch: pytest.MonkeyPatch):
    text = """A sentence that goes on for a while, and then
another one.

examples:
  pica plan ./model --r 64        what it costs
  pica plan ./model --target-parameters experts.gate_up_proj experts.down_proj --json
"""
    monkeypatch.setenv("COLUMNS", "200")
    assert fitted(text).splitlines()[3:] == text.splitlines()[4:]
    for width in (70, 30):  # where an option and its values fit, and where they do not
        monkeypatch.setenv("COLUMNS", str(width))
        narrow = fitted(text)
        assert narrow.replace("\\\n", "").split() == text.split()
        assert max(map(len, narrow.splitlines())) <= max(width, 66)


@pytest.mark.parametrize("section", section_names())
def test_help_on_a_section_has_its_fields_in_words(output: Run, section: str):
    text = output("help", "train", section)
    assert text == output("train", "--help", section)
    own = [name for name in recipe_fields() if name.startswith(f"{section}.")]
    assert all(f"--{name} " in text for name in own)
    others = [name for name in recipe_fields() if "." in name and name not in own]
    assert not any(f"  --{name} " in text for name in others)
    assert not any(word in text for word in ("Optional[", "Literal[", "dict[", "list[", "str |"))


def test_help_all_has_every_field(output: Run):
    text = output("train", "--help-all")
    assert all(f"--{name} " in text for name in recipe_fields() if name != "output")


def test_help_on_a_command_is_its_help(output: Run):
    assert output("help", "verify") == output("verify", "--help")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["help", "train", "trainr"], "Help has no topic 'trainr'. Did you mean 'trainer'?"),
        (["help", "trian"], "did you mean 'train'?"),
        (["recipes", "smollm2-gsm8"], "did you mean 'smollm2-gsm8k'?"),
        (["schema", "recipes"], "invalid choice: 'recipes'"),
        (["init", "--model", "x"], "needs --model, --data and --goal"),
        (["init", "--model", "x", "--data", "y", "--goal", "chatt"], "did you mean 'chat'?"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(
    output: Run, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    assert message in output(*arguments, status=2)
    assert not list(tmp_path.iterdir())


def test_recipes_are_listed_and_shown(output: Run):
    text = output("recipes")
    assert max(map(len, text.splitlines())) <= 90
    for name in (*builtin_recipes(), *builtin_comparisons()):
        assert f"\n  {name} " in text
    assert output("recipes", "smollm2-gsm8k") == builtin_recipes()["smollm2-gsm8k"]
    assert output("recipes", "digits") == builtin_comparisons()["digits"]
    assert all(text in output("recipes", "arithmetic-tiny") for text in ("max_new_tokens: 48", "methods:"))


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """A file of conversations."""
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]} for i in range(9)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_init_writes_a_recipe_that_trains(output: Run, chats: Path, tmp_path: Path):
    target = tmp_path / "mine.yaml"
    text = output("init", "--model", "embedded", "--data", str(chats), "--goal", "chat", "-o", str(target))
    assert f"pica train {target}" in text
    recipe = load_recipe(str(target))
    assert (recipe.model.path, recipe.data.train, recipe.task.name) == ("embedded", str(chats), "chat")
    lines = target.read_text().splitlines()
    assert all(
        above.startswith("  # ") for above, line in zip(lines, lines[1:]) if line.startswith("  ") and "#" not in line
    )
    given = ["init", "--model", "m", "--data", "d", "--goal", "chat", "-o"]
    assert "is there already" in output(*given, str(target), status=2)
    assert "is a folder" in output(*given, str(tmp_path), status=2)
    assert "is a file; name another" in output(*given, str(target / "deeper.yaml"), status=2)
    assert load_recipe(str(target)) == recipe


def test_init_asks_three_questions(output: Run, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Terminal(f"embedded\n{chats}\n\n"))  # the goal is the one that the data suggests
    target = tmp_path / "asked.yaml"
    text = output("init", "-o", str(target))
    assert text.count("]: ") == 3
    assert load_recipe(str(target)).task.name == "chat"


@pytest.mark.parametrize(
    ("goal", "more"),
    [("preference", "preference.beta"), ("reward", "reward.num_generations"), ("reward", "task.subset")],
)
def test_init_knows_preferences_and_rewards(output: Run, goal: str, more: str, tmp_path: Path):
    target = tmp_path / "mine.yaml"
    output("init", "--model", "embedded", "--data", "embedded", "--goal", goal, "-o", str(target))
    section, _, name = more.partition(".")
    assert name in yaml.safe_load(target.read_text())[section]
    assert load_recipe(str(target)).task.name == goal


def test_init_says_which_data_is_missing(output: Run, tmp_path: Path):
    (tmp_path / "train.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    target = tmp_path / "math.yaml"
    output("init", "--model", "embedded", "--data", str(tmp_path / "train.jsonl"), "--goal", "math", "-o", str(target))
    assert "data.test" in output("train", str(target), status=2)


def problems(schema: dict[str, Any], value: Any) -> list[str]:
    """What a JSON schema says first against a value."""
    try:
        fastjsonschema.validate(schema, value)
    except fastjsonschema.JsonSchemaValueException as refused:
        return [refused.message]
    return []


def test_schemas_take_what_is_built_in(output: Run):
    assert json.loads(output("schema", "recipe")) == recipe_schema()
    assert json.loads(output("schema", "comparison")) == comparison_schema()
    for name, text in builtin_recipes().items():
        assert problems(recipe_schema(), yaml.safe_load(text)) == [], name
    for name, text in builtin_comparisons().items():
        assert problems(comparison_schema(), yaml.safe_load(text)) == [], name
    assert problems(recipe_schema(), dataclasses.asdict(Recipe())) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"modle": {}},
        {"adapter": {"r": "four"}},
        {"adapter": {"projection": "main"}},
        {"trainer": {"learning_rates": 1}},
    ],
)
def test_a_schema_refuses_what_a_recipe_does(wrong: dict[str, Any]):
    assert problems(recipe_schema(), wrong)
    assert problems(comparison_schema(), {"methods": [{"label": "x"}], "base": wrong})


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tra"], {"train"}),
        (["train", "--adapter.ra"], {"--adapter.rank_pattern"}),
        (["compare", "--adapter.projection", "mi"], {"minor"}),
        (["verify", "--fil"], {"--files-only"}),
    ],
)
def test_bash_completes(output: Run, words: list[str], offered: set[str], tmp_path: Path):
    script = tmp_path / "pica.bash"
    script.write_text(output("completion", "bash"))
    typed = " ".join(["pica", *words])
    ask = f"source {script}; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _shtab_pica; echo ${{COMPREPLY[@]}}"
    found = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=60)
    assert set(found.stdout.split()) == offered, found.stderr


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_every_command(output: Run, shell: str):
    text = output("completion", shell)
    assert all(name in text for name in COMMANDS)
    assert "adapter.rank_pattern" in text


def test_a_device_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch):
    """This machine may have an accelerator, but not all of them."""
    import torch

    from pica.errors import ConfigError
    from pica.experiments.models import device

    absent = next(kind for kind in ("mps", "xpu", "cuda") if not getattr(torch, kind).is_available())
    monkeypatch.setenv("PICA_DEVICE", absent)
    with pytest.raises(ConfigError, match=f"Device {absent} was asked for, and PyTorch .* does not find one"):
        device()
    monkeypatch.setenv("PICA_DEVICE", "cpu")
    assert device() == torch.device("cpu")


@pytest.mark.parametrize(
    "arguments",
    [["train", "-o", "out"], ["compare", "-o", "out"], ["plan", "embedded"], ["basis", "embedded", "-o", "out"]],
)
def test_a_device_that_is_not_there_is_told_before_anything_is_written(
    output: Run, arguments: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    import torch

    monkeypatch.chdir(tmp_path)
    absent = next(kind for kind in ("mps", "xpu", "cuda") if not getattr(torch, kind).is_available())
    assert f"Device {absent} was asked for" in output(*arguments, "--device", absent, status=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:1", ""])
def test_a_device_that_never_was_is_told_at_once(output: Run, name: str):
    assert f"--device {name!r}: there is no such device" in output("plan", "embedded", "--device", name, status=2)


def test_a_device_reaches_the_processes_that_a_command_starts(monkeypatch: pytest.MonkeyPatch):
    import os

    from pica import cli

    seen = {}
    monkeypatch.setattr(cli, "_dispatch", lambda arguments: seen.update(os.environ) or len(arguments))
    assert main(["train", "--device=cuda:3", "-o", "x"]) == 3
    assert (seen["PICA_DEVICE"], seen["CUDA_VISIBLE_DEVICES"]) == ("cuda:3", "3")
    assert "PICA_DEVICE" not in os.environ
    assert os.environ.get("CUDA_VISIBLE_DEVICES") != "3"


def test_what_a_file_is_for_is_seen_by_its_columns_under_our_names(tmp_path: Path):
    rows, pairs = tmp_path / "rows.jsonl", tmp_path / "pairs.jsonl"
    rows.write_text('{"q": "Hello?", "a": "Good morning."}\n')
    pairs.write_text('{"q": "Hello?", "good": "Good morning.", "bad": "What?"}\n')
    assert talking_task(str(rows), {}) is None
    assert talking_task(str(rows), {"prompt": "q", "completion": "a"}) == "chat"
    assert talking_task(str(rows), {"instruction": "q", "answer": "a"}) is None
    assert talking_task(str(pairs), {"prompt": "q", "chosen": "good", "rejected": "bad"}) == "preference"
    with pytest.raises(DataError, match="data.columns names 'b'"):
        talking_task(str(rows), {"prompt": "q", "completion": "b"})


def test_a_table_is_told_by_its_header(tmp_path: Path):
    rows, pairs = tmp_path / "rows.csv", tmp_path / "pairs.csv"
    rows.write_text("instruction,input,output\nGreet.,me,Good morning.\n")
    pairs.write_text("prompt,chosen,rejected\nHello?,Good morning.,What?\n")
    assert talking_task(str(rows), {}) == "chat"
    assert talking_task(str(pairs), {}) == "preference"


def test_conversations_are_no_arithmetic_where_no_model_is_named(output: Run, tmp_path: Path):
    rows = tmp_path / "rows.csv"
    rows.write_text("instruction,output\n" + "".join(f"Greet {n}.,Good morning {n}.\n" for n in range(20)))
    arguments = ["train", "--data.train", str(rows), "-o", str(tmp_path / "out")]
    assert "has no chat template" in output(*arguments, status=2)
    assert "18 conversations, `alpaca`" in output(*arguments, "--task.chat_template", "plain", "--dry-run")
