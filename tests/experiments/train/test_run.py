"""Whole runs: their files, their choices, and going on after an interruption in any phase."""

import json
import os
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from pica.errors import ConfigError, OutputError, TargetError, TrainingError
from pica.experiments.interrupts import Interrupted
from pica.experiments.recipes.parsing import dump_recipe, load_recipe
from pica.experiments.recipes.recipe import Recipe, with_absolute_paths
from pica.experiments.reporting import Silent
from pica.experiments.results.documents import result_document, to_document
from pica.experiments.train.run import resume, start
from pica.experiments.train.search import preference
from tests import results

FILES = ["adapter", "loss_curve.csv", "metrics.json", "predictions-adapter.jsonl", "recipe.resolved.yaml"]


class Recorder(Silent):
    """Keeps what is said and which bars are shown; sends a real SIGINT at the first advance of one of them."""

    def __init__(self, interrupt_in: str = "") -> None:
        self.said, self.bars, self._interrupt_in = list[str](), list[str](), interrupt_in

    def say(self, text: str) -> None:
        self.said.append(text)

    @contextmanager
    def bar(self, label: str, total: int):
        self.bars.append(label)

        def advance(count: int = 1, note: str = "") -> None:
            if self._interrupt_in and self._interrupt_in in label:
                self._interrupt_in = ""
                os.kill(os.getpid(), signal.SIGINT)

        yield advance


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_writes_its_files_and_says_what_it_measured(recipe: Callable[..., Recipe], tmp_path: Path):
    reporter = Recorder()
    made = recipe(evaluate_base=True)
    result = start(made, reporter=reporter)
    assert listing(tmp_path / "out") == sorted([*FILES, "predictions-base.jsonl"])
    assert load_recipe(str(tmp_path / "out" / "recipe.resolved.yaml")) == made
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(result_document(result.metrics)))
    results.check_file("metrics", tmp_path / "out" / "metrics.json")
    assert metrics["problems"] == {"train": 40, "validation": 0, "test": 4}
    assert metrics["seed"] == 0
    assert {"torch", "peft", "trl", "pica-peft"} <= set(metrics["versions"])
    # q: 32, v: 16, up: 48 outputs, one shared matrix each, rank 4
    assert metrics["adapter"]["parameters"]["trainable"] == 4 * (32 + 16 + 48)
    assert metrics["adapter"]["loss"] < metrics["base"]["loss"]
    assert metrics["adapter"]["training"]["steps"] == 6
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions-adapter.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [
        {"prompt", "completion", "extracted", "gold", "correct", "loss", "tokens"}
    ] * 4
    assert (tmp_path / "out" / "loss_curve.csv").read_text().count("\n") == 1 + 4
    said = "\n".join(reporter.said)
    assert "up_proj" in said, "the table of adapted layers"
    assert "Trainable parameters (pica r=4): 384 of" in said


def test_what_is_left_out_of_the_data_is_listed(recipe: Callable[..., Recipe], tmp_path: Path):
    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(6)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text(
        '{"question": "what is 4+1", "answer": "5"}\n{"question": "4 - 1", "answer": "3"}\n'
    )
    data = {"data__train": str(tmp_path / "train.jsonl"), "data__test": str(tmp_path / "test.jsonl")}
    reporter = Recorder()
    start(recipe(task__name="math", task__template="plain", trainer__max_steps=1, **data), reporter=reporter)
    assert "Problems: 5 train, 2 test; 1 left out, listed in left-out.jsonl" in reporter.said
    assert listing(tmp_path / "out") == sorted([*FILES, "left-out.jsonl"])
    assert json.loads((tmp_path / "out" / "left-out.jsonl").read_text()) == {
        "place": f"{tmp_path / 'train.jsonl'}, line 5",
        "problem": "What is 4 + 1?\n",
        "reason": f"is a test problem too ({tmp_path / 'test.jsonl'}, line 1)",
    }


