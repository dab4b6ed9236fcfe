"""Pictures end to end: what is learnt, chosen, stored, gone on with, merged, and compared."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, PretrainedConfig, ViTForImageClassification

import pica
from pica.errors import ConfigError, DataError
from pica.experiments.data import load_splits, with_classes
from pica.experiments.evaluate.assessing import Request, assess
from pica.experiments.interrupts import Interrupted
from pica.experiments.merge.merging import merge
from pica.experiments.pipelines import make_pipeline
from pica.experiments.recipes.parsing import load_recipe
from pica.experiments.recipes.recipe import Recipe
from pica.experiments.reporting import Silent
from pica.experiments.results.run import SplitSizes
from pica.experiments.train.run import resume, start
from pica.tasks import get_task
from tests.experiments.tiny_vision import CONVNEXT, SWIN, picture, write_pictures, write_tiny_vision
from tests.experiments.train.test_run import Recorder


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vision(tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, count, offset in (("train", 64, 0), ("val", 16, 100), ("test", 30, 200)):
        write_pictures(folder / name, count, offset=offset)
    return folder


@pytest.fixture
def recipe(vit: Path, data: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(**overrides: object) -> Recipe:
        quick = {
            "output": str(tmp_path / "out"),
            "evaluate_base": False,
            "model.path": str(vit),
            "data.train": str(data),
            "task.name": "images",
            "adapter.r": 8,
            "trainer.max_steps": 12,
            "trainer.batch_size": 8,
            "trainer.log_steps": 3,
            "trainer.learning_rate": 0.01,
        }
        quick |= {key.replace("__", "."): value for key, value in overrides.items()}
        return load_recipe(None, list(quick.items()))

    return make


def prepared(made: Recipe):
    splits = load_splits(made, get_task(made.task.name))
    return make_pipeline(with_classes(made, splits)), splits


def test_a_run_learns_and_its_folder_is_all_that_others_need(recipe: Callable[..., Recipe], tmp_path: Path, data: Path):
    metrics = start(recipe(evaluate_base=True, trainer__max_steps=40), reporter=Silent()).metrics
    adapter = metrics.adapter
    assert metrics.problems == SplitSizes(train=64, validation=0, test=30)
    assert adapter.metric == "accuracy"
    assert adapter.score > 0.9 > 0.75 > metrics.models["base"].score
    # 2 classes, width 32: a head of 66; rank 8 times the outputs of the six roles
    assert adapter.parameters.head == 66
    assert adapter.parameters.trainable - 66 == 8 * (5 * 32 + 48)
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions-adapter.jsonl").read_text().splitlines()]
    assert {Path(row["picture"]).parent.name == row["gold"] for row in rows} == {True}
    again = assess(Request(str(tmp_path / "out")), reporter=Silent())
    assert (again.result.score, again.result.loss) == (adapter.score, adapter.loss)
    # and the merged model is a plain one, whose processor came along
    merge(tmp_path / "out" / "adapter", tmp_path / "merged")
    model = ViTForImageClassification.from_pretrained(tmp_path / "merged").eval()
    assert model.config.id2label == {0: "circle", 1: "stripes"}
    processor = AutoImageProcessor.from_pretrained(tmp_path / "merged", backend="pil")
    shown = [picture(number)[0] for number in (200, 201)]
    with torch.no_grad():
        logits = model(**processor(images=shown, return_tensors="pt")).logits
    assert logits.argmax(-1).tolist() == [0, 1]
    found = assess(Request(str(tmp_path / "merged"), task="images", data=str(data)), reporter=Silent())
    assert found.result.loss == pytest.approx(adapter.loss, rel=1e-4)


@pytest.mark.parametrize("phase", ["rate 0.01", "answering"])
def test_resumed_run_equals_one_that_was_left_alone(recipe: Callable[..., Recipe], tmp_path: Path, phase: str):
    whole = start(recipe(output=str(tmp_path / "whole")), reporter=Silent())
    with pytest.raises(Interrupted):
        start(recipe(), reporter=Recorder(interrupt_in=phase))
    resumed = resume(tmp_path / "out", reporter=Silent())
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (whole.output, resumed.output)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("rates", [[0.01], [1e-6, 0.01]])
def test_refit_learns_from_validation_pictures_in_the_end(
    recipe: Callable[..., Recipe], tmp_path: Path, data: Path, rates: list[float]
):
    """As VTAB-1K has it: the rate is chosen on 200 pictures, and the adapter that counts has learnt from all 1,000."""
    made = recipe(data__refit=True, trainer__learning_rates=rates)
    result = start(made, reporter=Silent())
    assert result.metrics.problems.validation == 16
    adapter = result.metrics.adapter
    assert adapter.learning_rate == 0.01
    # The same adapter as one that is given all pictures as training data at once.
    lists = tmp_path / "all.txt"
    listed = [path for part in ("train", "val") for path in sorted((data / part).rglob("*.png"))]
    lists.write_text("".join(f"{path} {path.parent.name}\n" for path in listed))
    other = recipe(
        data__train=str(lists), data__test=str(data / "test"), trainer__learning_rate=0.01, output=str(tmp_path / "one")
    )
    one = start(other, reporter=Silent())
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (result.output, one.output)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert adapter.loss == one.metrics.adapter.loss
    assert adapter.training.last_loss == one.metrics.adapter.training.last_loss
    assert [each.validation_score is None for each in adapter.usable] == [len(rates) == 1] * len(rates)


@pytest.mark.parametrize(
    ("config", "targets", "widths"),
    [(SWIN, ["q_proj", "fc1", "reduction"], {16, 32, 64, 128}), (CONVNEXT, ["pwconv1", "pwconv2"], {8, 16, 32, 64})],
    ids=["swin", "convnext"],
)
def test_hierarchical_backbones_share_by_width(
    recipe: Callable[..., Recipe], tmp_path: Path, config: PretrainedConfig, targets: list[str], widths: set[int]
):
    """The stages of such a model differ in width, so that one role is several groups."""
    write_tiny_vision(tmp_path / "model", config)
    made = recipe(model__path=str(tmp_path / "model"), adapter__target_modules=targets, trainer__max_steps=4)
    pipeline, splits = prepared(made)
    model = pipeline.adapt(made.adapter, seed=0)
    rows = pica.coverage(model).rows
    assert all(len({out for out, _ in row.shapes}) == 1 for row in rows), "no group mixes widths"
    assert {row.shapes[0][0] for row in rows} == widths
    found = start(made, reporter=Silent()).metrics.adapter
    assert (found.training.last_loss or 0) < (found.training.first_loss or 0)
    reread = pipeline.read(tmp_path / "out" / "adapter")
    assert pipeline.evaluate(reread, splits.test, reporter=Silent(), label="").loss == found.loss


def test_pixels_are_the_processors_and_have_the_models_precision(recipe: Callable[..., Recipe], vit: Path):
    made = recipe(model__dtype="bfloat16")
    pipeline, splits = prepared(made)
    found = pipeline.evaluate(pipeline.load_base(), splits.test[:4], reporter=Silent(), label="")
    processor = AutoImageProcessor.from_pretrained(vit, backend="pil")
    model = pipeline.load_base()
    for row in found.predictions:
        number = int(Path(row["picture"]).stem)
        values = processor(images=[picture(number)[0]], return_tensors="pt")["pixel_values"].bfloat16()
        with torch.no_grad():
            shares = model(pixel_values=values).logits.float().softmax(-1)[0].tolist()
        assert list(row["probabilities"].values()) == pytest.approx(shares, abs=0.01)


def test_one_picture_in_two_splits_is_not_learnt_from(
    recipe: Callable[..., Recipe], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_pictures(tmp_path / "p" / "train", 12)
    write_pictures(tmp_path / "p" / "test", 4, offset=10)
    splits = load_splits(recipe(data__train=str(tmp_path / "p")), get_task("images"))
    assert (len(splits.train), len(splits.test)) == (10, 4)
    assert "2 of 12 training problems are test or validation problems too" in caplog.text


def test_unreadable_pictures_stop_a_run_or_are_left_out(
    recipe: Callable[..., Recipe], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    for split, offset in (("train", 0), ("test", 50)):
        write_pictures(tmp_path / "p" / split, 16, offset=offset)
    whole = (tmp_path / "p" / "train" / "circle" / "0002.png").read_bytes()
    (tmp_path / "p" / "train" / "circle" / "0002.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "p" / "train" / "stripes" / "0003.png").write_text("no picture")
    given = {"data__train": str(tmp_path / "p"), "trainer__max_steps": 2}
    with pytest.raises(
        DataError, match=r"2 of 16 pictures .*circle/0002.png \(.*0003.png \(no picture .*skip_unreadable"
    ):
        start(recipe(**given), reporter=Silent())
    assert not (tmp_path / "out").exists()
    metrics = start(recipe(**given, data__skip_unreadable=True), reporter=Silent()).metrics
    assert metrics.problems.train == 14
    assert "2 of 16 pictures cannot be read and are left out" in caplog.text


def test_what_only_texts_have_is_refused(recipe: Callable[..., Recipe], vit: Path):
    with pytest.raises(ConfigError) as caught:
        recipe(trainer__group_by_length=True, task__template="alpaca", model__path="embedded", data__train="x.png")
    for part in ("group_by_length is for texts", "task.template is for tasks", "for instance a ViT", "does not exist"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="skip_unreadable is for pictures"):
        load_recipe(None, [("data.skip_unreadable", True)])
    with pytest.raises(ConfigError, match="task.subset is not set.*caltech101"):
        recipe(task__name="vtab")
