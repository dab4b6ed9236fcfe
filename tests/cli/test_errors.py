"""What the user can put right is one sentence and status 2, never a traceback, and leaves no adapter behind."""

import json
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pica import cli
from pica.experiments.interrupts import Interrupted
from pica.experiments.train import run as runs

ROW = {"instruction": "How many?", "input": "", "output": "The answer is 4.", "answer": "4"}


def sentence(outcome, status: int = 2) -> str:
    """The message, after checking that it is the only thing said about the problem."""
    assert outcome.status == status
    assert "Traceback" not in outcome.err
    messages = [line for line in outcome.err.splitlines() if line.startswith("pica: ")]
    assert len(messages) == 1, outcome.err
    return messages[0]


def adapters_in(folder: Path) -> list[Path]:
    return list(folder.rglob("*.safetensors"))


def data(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--model.path", "/nowhere/model"], "model.path: model folder '/nowhere/model' does not exist."),
        (["--task.name", "aritmetic"], "unknown task; did you mean 'arithmetic'?"),
        (["--adapter.r", "0"], "adapter.r = 0: must be at least 1."),
        (["--adapter.r", "many"], "adapter.r = 'many': must be a whole number."),
        (["--adapter.rank", "4"], "adapter.rank: no such field; did you mean"),
        (["--adapter.target_modules", "[q_porj]"], "q_porj"),
        (["--adapter.r"], "Option --adapter.r needs a value."),
        (["-x"], "Unknown option -x"),
        (["--trainer.optimizer", "adamw_torhc"], "unknown optimizer; did you mean 'adamw_torch'? Known: adamw_torch,"),
        (["--trainer.threads", "100000"], "trainer.threads = 100000: must be at most"),
        (["--trainer.threads", "-1"], "trainer.threads = -1: must be at least 1."),
        (["--trainer.batch_size", "1000000000000"], "trainer.batch_size = 1000000000000: must be at most 2147483647."),
        (["--adapter.r", str(10**30)], "must be at most 2147483647."),
        (["--adapter.rank_pattern", f"{{q_proj: {10**30}}}"], "must be at most 2147483647."),
        (["--data.seed", str(10**30)], "data.seed = 1000000000000000000000000000000: must be from 0 to"),
        (["--trainer.epochs", "1e300"], "trainer.epochs = 1e+300: must be at most"),
        (["--model.revision", ""], "model.revision is empty: give a value, or leave it out."),
        (["--name", "x" * 300], "name: has 300 characters"),
        (["--data.train", "x" * 300 + ".jsonl"], "can't be used: File name too long."),
        (["--model.path", "a\0b"], "An argument holds a NUL character"),
        (["other.yaml"], "One recipe at a time"),
        (["--data.train", "none.json", "--data.test", "embedded"], "data.train: file 'none.json' does not exist"),
    ],
)
def test_bad_arguments(pica: Callable, quick: list[str], tmp_path: Path, given: list[str], message: str):
    outcome = pica("train", "arithmetic-tiny", *quick, "--baseline.method", "null", "-o", tmp_path / "out", *given)
    assert message in sentence(outcome)
    assert not (tmp_path / "out").exists()


def test_unknown_recipe(pica: Callable):
    assert "neither a file nor built in" in sentence(pica("train", "no-such-recipe"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file holds no rows."),
        (json.dumps(ROW) + "\n{broken\n", "data.jsonl, line 2: not valid JSON"),
        (
            json.dumps(ROW) + "\n" + json.dumps({"instruction": "x"}) + "\n",
            "data.jsonl, line 2: field 'answer' is missing",
        ),
    ],
)
def test_bad_data_files(pica: Callable, quick: list[str], tmp_path: Path, text: str, message: str):
    path = data(tmp_path, "data.jsonl", text)
    outcome = pica("train", *quick, "--data.train", path, "--data.test", path, "-o", tmp_path / "out")
    assert message in sentence(outcome)
    assert not (tmp_path / "out").exists()


def test_folder_that_is_not_empty(pica: Callable, quick: list[str], tmp_path: Path):
    data(tmp_path, "precious.txt", "x")
    assert "is not empty; choose another with --output." in sentence(pica("train", *quick, "-o", tmp_path))
    assert "--overwrite leaves it alone" in sentence(pica("train", *quick, "-o", tmp_path, "--overwrite"))
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_weights_that_are_no_numbers(pica: Callable, quick: list[str], model_folder: Path, tmp_path: Path):
    broken = tmp_path / "model"
    broken.mkdir()
    for path in model_folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    # The damaged layer is not among the targets, so it shows in the loss.
    outcome = pica("train", *quick, "--model.path", broken, "-o", tmp_path / "out")
    assert "The loss became nan in step 1" in sentence(outcome)
    assert adapters_in(tmp_path / "out") == []