@pytest.mark.parametrize("start_from", ["pissa", "olora"])
def test_the_base_is_measured_as_it_is_where_the_method_changes_it(recipe: Callable[..., Recipe], start_from: str):
    plain = start(recipe(evaluate_base=True, trainer__max_steps=1), reporter=Silent()).metrics.models["base"]
    moved = recipe(
        evaluate_base=True,
        trainer__max_steps=1,
        adapter__method="lora",
        adapter__options={"init_lora_weights": start_from},
    )
    assert start(moved, reporter=Silent(), overwrite=True).metrics.models["base"].loss == plain.loss


def test_rates_that_six_digits_do_not_tell_apart_are_two_trainings(recipe: Callable[..., Recipe]):
    rates = [0.012345678, 0.012345679]
    adapter = start(recipe(trainer__max_steps=1, trainer__learning_rates=rates), reporter=Silent()).metrics.adapter
    assert [candidate.learning_rate for candidate in adapter.candidates] == rates


def test_a_validation_loss_that_is_no_number_is_never_the_best():
    losses = [float("nan"), 2.0, float("inf"), 1.0, float("nan")]
    candidates = [results.candidate(validation_loss=loss) for loss in losses]
    assert min(candidates, key=preference).validation_loss == 1.0
    assert min(reversed(candidates), key=preference).validation_loss == 1.0


@pytest.mark.parametrize(
    ("settings", "title", "trainable"),
    [
        # q: 32 wide, v: 16, up: 32, two layers
        ({}, "svft plain", 2 * (32 + 16 + 32)),
        ({"adapter__pattern": "random", "adapter__off_diagonals": 1}, "svft random d=1", 2 * (94 + 46 + 94)),
        (
            {"adapter__pattern": "top_k", "adapter__off_diagonals": 1, "adapter__share": "role"},
            "svft top_k d=1, share=role",
            234,
        ),
    ],
    ids=["plain", "random", "top_k shared"],
)
def test_svft_trains_and_is_measured_like_pica(
    recipe: Callable[..., Recipe], tmp_path: Path, settings, title, trainable
):
    reporter = Recorder()
    made = recipe(adapter__method="svft", evaluate_base=True, baseline__method="svft", **settings)
    metrics = start(made, reporter=reporter).metrics
    assert metrics.adapter.title == title
    assert metrics.adapter.parameters.trainable == trainable
    assert metrics.adapter.loss < metrics.models["base"].loss
    assert (metrics.trained["baseline"].title, metrics.trained["baseline"].pattern) == ("svft plain", "plain")
    results.check_file("metrics", tmp_path / "out" / "metrics.json")
    said = "\n".join(reporter.said)
    assert f"Trainable parameters ({title}): {trainable} of" in said
    assert "up_proj" in said, "the table of adapted layers"


def test_the_rate_with_the_lowest_validation_loss_is_kept(recipe: Callable[..., Recipe], tmp_path: Path):
    # The second trains best; the third has no finite loss and must not end the run.
    made = recipe(trainer__learning_rates=[1e-6, 0.01, 1e30], trainer__max_grad_norm=0.0, baseline__method="lora")
    metrics = start(made, reporter=Recorder()).metrics
    first, second, third = (to_document(one) for one in metrics.adapter.candidates)
    assert metrics.adapter.learning_rate == 0.01
    assert second["validation_loss"] < first["validation_loss"]
    assert "The loss became nan" in third["failed"]
    results.check_file("metrics", tmp_path / "out" / "metrics.json")
    assert metrics.problems.validation == 4
    # LoRA r=1: in + out a layer, two layers
    assert metrics.trained["baseline"].parameters.trainable == 2 * ((32 + 32) + (32 + 16) + (32 + 48))
    assert (tmp_path / "out" / "baseline" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "checkpoints").exists()
    alone = start(recipe(output=str(tmp_path / "alone"), trainer__max_grad_norm=0.0), reporter=Silent())
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (tmp_path / "out", alone.output)]
    assert files[0].read_bytes() == files[1].read_bytes(), "the chosen adapter is what its rate alone gives"


