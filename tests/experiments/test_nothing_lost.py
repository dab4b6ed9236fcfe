"""Runs that share a folder, that replace a finished one, that go on with something else, or whose loss is no number."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pica.errors import ConfigError, OutputError, TrainingError
from pica.experiments.interrupts import Interrupted
from pica.experiments.recipes.recipe import Recipe
from pica.experiments.reporting import Silent
from pica.experiments.train.run import resume, start
from pica.files import output as files
from tests.experiments.train.test_run import FILES, Recorder, listing


def test_whoever_comes_second_refuses(recipe: Callable[..., Recipe], tmp_path: Path):
    reporter = Recorder()
    with files.claimed(tmp_path / "out"):
        for begin in (lambda: start(recipe(), reporter=reporter), lambda: resume(tmp_path / "out", reporter=reporter)):
            with pytest.raises(OutputError, match="Another pica .* is writing .*out"):
                begin()
    assert reporter.said == []
    assert not (tmp_path / "out").exists()


def test_a_finished_run_stays_until_what_replaces_it_is_finished(recipe: Callable[..., Recipe], tmp_path: Path):
    out = tmp_path / "out"
    start(recipe(trainer__max_steps=1, adapter__r=2), reporter=Silent())
    before = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    made = recipe(trainer__max_steps=4)
    with pytest.raises(Interrupted) as caught:
        start(made, reporter=Recorder(interrupt_in="rate"), overwrite=True)
    assert caught.value.folder == out
    assert caught.value.checkpoint is not None
    assert listing(out) == FILES
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == before
    with pytest.raises(OutputError, match="not empty"):
        start(made, reporter=Silent())
    result = resume(out, reporter=Silent())
    assert (result.output, listing(out), listing(tmp_path)) == (out, FILES, ["out"])
    whole = start(replace(made, output=str(tmp_path / "whole")), reporter=Silent())
    same = [folder / "adapter" / "adapter_model.safetensors" for folder in (out, whole.output)]
    assert same[0].read_bytes() == same[1].read_bytes()


def test_a_run_goes_on_with_what_it_began_with_or_not_at_all(
    recipe: Callable[..., Recipe], model_folder: Path, tmp_path: Path
):
    model, train = tmp_path / "model", tmp_path / "train.json"
    shutil.copytree(model_folder, model)
    rows = [{"instruction": f"{i} + 1?", "output": f"The answer is {i + 1}.", "answer": str(i + 1)} for i in range(20)]
    train.write_text(json.dumps(rows))
    test = tmp_path / "test.json"
    test.write_text(json.dumps([row | {"instruction": row["instruction"].replace("+", "less")} for row in rows[:4]]))
    with pytest.raises(Interrupted):
        start(
            recipe(model__path=str(model), data__train=str(train), data__test=str(test)),
            reporter=Recorder(interrupt_in="rate"),
        )
    out = tmp_path / "out"
    places = [train, model / "config.json", out / files.RESOLVED]
    kept = [place.read_text() for place in places]
    config, settings = json.loads(kept[1]), yaml.safe_load(kept[2])
    settings["trainer"]["max_steps"] = 9
    changed = [json.dumps(rows[:11]), json.dumps(config | {"rms_norm_eps": 1e-3}), yaml.safe_dump(settings)]
    named = [
        r"the training problems \(20 then, 11 now",
        "config.json of the base model",
        r"trainer.max_steps \(6 then, 9",
    ]
    for place, text, before, name in zip(places, changed, kept, named):
        place.write_text(text)
        with pytest.raises(ConfigError, match=f"cannot go on, since this has changed: {name}[^;]*[.] Put it back"):
            resume(out, reporter=Silent())
        place.write_text(before)
    moved = train.rename(tmp_path / "elsewhere.json")
    (out / files.RESOLVED).write_text(kept[2].replace(str(train), str(moved)))
    assert resume(out, reporter=Silent()).metrics.adapter.training.steps == 6


def test_a_held_out_loss_that_is_no_number_leaves_no_adapter(recipe: Callable[..., Recipe], tmp_path: Path):
    # One step so long that the loss before it is a number and the one after it is none.
    wild = {"trainer__max_steps": 1, "trainer__max_grad_norm": 0.0}
    with pytest.raises(
        TrainingError, match="trained model's loss on the test problems is nan, so no adapter was written"
    ):
        start(recipe(trainer__learning_rate=1e37, trainer__warmup=0.0, **wild), reporter=Silent())
    assert list((tmp_path / "out").rglob("*.safetensors")) == []
    shutil.rmtree(tmp_path / "out")
    made = recipe(trainer__learning_rates=[1e37, 0.01], trainer__warmup=0.0, **wild)
    start(made, reporter=Silent())
    text = (tmp_path / "out" / "metrics.json").read_text()
    adapter = json.loads(text, parse_constant=pytest.fail)["adapter"]
    assert adapter["learning_rate"] == 0.01
    assert "its loss on the validation problems is nan" in adapter["candidates"][0]["failed"]