def test_exploding_learning_rate(pica: Callable, quick: list[str], tmp_path: Path):
    given = ["--trainer.learning_rate", "1e30", "--trainer.max_grad_norm", "0", "--trainer.warmup", "0"]
    assert "The loss became nan" in sentence(pica("train", *quick, *given, "-o", tmp_path / "out"))
    assert adapters_in(tmp_path / "out") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 24 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system takes root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("more", [[], ["--trainer.save_steps", "2"]], ids=["adapter", "checkpoint"])
def test_full_disk(pica: Callable, quick: list[str], small_disk: Path, more: list[str]):
    given = ["--adapter.r", "16", "--adapter.target_modules", "all-linear", *more]
    assert "No room left to write" in sentence(pica("train", *quick, *given, "-o", small_disk / "out"))
    assert adapters_in(small_disk) == []


def test_file_size_limit(pica: Callable, quick: list[str], tmp_path: Path):
    # Stands in for the full disk where mounting is not allowed: the system refuses the adapter's bytes.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        outcome = pica("train", *quick, "-o", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "No room left to write" in sentence(outcome)
    assert adapters_in(tmp_path / "out") == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(pica: Callable, quick: list[str], tmp_path: Path):
    tmp_path.chmod(0o500)
    assert "Cannot write" in sentence(pica("train", *quick, "-o", tmp_path / "out"))


def test_evaluate_and_merge_say_what_is_missing(pica: Callable, model_folder: Path, tmp_path: Path):
    assert "Name the task with --task" in sentence(pica("evaluate", model_folder))
    assert "Unknown task 'maths': did you mean 'math'?" in sentence(pica("evaluate", model_folder, "--task", "maths"))
    assert "Name the problems with --data" in sentence(pica("evaluate", model_folder, "--task", "math"))
    missing = pica("evaluate", model_folder, "--task", "math", "--data", tmp_path / "none.jsonl")
    assert "does not exist" in sentence(missing)
    assert "does not exist" in sentence(pica("evaluate", "/nowhere/model", "--task", "arithmetic", "--limit", 1))
    assert "does not exist" in sentence(pica("merge", tmp_path / "none", "-o", tmp_path / "merged"))
    assert "holds no adapter_config.json" in sentence(pica("merge", tmp_path, "-o", tmp_path / "merged"))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PICA"}')
    (damaged := tmp_path / "base").mkdir()
    (damaged / "config.json").write_text("{")
    assert "cannot be loaded" in sentence(pica("merge", tmp_path, "-o", tmp_path / "merged", "--base", damaged))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--metric", "f1"], "--metric is for classification tasks, and arithmetic is none"),
        (["--labels", "a", "b"], "--labels is for classification tasks"),
        (["--subset", "cola"], "--subset: task arithmetic has none"),
        (["--base", "/nowhere"], "--base is for adapters"),
        (["--task", "sentiment", "--metric", "acuracy"], "--metric 'acuracy' is unknown; choose one of accuracy, f1"),
        (["--task", "sentiment", "--template", "plain"], "--template is for tasks that generate text"),
        (["--task", "sentiment", "--labels", "a", "a"], "--labels: give two or more different classes."),
        (["--task", "dreambooth", "--data", "."], "is measured on the output folder of its run"),
        (["-o", "."], "'.' is a folder; name a file with --output."),
        (["-o", f"{__file__}/answers.jsonl"], "is a file; name another file with --output."),
    ],
)
def test_evaluate_passes_over_no_option(pica: Callable, model_folder: Path, given: list[str], message: str):
    outcome = pica("evaluate", model_folder, "--task", "arithmetic", "--limit", "1", *given)
    assert message in sentence(outcome)
    assert "Answering" not in outcome.err


def test_numbers_of_evaluate_are_named(pica: Callable, model_folder: Path):
    outcome = pica("evaluate", model_folder, "--limit", "abc")
    assert outcome.status == 2
    assert "argument --limit: 'abc' is no whole number of at least 1" in outcome.err


def test_resume_takes_no_changes_and_needs_a_run(pica: Callable, tmp_path: Path):
    assert "leave out --adapter.r" in sentence(pica("train", "--resume", tmp_path, "--adapter.r", "8"))
    assert "leave out 'arithmetic-tiny'" in sentence(pica("train", "arithmetic-tiny", "--resume", tmp_path))
    assert "no run to resume" in sentence(pica("train", "--resume", tmp_path))


@pytest.mark.parametrize("switch", ["flag", "variable"])
def test_debug_shows_the_traceback_as_well(pica: Callable, monkeypatch: pytest.MonkeyPatch, switch: str):
    if switch == "variable":
        monkeypatch.setenv("PICA_DEBUG", "1")
    outcome = pica("train", "no-such-recipe", *(["--debug"] if switch == "flag" else []))
    assert outcome.status == 2
    assert "Traceback" in outcome.err
    assert "pica: error: Recipe 'no-such-recipe'" in outcome.err