@pytest.mark.parametrize("phase", ["Base model", "pica r=4, rate 0.01", "pica r=4: answering", "lora r=1, rate 0.001"])
def test_resuming_from_any_phase_ends_in_the_same_adapters(recipe: Callable[..., Recipe], tmp_path: Path, phase: str):
    changes = {"evaluate_base": True, "baseline__method": "lora", "trainer__max_steps": 4}
    whole = start(recipe(output=str(tmp_path / "whole"), **changes), reporter=Silent())
    with pytest.raises(Interrupted) as caught:
        start(recipe(**changes), reporter=Recorder(interrupt_in=phase))
    assert caught.value.folder == tmp_path / "out"
    assert (caught.value.checkpoint is not None) == ("rate" in phase)
    assert not (tmp_path / "out" / "metrics.json").exists()
    second = Recorder()
    resumed = resume(tmp_path / "out", reporter=second)
    assert ("Base model: answering" in second.bars) == (phase == "Base model"), "what was measured is not done again"
    for name in ("adapter", "baseline"):
        paths = [folder / name / "adapter_model.safetensors" for folder in (whole.output, resumed.output)]
        assert paths[0].read_bytes() == paths[1].read_bytes()
        assert whole.metrics.models[name].loss == resumed.metrics.models[name].loss
    assert listing(whole.output) == listing(resumed.output)


def test_local_places_are_recorded_so_that_they_are_found_from_anywhere(
    recipe: Callable[..., Recipe], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": "1?", "output": "The answer is 1.", "answer": "1"}]))
    monkeypatch.chdir(tmp_path)
    made = recipe(model__path=os.path.relpath(model_folder), data__test="data.json")
    found = with_absolute_paths(made)
    assert (found.model.path, found.data.test, found.data.train) == (str(model_folder), str(data), "embedded")
    assert made.data.test == "data.json", "the caller's recipe is left alone"
    assert with_absolute_paths(recipe(model__path="org/name")).model.path == "org/name"


def test_interruption_before_anything_is_written_leaves_nothing(recipe: Callable[..., Recipe], tmp_path: Path):
    class Impatient(Silent):
        def say(self, text: str) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted) as caught:
        start(recipe(), reporter=Impatient())
    assert caught.value.folder is None
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["pica", "lora"])
def test_unmatched_target_ends_before_a_folder_is_made(recipe: Callable[..., Recipe], tmp_path: Path, method: str):
    with pytest.raises(TargetError, match="q_projj"):
        start(recipe(adapter__target_modules=["q_projj"], adapter__method=method), reporter=Silent())
    assert not (tmp_path / "out").exists()


def test_failed_training_leaves_no_adapter(recipe: Callable[..., Recipe], tmp_path: Path):
    with pytest.raises(TrainingError):
        start(recipe(trainer__learning_rate=1e30, trainer__max_grad_norm=0.0), reporter=Silent())
    assert list((tmp_path / "out").rglob("*.safetensors")) == []


def test_all_rates_failing_is_one_sentence(recipe: Callable[..., Recipe]):
    with pytest.raises(TrainingError, match="None of the learning rates .* trained; add lower ones"):
        start(recipe(trainer__learning_rates=[1e30, 1e31], trainer__max_grad_norm=0.0), reporter=Silent())


def test_folder_in_use_is_refused_before_any_work_and_replaced_when_asked(
    recipe: Callable[..., Recipe], tmp_path: Path
):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "recipe.resolved.yaml").write_text(dump_recipe(recipe()))
    (folder / "old.txt").write_text("x")
    reporter = Recorder()
    with pytest.raises(OutputError, match="not empty"):
        start(recipe(), reporter=reporter)
    assert reporter.said == []
    # A run that can't begin must not have deleted the one before it.
    with pytest.raises(TargetError):
        start(recipe(adapter__target_modules=["nothing"]), reporter=reporter, overwrite=True)
    assert (folder / "old.txt").exists()
    start(recipe(), reporter=reporter, overwrite=True)
    assert listing(folder) == sorted(FILES)


def test_only_an_unfinished_run_can_be_resumed(recipe: Callable[..., Recipe], tmp_path: Path):
    with pytest.raises(ConfigError, match="no run to resume"):
        resume(tmp_path / "nothing", reporter=Silent())
    start(recipe(), reporter=Silent())
    with pytest.raises(ConfigError, match="is finished"):
        resume(tmp_path / "out", reporter=Silent())
