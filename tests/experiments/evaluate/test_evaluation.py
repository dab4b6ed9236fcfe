"""Generated answers and held-out loss do not depend on how problems are batched."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pica.experiments.evaluate.evaluation import evaluate, held_out_loss
from pica.experiments.models import load_model, load_tokenizer
from pica.experiments.recipes.recipe import ModelSection
from pica.experiments.reporting import Silent
from pica.experiments.results.documents import to_document
from pica.experiments.results.run import GroupScore
from pica.tasks import Example, Source
from pica.tasks.arithmetic import ArithmeticTask
from pica.tasks.commonsense import CommonsenseTask
from pica.tasks.math import MathTask

TASK = ArithmeticTask()


@pytest.fixture
def loaded(model_folder: Path):
    section = ModelSection(path=str(model_folder))
    return load_model(section), load_tokenizer(section)


def test_answers_are_in_order_and_the_same_for_every_batch_size(loaded):
    model, tokenizer = loaded
    examples = TASK.load("test", Source("embedded", limit=7))
    runs = [
        evaluate(
            model, tokenizer, TASK, examples, batch_size=size, max_new_tokens=8, reporter=Silent(), label=""
        ).predictions
        for size in (1, 3, 7)
    ]
    assert runs[0] == runs[1] == runs[2]
    assert [prediction.prompt for prediction in runs[0]] == [example.prompt for example in examples]
    assert len({prediction.completion for prediction in runs[0]}) > 1


def test_one_answer_is_what_the_model_says_greedily(loaded):
    model, tokenizer = loaded
    (example,) = TASK.load("test", Source("embedded", limit=1))
    ids = tokenizer(example.prompt, return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    found = evaluate(model, tokenizer, TASK, [example], batch_size=1, max_new_tokens=5, reporter=Silent(), label="")
    assert found.predictions[0].completion == tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def test_loss_is_the_mean_over_completion_tokens(loaded):
    model, tokenizer = loaded
    examples = TASK.load("test", Source("embedded", limit=5))
    total = tokens = 0.0
    for example in examples:
        prompt = tokenizer(example.prompt)["input_ids"]
        ids = torch.tensor([prompt + tokenizer(example.completion)["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            scores = model(ids).logits[0].double().log_softmax(-1)
        for position in range(len(prompt), ids.shape[1]):
            total -= scores[position - 1, ids[0, position]].item()
            tokens += 1
    for size in (1, 2, 5):
        loss, counted = held_out_loss(model, tokenizer, examples, batch_size=size)
        assert counted == tokens
        assert loss == pytest.approx(total / tokens, rel=1e-5)


def test_accuracy_and_its_error_count_right_answers(loaded, monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = loaded
    said = ["The answer is 4.", "The answer is 5.", "The answer is 4", "nothing"]
    monkeypatch.setattr("pica.experiments.evaluate.evaluation.answers", lambda *given: said)
    examples = [Example("p", " c", "4")] * 4
    found = evaluate(model, tokenizer, TASK, examples, batch_size=2, max_new_tokens=5, reporter=Silent(), label="")
    assert found.score == 0.5
    assert found.stderr == pytest.approx(0.25)
    assert [prediction.extracted for prediction in found.predictions] == ["4", "5", "4", None]
    assert "predictions" not in to_document(found.measurement())


def test_problems_without_a_gold_solution_have_no_part_in_the_loss(loaded: tuple, recipe: Callable):
    model, tokenizer = loaded
    examples = TASK.load("test", Source("embedded", limit=3))
    bare = Example(examples[0].prompt, " ", "3")
    expected = held_out_loss(model, tokenizer, examples, batch_size=2)
    assert held_out_loss(model, tokenizer, [bare, *examples], batch_size=2) == pytest.approx(expected)


def choices(answer: str, *, group: str = "") -> Example:
    return Example("p", f" it is {answer}", answer, ("one", "two"), group)


def test_several_sets_count_the_same_whatever_their_sizes(loaded, monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = loaded
    examples = [choices("one", group="a"), *[choices("two", group="b")] * 4]
    said = ["one", "two", "two", "one", "none"]
    monkeypatch.setattr("pica.experiments.evaluate.evaluation.answers", lambda *given: said)
    found = evaluate(
        model, tokenizer, CommonsenseTask(), examples, batch_size=2, max_new_tokens=5, reporter=Silent(), label=""
    )
    assert found.score == (1.0 + 0.5) / 2
    assert found.stderr == pytest.approx(0.25 / 2)
    assert found.groups["b"] == GroupScore(accuracy=0.5, stderr=0.25, examples=4)
    assert found.measurement().groups == found.groups


@pytest.mark.parametrize("size", [1, 3])
def test_likelihood_takes_the_choice_that_the_model_gives_more_to(loaded, size: int):
    model, tokenizer = loaded
    examples = [choices("two"), choices("one"), Example("Question: 1?\nAnswer:", " no", "no", ("yes", "no", "both"))]
    expected = []
    for example in examples:
        losses = {}
        for choice in example.choices:
            completion = example.completion.removesuffix(example.answer) + choice
            loss, tokens = held_out_loss(model, tokenizer, [Example(example.prompt, completion, "")], batch_size=1)
            losses[completion] = loss * tokens
        expected.append(min(losses, key=losses.__getitem__))
    found = evaluate(
        model,
        tokenizer,
        CommonsenseTask(),
        examples,
        batch_size=size,
        max_new_tokens=1,
        reporter=Silent(),
        label="",
        by_likelihood=True,
    )
    assert [prediction.completion for prediction in found.predictions] == expected
    assert [prediction.correct for prediction in found.predictions] == [
        completion == example.completion for completion, example in zip(expected, examples)
    ]


def test_other_ways_of_scoring_stand_beside(loaded, monkeypatch: pytest.MonkeyPatch):
    model, tokenizer = loaded
    monkeypatch.setattr(
        "pica.experiments.evaluate.evaluation.answers", lambda *given: ["The answer is: 0.5", "The answer is: 3"]
    )
    examples = [Example("p", " c", "\\frac{1}{2}"), Example("p", " c", "3")]
    found = evaluate(
        model, tokenizer, MathTask(), examples, batch_size=2, max_new_tokens=5, reporter=Silent(), label=""
    )
    assert found.metrics == {"accuracy": 1.0, "exact_match": 0.5}