def test_bugs_show_their_traceback_and_ask_for_a_report(
    pica: Callable, quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*given: object, **named: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(runs, "make_pipeline", fail)
    outcome = pica("train", *quick, "-o", tmp_path / "out")
    assert outcome.status == 1
    assert "ZeroDivisionError" in outcome.err
    assert "`pica env`" in outcome.err


@pytest.mark.parametrize("where", ["full", "closed pipe", "closed"])
def test_output_that_nobody_takes(where: str):
    code = "import os, sys, _pica_entry\n"
    if where == "closed pipe":
        code += "end, begin = os.pipe(); os.close(end); os.dup2(begin, 1)\n"
    command = [sys.executable, "-c", f"{code}sys.exit(_pica_entry.main())", "--help"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    given = {"stderr": subprocess.PIPE, "text": True, "env": buffered}
    if where == "closed":
        ended = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], **given)
    else:
        with open("/dev/full", "w") as full:
            ended = subprocess.run(command, stdout=full, **given)
    assert "Exception ignored" not in ended.stderr
    assert (ended.returncode, "No room left on the disk" in ended.stderr) == (
        (2, True) if where == "full" else (0, False)
    )


def test_the_command_that_goes_on_can_be_pasted(pica: Callable, monkeypatch: pytest.MonkeyPatch):
    def stop(arguments: list[str]) -> int:
        raise Interrupted(folder=Path("my runs/it's one"))

    monkeypatch.setattr(cli, "_dispatch", stop)
    command = sentence(pica("train"), status=130).partition("Continue with: ")[2]
    assert shlex.split(command) == ["pica", "train", "--resume", "my runs/it's one"]


def test_interruption_before_a_run_began(pica: Callable, monkeypatch: pytest.MonkeyPatch):
    def stop(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_dispatch", stop)
    assert "Interrupted" in sentence(pica("env"), status=130)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["plan", "--lora-rank", "1" + "0" * 30], "is no whole number of at most 2147483647"),
        (["plan", "--share", "²"], "share='²'"),
        (["plan", "--budget", "9" * 400], "must be a number of parameters"),
        (["analyze", "--rank", "1" + "0" * 30, "-o", "never"], "is no whole number of at most 2147483647"),
        (["evaluate", "--max-new-tokens", "1" + "0" * 30], "is no whole number of at most 2147483647"),
        (["evaluate", "--task", "arithmetic", "--limit", "2147483647"], "word problems were asked for"),
    ],
)
def test_absurd_numbers_of_commands(pica: Callable, model_folder: Path, command: list[str], message: str):
    outcome = pica(command[0], model_folder, *command[1:])
    assert outcome.status == 2
    assert message in outcome.err
    assert "Traceback" not in outcome.err


def test_names_of_a_recipe_that_are_none(pica: Callable, tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text('model: {path: "a\\0b"}\ntask: {labels: ["c\\0"]}\n')
    said = pica("train", tmp_path / "recipe.yaml").err
    assert "model.path: holds a NUL character" in said
    assert "task.labels: holds a NUL character" in said


def test_pipes_and_broken_links_are_not_waited_for(
    pica: Callable, quick: list[str], model_folder: Path, tmp_path: Path
):
    pipe, link = tmp_path / "pipe.jsonl", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to("nowhere")
    outcome = pica("evaluate", model_folder, "--task", "math", "--data", pipe)
    assert "is neither a file nor a folder" in sentence(outcome)
    assert "is a link to nowhere" in sentence(pica("train", *quick, "--model.path", link))
    for command in ("train", "compare"):
        for place in (pipe, link, tmp_path, ""):
            assert "neither a file nor built in" in sentence(pica(command, place))


def test_more_memory_than_there_is(pica: Callable, quick: list[str], tmp_path: Path):
    given = ["--adapter.method", "lora", "--adapter.r", str(2**31 - 1), "-o", tmp_path / "out"]
    assert "Not enough memory" in sentence(pica("train", *quick, *given))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("moment", ["pica.cli", "torch._utils", "transformers.utils.import_utils", "peft"])
def test_interrupts_while_libraries_are_imported(moment: str, tmp_path: Path):
    """A real signal, as soon as a module begins to be imported."""
    code = f"""
import os, signal, sys, threading, time, _pica_entry
def stop():
    while {moment!r} not in sys.modules:
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=stop, daemon=True).start()
sys.argv = ["pica", "verify", {str(tmp_path)!r}]
sys.exit(_pica_entry.main())
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 130, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("pica: Interrupted") == 1
