"""What is looked at while a training goes on: it changes nothing, the best adapter is kept, and a resume loses nothing."""

import csv
import json
import math
import os
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pica.errors import ConfigError
from pica.experiments.interrupts import Interrupted
from pica.experiments.recipes.parsing import load_recipe
from pica.experiments.recipes.recipe import Recipe
from pica.experiments.reporting import Silent
from pica.experiments.results.documents import to_document
from pica.experiments.results.run import BestStep
from pica.experiments.train.run import resume, start
from tests import results


class CrashError(Exception):
    pass


class Watcher(Silent):
    """Keeps what is said and each note of the training's bar; ends the run at one of its steps."""

    def __init__(self, step: int | None = None, by: str = "signal") -> None:
        self.said, self.notes, self._step, self._by = list[str](), list[str](), step, by

    def say(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def bar(self, label: str, total: int):
        done = 0

        def advance(count: int = 1, note: str = "") -> None:
            nonlocal done
            if "rate" not in label:
                return
            done += count
            self.notes.append(note)
            if count and done == self._step:
                if self._by == "crash":
                    raise CrashError
                os.kill(os.getpid(), signal.SIGINT)

        yield advance


def curve(folder: Path) -> list[dict[str, str]]:
    with open(folder / "loss_curve.csv", newline="") as file:
        return list(csv.DictReader(file))


def validation_losses(folder: Path) -> dict[int, float]:
    return {int(row["step"]): float(row["validation_loss"]) for row in curve(folder) if row["validation_loss"]}


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def chat(model_folder: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe on twenty short conversations; the held-out answers are so different that the last adapter is not best."""
    for name, answer in (("train", "It is {}."), ("validation", 60 * "W")):
        rows = [
            [{"role": "user", "content": f"Say {n} to {name}."}, {"role": "assistant", "content": answer.format(n % 3)}]
            for n in range(20)
        ]
        text = "\n".join(json.dumps({"messages": messages}) for messages in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)

    def make(output: str, **overrides: object) -> Recipe:
        quick = {
            "output": str(tmp_path / output),
            "evaluate_base": False,
            "model.path": str(model_folder),
            "data.train": str(tmp_path / "train.jsonl"),
            "data.validation": str(tmp_path / "validation.jsonl"),
            "task.name": "chat",
            "task.chat_template": "plain",
            "task.max_new_tokens": 4,
            "task.answers": 2,
            "adapter.r": 4,
            "adapter.target_modules": ["q_proj", "v_proj", "up_proj"],
            "trainer.max_steps": 8,
            "trainer.batch_size": 4,
            "trainer.eval_steps": 2,
            "trainer.sample_steps": 3,
            "trainer.learning_rate": 0.1,
            "trainer.schedule": "constant",
        }
        quick |= {key.replace("__", "."): value for key, value in overrides.items()}
        return load_recipe(None, list(quick.items()))

    return make


@pytest.mark.parametrize(("method", "by"), [("pica", "signal"), ("lora", "crash")])
def test_a_resumed_run_ends_as_one_that_was_left_alone(
    chat: Callable[..., Recipe], tmp_path: Path, method: str, by: str
):
    """Also where the best adapter of the first attempt came after the checkpoint."""
    options = {"adapter__method": method, "trainer__save_steps": 3 if by == "crash" else None}
    options |= {"trainer__packing": True, "trainer__max_length": 64} if by == "signal" else {}
    start(chat("whole", **options), reporter=Silent())
    with pytest.raises(CrashError if by == "crash" else Interrupted):
        start(chat("cut", **options), reporter=Watcher(5, by))
    if by == "crash":  # the last checkpoint is that of step 3
        kept = (tmp_path / "cut" / "checkpoints").glob("*/best-*")
        assert sorted(folder.name for folder in kept) == ["best-2", "best-4"]
    resume(tmp_path / "cut", reporter=Silent())
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert sorted(path.name for path in whole.iterdir()) == sorted(path.name for path in cut.iterdir())
    for name in ("adapter/adapter_model.safetensors", "samples.jsonl", "loss_curve.csv", "predictions-adapter.jsonl"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    rows = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 3, 6, 6]
    assert all(row["prompt"].startswith("Say ") and row["answer"] for row in rows)


def test_the_adapter_with_the_lowest_held_out_loss_is_written(chat: Callable[..., Recipe], tmp_path: Path):
    method = "lora"
    kept = start(chat("kept", adapter__method=method), reporter=(seen := Watcher())).metrics
    last = start(chat("last", adapter__method=method, trainer__keep_best=False), reporter=Silent()).metrics
    losses = validation_losses(tmp_path / "kept")
    assert losses == validation_losses(tmp_path / "last")
    assert list(losses) == [2, 4, 6, 8]
    best = min(losses, key=losses.__getitem__)
    assert best < 8
    results.check_file("metrics", tmp_path / "kept" / "metrics.json")
    assert kept.adapter.training.best == BestStep(step=best, validation_loss=losses[best])
    assert kept.adapter.validation_loss == losses[best]
    assert last.adapter.validation_loss == losses[8]
    assert any(f"kept that of step {best}" in line for line in seen.said)
    assert any("step 3: Say " in line for line in seen.said)
    shorter = start(
        chat("shorter", adapter__method=method, trainer__max_steps=best, trainer__keep_best=False), reporter=Silent()
    )
    assert weights(tmp_path / "kept") == weights(shorter.output) != weights(tmp_path / "last")
    assert kept.adapter.loss == shorter.metrics.adapter.loss
    assert kept.adapter.training.first_loss is not None
    assert "samples" not in json.dumps(to_document(kept))


def test_training_stops_where_the_held_out_loss_no_longer_falls(chat: Callable[..., Recipe], tmp_path: Path):
    options = {"trainer__max_steps": 20, "trainer__eval_steps": 1, "trainer__patience": 3, "trainer__save_steps": 1}
    result = start(chat("out", **options), reporter=(seen := Watcher()))
    losses = validation_losses(tmp_path / "out")
    training = to_document(result.metrics.adapter.training)
    assert training["stopped_early"]
    assert training["steps"] == training["best"]["step"] + 3 == len(losses) < 20
    assert any(f"stopped at step {training['steps']}" in line for line in seen.said)


def test_watching_does_not_change_what_is_learnt(recipe: Callable[..., Recipe], tmp_path: Path):
    """With dropout: what is drawn for it, and whether it is on, are the same."""
    options = {"adapter__method": "lora", "adapter__lora_dropout": 0.5, "data__hold_out": True, "trainer__log_steps": 1}
    watched = recipe(**options, output=str(tmp_path / "watched"), trainer__eval_steps=1, trainer__keep_best=False)
    start(watched, reporter=Silent())
    start(recipe(**options, output=str(tmp_path / "alone")), reporter=Silent())
    assert weights(tmp_path / "watched") == weights(tmp_path / "alone")
    assert [row["loss"] for row in curve(tmp_path / "watched")] == [row["loss"] for row in curve(tmp_path / "alone")]
    assert len(validation_losses(tmp_path / "watched")) == 6


def test_each_rate_and_the_baseline_are_watched(recipe: Callable[..., Recipe], tmp_path: Path):
    options = {"trainer__learning_rates": [0.01, 0.3], "baseline__method": "lora", "trainer__eval_steps": 3}
    metrics = start(recipe(**options), reporter=Silent()).metrics
    for name, count in (("adapter", 2), ("baseline", 1)):
        rows = [row for row in curve(tmp_path / "out") if row["run"] == name and row["validation_loss"]]
        assert len(rows) == 2 * count
        lowest = min(float(row["validation_loss"]) for row in rows)
        assert metrics.trained[name].validation_loss == lowest


def test_every_step_has_its_own_note(recipe: Callable[..., Recipe], tmp_path: Path):
    start(recipe(trainer__log_steps=1, trainer__accumulation=2, trainer__eval_steps=3), reporter=(seen := Watcher()))
    rows = [row for row in curve(tmp_path / "out") if row["loss"]]
    assert len(seen.notes) == len(rows) == 6
    for note, row in zip(seen.notes, rows):
        loss, *_ = note.removeprefix("loss ").split(", ")
        assert float(loss) == pytest.approx(float(row["loss"]), abs=2e-4)
        assert "tokens/s" in note
        assert note.endswith(" MiB")
    assert "held out" not in seen.notes[2]
    assert f"held out {validation_losses(tmp_path / 'out')[3]:.4f}" in seen.notes[3]
    assert len(set(seen.notes)) == 6


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"trainer.eval_steps": 0}, "trainer.eval_steps = 0: must be at least 1."),
        ({"trainer.patience": 2}, "trainer.patience = 2: counts measurements, which only trainer.eval_steps makes"),
        (
            {"trainer.keep_best": False},
            "trainer.keep_best = false: there is no best adapter without trainer.eval_steps",
        ),
        ({"trainer.eval_steps": 2, "data.refit": True}, "trainer.eval_steps does not go with data.refit"),
        (
            {"trainer.sample_steps": 2},
            "trainer.sample_steps is for tasks chat, preference, reward, and the task is arithmetic",
        ),
        (
            {"trainer.report_to": ["tensorbord"]},
            "trainer.report_to = 'tensorbord': unknown program; did you mean 'tensorboard'?",
        ),
        ({"trainer.report_to": ["wandb", "wandb"]}, "trainer.report_to: 'wandb' occurs twice"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_done(fields: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as caught:
        load_recipe(None, list(fields.items()))
    assert said in str(caught.value)


def test_a_program_that_is_not_installed_is_named_before_training(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pica.experiments.watching.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="trainer.report_to: wandb is not installed: pip install wandb"):
        start(recipe(trainer__report_to=["wandb"]), reporter=Silent())
    assert not (tmp_path / "out").exists()


def test_each_training_is_a_wandb_run_of_its_own(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    start(recipe(trainer__report_to=["wandb"], trainer__learning_rates=[0.01, 0.02]), reporter=Silent())
    assert not {"WANDB_DIR", "WANDB_PROJECT"} & os.environ.keys(), "as it was before"
    assert len(list((tmp_path / "out" / "logs" / "wandb").glob("offline-run-*"))) == 2


@pytest.mark.parametrize(("given", "project"), [("run", "out"), ("sums", "sums")])
def test_trackio_has_each_training_in_the_project_of_the_run(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, project: str
):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio is not installed")
    start(recipe(name=given, trainer__report_to=["trackio"], trainer__learning_rates=[0.01, 0.02]), reporter=Silent())
    assert sorted(run.name for run in trackio.Api().runs(project)) == ["out-adapter-lr0.01", "out-adapter-lr0.02"]


def test_tensorboard_gets_both_curves(recipe: Callable[..., Recipe], tmp_path: Path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # pyright: ignore[reportMissingImports]

    start(recipe(trainer__report_to=["tensorboard"], trainer__eval_steps=2), reporter=Silent())
    [folder] = (tmp_path / "out" / "logs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    losses = {event.step: event.value for event in events.Scalars("eval/loss")}
    expected = validation_losses(tmp_path / "out")
    assert list(losses) == list(expected)
    assert all(math.isclose(losses[step], expected[step], rel_tol=1e-5) for step in expected)
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 4, 6]
