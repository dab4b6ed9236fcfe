"""Help is there for every command, and costs no torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import pica
from pica.cli import COMMANDS, main

ENTER = "import sys, _pica_entry\nsys.argv = ['pica', *{arguments!r}]\nstatus = _pica_entry.main()\n"
HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "numpy")


def enter(*arguments: str, then: str = "") -> subprocess.CompletedProcess[str]:
    """Run the console script's function in a fresh interpreter."""
    code = ENTER.format(arguments=arguments) + then + "\nsys.exit(status)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy(arguments: list[str]):
    found = enter(
        *arguments, then=f"heavy = [name for name in {HEAVY} if name in sys.modules]\nassert not heavy, heavy"
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout
    assert found.stderr == ""


@pytest.mark.parametrize(
    "task",
    [
        ["--data.columns", "{prompt: q, completion: b}"],
        ["--data.columns", "{prompt: q, completion: b}", "--task.name", "chat"],
        ["--data.columns", "{text: q, label: b}", "--task.name", "sentiment", "--data.test", "chats.jsonl"],
    ],
)
def test_a_missing_column_is_told_before_anything_heavy_is_imported(
    task: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text('{"q": "Hello?", "a": "Good morning."}\n' * 20)
    found = enter(
        *["train", "--model.path", "some/model", "--data.train", "chats.jsonl", *task, "-o", "out"],
        then=f"heavy = [name for name in {HEAVY} if name in sys.modules]\nassert not heavy, heavy",
    )
    assert found.returncode == 2, found.stderr
    assert "line 1" in found.stderr
    assert "'b'" in found.stderr
    assert not Path("out").exists()


def test_as_a_module_it_is_the_same_command():
    command = [sys.executable, "-X", "importtime", "-m", "pica", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout == f"pica {pica.__version__}\n"
    imported = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
    assert "pica.cli" in imported
    assert not imported & set(HEAVY)


def test_a_module_run_by_name_that_imports_pica_has_the_method(tmp_path: Path):
    """Also while Python still looks for it: the package around it is imported before."""
    (tmp_path / "user").mkdir()
    (tmp_path / "user" / "__init__.py").write_text("import pica\nfrom peft import PeftType\nPeftType.PICA\n")
    (tmp_path / "user" / "work.py").write_text("print('ok')\n")
    command = [sys.executable, "-m", "user.work"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert found.stdout == "ok\n", found.stderr


def test_help_takes_less_than_half_a_second_of_a_processor():
    def seconds() -> float:
        begun = os.times()
        assert enter("--help").returncode == 0
        ended = os.times()
        return ended.children_user + ended.children_system - begun.children_user - begun.children_system

    assert min(seconds() for _ in range(3)) < 0.5


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in COMMANDS)


def test_train_help_shows_fields_options_and_examples(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for part in ("--adapter.r ", "--resume", "--overwrite", "arithmetic-tiny", "pica recipes", "examples:"):
        assert part in text
    assert "--adapter CONFIG" not in text


@pytest.mark.parametrize("arguments", [["evaluate"], ["merge", "x"], ["merge", "x", "-o", "y", "--dtype", "int8"]])
def test_incomplete_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    assert "usage: pica" in capsys.readouterr().err


def test_unknown_command_is_told_with_the_near_one(capsys: pytest.CaptureFixture[str]):
    assert main(["trian"]) == 2
    assert "did you mean 'train'?" in capsys.readouterr().err
