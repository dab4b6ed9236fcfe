"""One training: what it changes, what it leaves behind, and how it ends when something goes wrong."""

import hashlib
import json
import os
import resource
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pica.errors import OutputError, TrainingError
from pica.experiments.adapters import attach, baseline_section
from pica.experiments.data import load_splits
from pica.experiments.interrupts import Interrupted, stop_on_signal
from pica.experiments.models import load_adapter, load_model
from pica.experiments.pipelines import make_pipeline
from pica.experiments.recipes.recipe import Recipe
from pica.experiments.reporting import Silent
from pica.experiments.train.trainers import Steps, generation_arguments
from pica.experiments.train.training import Training, last_checkpoint, save_adapter, train
from pica.tasks import get_task


class InterruptAt(Silent):
    """Sends this process a real signal once so many steps are done."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    @contextmanager
    def bar(self, label: str, total: int):
        done = 0

        def advance(count: int = 1, note: str = "") -> None:
            nonlocal done
            done += count
            if count and done == self.step:
                os.kill(os.getpid(), self.number)

        yield advance


def run(recipe: Recipe, folder: Path, reporter: Any = None, method: str = "pica", **changes: Any) -> Training:
    section = recipe.adapter if method == "pica" else baseline_section(recipe.baseline, recipe.adapter)
    model = changes.pop("model", None) or attach(load_model(recipe.model), section, seed=recipe.trainer.seed)
    pipeline = make_pipeline(recipe)
    rows = pipeline.encode(load_splits(recipe, get_task("arithmetic")).train)
    return train(
        model,
        pipeline,
        rows,
        recipe.trainer,
        learning_rate=changes.pop("learning_rate", 0.01),
        checkpoints=folder,
        adapter=folder / "adapter",
        reporter=reporter or Silent(),
        label="test",
    )


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_training_lowers_the_loss_and_touches_nothing_but_the_adapter(recipe: Callable[..., Recipe], tmp_path: Path):
    made = recipe(trainer__max_steps=12)
    model = attach(load_model(made.model), made.adapter, seed=0)
    before = {name: value.clone() for name, value in model.named_parameters()}
    measured = run(made, tmp_path, model=model)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {name for name, value in model.named_parameters() if value.requires_grad}
    assert measured.curve[-1]["loss"] < measured.curve[0]["loss"]
    assert [point["step"] for point in measured.curve] == [1, 2, 4, 6, 8, 10, 12]
    assert measured.result.steps == 12
    assert (measured.result.step_seconds or 0) > 0
    assert measured.result.peak_memory["host"] > 50


def test_the_written_adapter_is_the_trained_one(recipe: Callable[..., Recipe], tmp_path: Path):
    made = recipe()
    model = attach(load_model(made.model), made.adapter, seed=0)
    run(made, tmp_path, model=model)
    read = load_adapter(load_model(made.model), tmp_path / "adapter")
    ids = torch.arange(2, 60)[None]
    with torch.no_grad():
        model.eval()
        assert torch.equal(read(ids).logits, model(ids).logits)
        assert not torch.equal(read(ids).logits, load_model(made.model)(ids).logits)


@pytest.mark.parametrize("method", ["pica", "lora"])
def test_same_seed_same_bytes_other_seed_other_bytes(recipe: Callable[..., Recipe], tmp_path: Path, method: str):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(hash(name) % 1000)  # what ran before must not matter
        run(recipe(trainer__seed=seed), tmp_path / name, method=method)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


@pytest.mark.parametrize("method", ["pica", "lora"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_gives_the_same_bytes(
    recipe: Callable[..., Recipe], tmp_path: Path, method: str, number: int
):
    made = recipe(trainer__save_steps=100)
    run(made, tmp_path / "whole", method=method)
    with pytest.raises(Interrupted) as caught:
        run(made, tmp_path / "cut", InterruptAt(4, number), method=method)
    checkpoint = caught.value.checkpoint
    assert checkpoint is not None
    assert checkpoint == tmp_path / "cut" / "checkpoint-4"
    assert not (tmp_path / "cut" / "adapter").exists()
    load_adapter(load_model(made.model), checkpoint)  # usable as it is
    times = json.loads((checkpoint / "step_times.json").read_text())
    assert len(times) == 4
    (checkpoint / "step_times.json").write_text(json.dumps([1000.0] * 4))
    rest = run(made, tmp_path / "cut", method=method)
    assert rest.result.steps == 6
    assert 4000 < rest.result.seconds < 4500  # those before the interruption and after it
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    "content", ["[0.1, 0.", '{"a": 1}', "[null]", None], ids=["cut short", "mapping", "null", "missing"]
)
def test_a_checkpoint_with_damaged_times_is_gone_on_from(
    recipe: Callable[..., Recipe], tmp_path: Path, content: str | None
):
    made = recipe(trainer__save_steps=100)
    with pytest.raises(Interrupted) as caught:
        run(made, tmp_path, InterruptAt(4))
    assert caught.value.checkpoint is not None
    times = caught.value.checkpoint / "step_times.json"
    times.unlink() if content is None else times.write_text(content)
    assert run(made, tmp_path).result.steps == 6


def test_signal_in_the_last_step_loses_nothing(recipe: Callable[..., Recipe], tmp_path: Path):
    run(recipe(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(recipe(), tmp_path / "cut", InterruptAt(6))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_second_signal_stops_at_once_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    made = []

    def signal_twice() -> None:
        with stop_on_signal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            made.append(stop.made)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        signal_twice()
    assert made == [True]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_loss_that_is_no_number_stops_with_one_sentence_and_no_adapter(recipe: Callable[..., Recipe], tmp_path: Path):
    made = recipe(trainer__max_grad_norm=0.0, trainer__save_steps=1)
    with pytest.raises(TrainingError, match=r"The loss became nan in step \d.*now 1e\+30"):
        run(made, tmp_path, learning_rate=1e30)
    assert not (tmp_path / "adapter").exists()


def test_parameters_that_are_no_numbers_are_not_written(recipe: Callable[..., Recipe], tmp_path: Path):
    # The loss of the last step is taken before its update, so it can't tell of a bad one.
    model = attach(load_model(recipe().model), recipe().adapter, seed=0)
    save_adapter(model, tmp_path / "good")
    trained = next(value for value in model.parameters() if value.requires_grad)
    with torch.no_grad():
        trained[0, 0] = float("inf")
    with pytest.raises(TrainingError, match="is not finite after training, so no adapter was written"):
        save_adapter(model, tmp_path / "bad")
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_refused_checkpoint_is_an_output_error_and_leaves_no_half_of_one(recipe: Callable[..., Recipe], tmp_path: Path):
    made = recipe(trainer__save_steps=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # less than the adapter's tensors take
    try:
        with pytest.raises(OutputError, match="No room left to write .*checkpoint-2"):
            run(made, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_incomplete_checkpoints_are_passed_over(tmp_path: Path):
    for step, state in ((2, '{"global_step": 2}'), (10, '{"global_step": 10}'), (12, '{"global_st'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_checkpoint(tmp_path / "none") is None


def test_nothing_slow_is_on_that_was_not_asked_for(recipe: Callable[..., Recipe], tmp_path: Path):
    made = generation_arguments(Steps(recipe().trainer, 0.01, tmp_path))
    assert not made.gradient_checkpointing  # TRL's default is on
    assert not made.bf16  # TRL's default is on
    assert not made.fp16
    assert made.report_to in ([], "none", ["none"])
    assert made.eval_strategy == "no"
    assert generation_arguments(
        Steps(recipe(trainer__gradient_checkpointing=True).trainer, 0.01, tmp_path)
    ).gradient_checkpointing
