"""Classification end to end: what is trained, stored, chosen, measured, and gone on with after an interruption."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2Model,
)

from pica.errors import AdapterFileError, ConfigError, DataError
from pica.experiments.data import load_splits, with_classes
from pica.experiments.evaluate.assessing import Request, assess
from pica.experiments.interrupts import Interrupted
from pica.experiments.merge.merging import merge
from pica.experiments.models import load_classifier
from pica.experiments.pipelines import make_pipeline
from pica.experiments.recipes.parsing import load_recipe
from pica.experiments.recipes.recipe import ModelSection, Recipe
from pica.experiments.reporting import Silent
from pica.experiments.results.run import SplitSizes
from pica.experiments.train.run import resume, start
from pica.experiments.train.search import preference
from pica.experiments.train.trainers import Steps
from pica.tasks import LabelledText, get_task
from tests import results
from tests.experiments.tiny_encoder import reviews, write_tiny_bert
from tests.experiments.train.test_run import Recorder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reviews")
    for name, count, offset in (("train", 80, 0), ("dev", 20, 200), ("test", 30, 400)):
        with (folder / f"{name}.tsv").open("w", newline="") as file:
            csv.writer(file, delimiter="\t", lineterminator="\n").writerows(reviews(count, offset=offset))
    return folder


@pytest.fixture
def recipe(encoder: Path, data: Path, tmp_path: Path) -> Callable[..., Recipe]:
    def make(**overrides: object) -> Recipe:
        quick = {
            "output": str(tmp_path / "out"),
            "evaluate_base": False,
            "model.path": str(encoder),
            "data.train": str(data),
            "task.name": "sentiment",
            "adapter.r": 8,
            "trainer.max_steps": 20,
            "trainer.batch_size": 8,
            "trainer.log_steps": 5,
            "trainer.learning_rate": 0.02,
        }
        quick |= {key.replace("__", "."): value for key, value in overrides.items()}
        return load_recipe(None, list(quick.items()))

    return make


def prepared(made: Recipe):
    splits = load_splits(made, get_task(made.task.name))
    return make_pipeline(with_classes(made, splits)), splits


def test_a_run_learns_and_writes_what_a_generation_run_writes(recipe: Callable[..., Recipe], tmp_path: Path):
    reporter = Recorder()
    metrics = start(recipe(evaluate_base=True, trainer__max_steps=60), reporter=reporter).metrics
    results.check_file("metrics", tmp_path / "out" / "metrics.json")
    assert metrics.problems == SplitSizes(train=80, validation=0, test=30)
    adapter = metrics.adapter
    assert adapter.metric == "accuracy"
    assert adapter.score == adapter.scores["accuracy"] > 0.9
    assert metrics.models["base"].score < 0.7, "with an untrained head"
    assert adapter.loss < metrics.models["base"].loss
    # 2 classes, width 32: a head of 66 and a pooler of 1056, both new; rank 8 times the outputs of the six roles
    assert adapter.parameters.head == 66 + 1056
    assert adapter.parameters.trainable - adapter.parameters.head == 8 * (5 * 32 + 48)
    rows = [json.loads(line) for line in (tmp_path / "out" / "predictions-adapter.jsonl").read_text().splitlines()]
    assert sum(row["correct"] for row in rows) / 30 == pytest.approx(adapter.score)
    assert all(row["probabilities"][row["predicted"]] >= 0.5 for row in rows)
    resolved = load_recipe(str(tmp_path / "out" / "recipe.resolved.yaml"))
    assert resolved.task.labels == ["bad", "good"]
    assert (tmp_path / "out" / "loss_curve.csv").read_text().count("\n") == 1 + 13
    assert "1,122 of them in the new head" in "\n".join(reporter.said)


def test_the_best_classifier_of_a_training_is_kept(recipe: Callable[..., Recipe], tmp_path: Path):
    made = recipe(trainer__eval_steps=4, trainer__learning_rate=1.0, trainer__schedule="constant")
    adapter = start(made, reporter=Silent()).metrics.adapter
    rows = csv.DictReader((tmp_path / "out" / "loss_curve.csv").open())
    losses = {int(row["step"]): float(row["validation_loss"]) for row in rows if row["validation_loss"]}
    best = min(losses, key=losses.__getitem__)
    assert list(losses) == [4, 8, 12, 16, 20]
    assert best < 20
    assert adapter.training.best is not None
    assert adapter.training.best.step == best
    pipeline, splits = prepared(made)
    found = pipeline.held_out(pipeline.read(tmp_path / "out" / "adapter"), splits.validation)
    assert found.loss == adapter.validation_loss == pytest.approx(losses[best], rel=1e-6)
    assert found.score == adapter.validation_score


def test_head_and_pooler_are_stored_since_each_load_would_make_others(recipe: Callable[..., Recipe], tmp_path: Path):
    made = recipe(trainer__max_steps=2)
    start(made, reporter=Silent())
    with safe_open(tmp_path / "out" / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert {"base_model.model.classifier.weight", "base_model.model.bert.pooler.dense.weight"} <= names
    pipeline, splits = prepared(made)
    # A base with another head, as another seed makes it, must give the same predictions once the adapter is read.
    other, _ = prepared(replace(made, trainer=replace(made.trainer, seed=5)))
    assert not torch.equal(pipeline.load_base().classifier.weight, other.load_base().classifier.weight)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType, reportCallIssue]
    found = [
        each.evaluate(each.read(tmp_path / "out" / "adapter"), splits.test, reporter=Silent(), label="")
        for each in (pipeline, other)
    ]
    assert found[0].predictions == found[1].predictions


def test_deberta_keeps_its_pooler_too(tmp_path: Path):
    config = DebertaV2Config(
        vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    DebertaV2Model(config).save_pretrained(tmp_path)
    section = ModelSection(path=str(tmp_path))
    before = torch.get_rng_state()
    model, new = load_classifier(section, AutoModelForSequenceClassification, labels=["a", "b", "c"], seed=0)
    assert new == ["classifier", "pooler"]
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert torch.equal(before, torch.get_rng_state())


def test_another_kind_of_model_is_refused_not_filled_with_noise(tmp_path: Path):
    config = DebertaV2Config(
        vocab_size=30, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    DebertaV2Model(config).save_pretrained(tmp_path)
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lacks \d+ of the weights .* such as deberta.encoder.layer.1"):
        load_classifier(ModelSection(path=str(tmp_path)), AutoModelForSequenceClassification, labels=["a", "b"], seed=0)


def test_outputs_are_the_models_own_for_every_batch_size(recipe: Callable[..., Recipe], encoder: Path):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    examples = [LabelledText("the film is great", "good"), LabelledText("so dull and the end was cold", "bad", "weak")]
    losses = []
    for size in (1, 2):
        pipeline, _ = prepared(recipe(trainer__eval_batch_size=size))
        model = pipeline.load_base()
        found = pipeline.evaluate(model, examples, reporter=Silent(), label="")
        for example, row in zip(examples, found.predictions):
            given = tokenizer(example.text, example.pair, return_tensors="pt")
            with torch.no_grad():
                shares = model(**given).logits.softmax(-1)[0].tolist()  # pyright: ignore[reportCallIssue]
            assert list(row["probabilities"].values()) == pytest.approx(shares, abs=2e-6)
        losses.append(found.loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_rate_is_chosen_by_score_then_by_loss(recipe: Callable[..., Recipe]):
    pairs = [(0.5, 0.1), (0.9, 0.8), (0.9, 0.7)]
    candidates = [results.candidate(validation_score=score, validation_loss=loss) for score, loss in pairs]
    assert min(candidates, key=preference) is candidates[2]
    generated = [results.candidate(validation_loss=loss) for loss in (2.0, 1.0)]
    assert min(generated, key=preference) is generated[1]
    metrics = start(recipe(trainer__learning_rates=[1e-6, 0.02], trainer__max_steps=40), reporter=Silent()).metrics
    assert metrics.problems.validation == 20, "the folder's own dev file, all of it"
    assert metrics.adapter.learning_rate == 0.02
    scores = [candidate.validation_score or 0.0 for candidate in metrics.adapter.usable]
    assert scores[1] > scores[0]


def test_validation_comes_out_of_the_training_rows_where_none_is_given(
    recipe: Callable[..., Recipe], data: Path, monkeypatch: pytest.MonkeyPatch
):
    made = recipe(
        data__train=str(data / "train.tsv"), data__test=str(data / "test.tsv"), trainer__learning_rates=[1e-3, 1e-2]
    )
    splits = load_splits(made, get_task("sentiment"))
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [72, 8, 30]
    texts = [{example.text for example in part} for part in (splits.train, splits.validation, splits.test)]
    assert len(set.union(*texts)) == 110


@pytest.mark.parametrize("phase", ["rate 0.02", "answering"])
def test_resumed_run_equals_one_that_was_left_alone(recipe: Callable[..., Recipe], tmp_path: Path, phase: str):
    """With dropout on, whose generator has to be put back too."""
    whole = start(recipe(output=str(tmp_path / "whole")), reporter=Silent())
    with pytest.raises(Interrupted):
        start(recipe(), reporter=Recorder(interrupt_in=phase))
    resumed = resume(tmp_path / "out", reporter=Silent())
    files = [folder / "adapter" / "adapter_model.safetensors" for folder in (whole.output, resumed.output)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert whole.metrics.adapter.loss == resumed.metrics.adapter.loss


def test_the_head_can_have_a_rate_of_its_own(recipe: Callable[..., Recipe], tmp_path: Path):
    made = recipe(trainer__head_learning_rate=0.5, trainer__schedule="constant", trainer__warmup=0.0)
    pipeline, splits = prepared(made)
    model = pipeline.adapt(made.adapter, seed=0)
    trainer = pipeline.trainer(model, pipeline.encode(splits.train), Steps(made.trainer, 0.02, tmp_path / "c"))
    optimizer: Any = trainer.create_optimizer()
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(rates) == len(trained)
    for name, parameter in trained.items():
        expected = 0.5 if "modules_to_save" in name else 0.02
        assert rates[id(parameter)] == expected, name


def test_regression_measures_correlation(recipe: Callable[..., Recipe], tmp_path: Path, encoder: Path):
    for name, count, offset in (("train", 80, 0), ("test", 30, 400)):
        rows = [
            {"text": text, "label": 1.0 if side == "good" else -1.0} for text, side in reviews(count, offset=offset)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = recipe(data__train=str(tmp_path), task__metric="pearson", trainer__max_steps=60)
    adapter = start(made, reporter=Silent()).metrics.adapter
    assert adapter.metric == "pearson"
    assert adapter.score == adapter.scores["pearson"] > 0.8
    assert 0 < adapter.stderr < 0.2
    assert adapter.parameters.head == 33 + 1056
    row = json.loads((tmp_path / "out" / "predictions-adapter.jsonl").read_text().splitlines()[0])
    assert set(row) == {"text", "predicted", "gold"}
    found = assess(Request(str(tmp_path / "out")), reporter=Silent())
    assert found.result.score == adapter.score


def test_evaluate_knows_the_runs_classes_and_a_model_with_a_head_of_its_own(
    recipe: Callable[..., Recipe], tmp_path: Path, data: Path, encoder: Path
):
    trained = start(recipe(), reporter=Silent()).metrics.adapter
    again = assess(Request(str(tmp_path / "out")), reporter=Silent())
    assert (again.result.score, again.result.loss) == (trained.score, trained.loss)
    test = str(data / "test.tsv")
    # The adapter alone, with nothing around it that knows the classes.
    (tmp_path / "out" / "adapter").rename(tmp_path / "moved")
    alone = assess(Request(str(tmp_path / "moved"), task="sentiment", data=test), reporter=Silent())
    assert alone.result.loss == trained.loss
    swapped = Request(str(tmp_path / "moved"), task="sentiment", data=test, labels=["good", "bad"])
    assert assess(swapped, reporter=Silent()).result.score == pytest.approx(1 - trained.score)
    with pytest.raises(
        AdapterFileError, match=r"classifier.weight of shape \(2, 32\), and this model has one of shape \(3, 32\)"
    ):
        assess(replace(swapped, labels=["good", "bad", "neutral"]), reporter=Silent())
    with pytest.raises(ConfigError, match="no trained head for 2 outputs"):
        assess(Request(str(encoder), task="sentiment", data=test), reporter=Silent())


def test_what_a_run_recorded_holds_when_its_data_has_moved(recipe: Callable[..., Recipe], tmp_path: Path, data: Path):
    own = shutil.copytree(data, tmp_path / "own")
    start(recipe(data__train=str(own), trainer__max_steps=1), reporter=Silent())
    own.rename(tmp_path / "moved")
    merge(tmp_path / "out" / "adapter", tmp_path / "merged")
    assert BertForSequenceClassification.from_pretrained(tmp_path / "merged").config.id2label == {0: "bad", 1: "good"}
    with pytest.raises(ConfigError, match="--data: file '.*own' does not exist"):
        assess(Request(str(tmp_path / "out")), reporter=Silent())
    assert assess(Request(str(tmp_path / "out"), data=str(data / "test.tsv")), reporter=Silent()).task == "sentiment"


def test_merged_classifier_predicts_what_the_adapter_does(recipe: Callable[..., Recipe], tmp_path: Path, data: Path):
    trained = start(recipe(), reporter=Silent()).metrics.adapter
    merge(tmp_path / "out" / "adapter", tmp_path / "merged")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert model.config.id2label == {0: "bad", 1: "good"}
    found = assess(Request(str(tmp_path / "merged"), task="sentiment", data=str(data / "test.tsv")), reporter=Silent())
    assert found.result.loss == pytest.approx(trained.loss, rel=1e-4)
    assert found.result.score == trained.score


def test_a_class_that_training_never_saw_is_an_error_with_its_line(recipe: Callable[..., Recipe], tmp_path: Path):
    (tmp_path / "train.tsv").write_text("".join(f"{text}\t{side}\n" for text, side in reviews(8)))
    (tmp_path / "test.tsv").write_text("the film\tgood\nthe story\tso-so\n")
    with pytest.raises(DataError, match=r"test.tsv, line 2: label 'so-so' of the test data is none of 'bad', 'good'"):
        start(recipe(data__train=str(tmp_path)), reporter=Silent())
    assert not (tmp_path / "out").exists()


def test_a_head_for_other_classes_is_replaced_for_training(
    recipe: Callable[..., Recipe], tmp_path: Path, encoder: Path
):
    """A base that was fine-tuned to tell five classes apart."""
    config = BertConfig.from_pretrained(encoder, num_labels=5)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "five")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "five")
    pipeline, _ = prepared(recipe(model__path=str(tmp_path / "five")))
    model = pipeline.load_base()
    assert model.config.num_labels == 2
