"""Screens of many short trainings: what a candidate computes, what is compared, and that a stopped one goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.candidates import Looked, LowRank, count, rank_for, scaled
from benchmarks.short_runs import Records, Task, best_rate, load_task, losses, mean, paired_difference
from torch import nn
from torch.nn.functional import linear

from benchmarks import candidates, diagnostics, forgetting, harness, short_runs

SMALL = {
    "model.dtype": "float32",
    "data.train_limit": 80,
    "data.validation_limit": 4,
    "data.test_limit": 6,
    "trainer.max_length": 64,
}


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task(SMALL, steps=2, batch=4)


@pytest.fixture(scope="module")
def looked(task: Task) -> Iterator[Looked]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "CALIBRATION_ROWS", 8)
        yield Looked(task)


def test_losses_are_those_of_the_model(task: Task):
    found = losses(task.model, task.test)
    for row, (nats, tokens) in zip(task.test, found):
        batch = short_runs.batch_of([row])
        assert tokens == sum(label != -100 for label in row["labels"][1:])
        assert nats == pytest.approx(float(task.model(**batch).loss) * tokens, rel=1e-4)
    assert mean(found) == pytest.approx(sum(n for n, _ in found) / sum(t for _, t in found))


def test_the_update_is_that_of_the_formula():
    base, x = nn.Linear(6, 5), torch.randn(3, 6)
    read, write, d = torch.randn(2, 6), torch.randn(5, 2), torch.randn(2)
    expected = x.double() @ (base.weight.double() + write.double() @ torch.diag(d).double() @ read.double()).T
    torch.testing.assert_close(LowRank(base, read, write, d)(x), (expected + base.bias.double()).float())
    torch.testing.assert_close(LowRank(base, read, write)(x), base(x) + linear(linear(x, read), write))


def test_every_candidate_starts_as_the_model_within_the_budget_and_trains(task: Task, looked: Looked):
    budget = count(candidates.lora(looked, 1, 0)[1])
    before = losses(task.model, task.test)
    for name, make in candidates.candidates(6).items():
        r = rank_for(looked, name, make, budget)
        made, trained = make(looked, r, 0)
        assert 0.8 * budget < count(trained) <= budget, name
        assert made.keys() == looked.layers.keys()
        model = task.fresh()
        candidates.put_on(model, made)
        np.testing.assert_allclose(losses(model, task.test), before, rtol=1e-5, err_msg=name)
        assert short_runs.train(model, trained, task, rate=1e-2, seed=0), name
        assert mean(losses(model, task.test)) != pytest.approx(mean(before), abs=1e-6), name
    assert losses(task.model, task.test) == before, "the model itself is never changed"


def test_directions_energies_and_gradients_are_those_of_the_problems(task: Task, looked: Looked):
    path = "model.layers.3.mlp.down_proj"
    seen: list[torch.Tensor] = []
    handle = task.model.get_submodule(path).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for row in looked.rows:
            task.model(torch.tensor([row["input_ids"]]))
    handle.remove()
    x = torch.cat([part[0] for part in seen]).double()
    rows = looked.basis("activation", 4)[path].double()
    best = torch.linalg.svd(x, full_matrices=False)[2][:4]
    torch.testing.assert_close(rows.T @ rows, best.T @ best, atol=1e-4, rtol=0)
    energies = looked.energies({path: rows.float()})[path]
    torch.testing.assert_close(energies.double(), (x @ rows.T).square().mean(0), rtol=1e-4, atol=0)
    weighed = scaled({path: rows.float()}, {path: energies.sqrt()})[path]
    assert float(weighed.norm(dim=1).square().mean()) == pytest.approx(1, rel=1e-5)
    y = x @ task.model.get_submodule(path).weight.double().T
    outputs = torch.linalg.svd(y, full_matrices=False)[2][:4]
    u = looked.output_directions(4)[path].double()
    torch.testing.assert_close(u @ u.T, outputs.T @ outputs, atol=1e-4, rtol=0)
    assert looked.gradients[path].shape == (128, 384)
    assert not any(parameter.requires_grad for parameter in task.model.parameters())


def test_a_grid_goes_on_where_its_best_rate_is_at_the_edge():
    def loss(best: float) -> Any:
        return lambda rate: abs(math.log(rate / best))

    assert best_rate([1e-3, 3e-3, 1e-2], loss(3e-3)) == (
        3e-3,
        pytest.approx(best_rate([1e-3, 3e-3, 1e-2], loss(3e-3))[1]),
    )
    rate, tried = best_rate([1e-3, 3e-3, 1e-2], loss(3e-2))
    assert rate == pytest.approx(3e-2)
    assert max(tried) == pytest.approx(9e-2)
    rate, tried = best_rate([1e-3, 3e-3], loss(1e-9))
    assert len(tried) == 2 + short_runs.MOST_STEPS_OUT
    assert rate == min(tried)


def test_differences_are_paired_over_seeds_and_problems():
    hard = np.random.default_rng(0).uniform(1, 100, 60)
    one = {seed: [(nats * 0.99, 10) for nats in hard] for seed in (0, 1, 2)}
    other = {seed: [(float(nats), 10) for nats in hard] for seed in (1, 2, 3)}
    off, low, high, seeds = paired_difference(one, other)
    assert seeds == 2
    assert off == pytest.approx(-0.01 * hard.sum() / 600)
    assert low < off < high < 0, "problems that differ a hundredfold hide nothing where they are the same"
    assert paired_difference(one, one)[:3] == (0, 0, 0)


def test_what_is_noted_is_not_done_again_and_half_a_line_is_nothing(tmp_path: Path):
    records = Records(tmp_path / "runs" / "r.jsonl")
    assert records.done("a") is None
    assert records.get("a", lambda: [1]) == [1]
    with open(tmp_path / "runs" / "r.jsonl", "a", encoding="utf-8") as file:
        file.write('{"key": "b", "val')
    again = Records(tmp_path / "runs" / "r.jsonl")
    assert again.get("a", lambda: pytest.fail("done before")) == [1]
    assert again.done("b") is None
    again.get("c", lambda: 3)
    assert Records(tmp_path / "runs" / "r.jsonl").done("c") == 3


@pytest.mark.parametrize("module", [candidates, forgetting])
def test_a_screen_from_beginning_to_end(
    module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    small = {**module.SETTINGS["embedded"], "fields": SMALL, "steps": 1, "batch": 2, "seeds": [0, 1]}
    monkeypatch.setitem(module.SETTINGS, "embedded", small)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(short_runs, "MOST_STEPS_OUT", 0)
    monkeypatch.setattr(short_runs, "DRAWS", 20)
    if module is forgetting:
        monkeypatch.setattr(forgetting, "SEEDS", (0, 1))
        monkeypatch.setattr(forgetting, "TEXTS", 5)
        small["methods"] = {label: (fields, rates[:2]) for label, (fields, rates) in small["methods"].items()}
    else:
        small["rates"] = {"": [1e-2], "LoRA": [1e-2]}
        chosen = dict(list(candidates.candidates(6).items())[:3])
        monkeypatch.setattr(candidates, "candidates", lambda layers: chosen)
    arguments = ["--setting", "embedded", "--work", str(tmp_path / "work")]
    assert module.main(arguments) == 0
    shown = capsys.readouterr().out
    name = module.__name__.rpartition(".")[2]
    text = (tmp_path / f"{name}_embedded.md").read_text(encoding="utf-8")
    assert "LoRA r=1" in text
    assert text.strip() in shown
    result = json.loads((tmp_path / f"{name}_embedded.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(module, "train", lambda *args, **more: pytest.fail("all of it is done"))
    assert module.main(arguments) == 0
    assert json.loads((tmp_path / f"{name}_embedded.json").read_text(encoding="utf-8")) == result


def test_what_a_basis_holds_of_the_gradient_is_told(task: Task, looked: Looked):
    first, second = (torch.linalg.qr(torch.randn(6, 6)).Q for _ in range(2))
    matrix = nn.Parameter(torch.zeros(5, 2))
    made = {"a": LowRank(nn.Linear(6, 5), 3 * first[:2], matrix), "b": LowRank(nn.Linear(6, 5), 3 * second[:2], matrix)}
    left = torch.randn(5, 2)
    gradients = {"a": left @ first[:2], "b": left @ second[:2] + 2 * torch.randn(5, 1) @ second[3:4]}
    found = diagnostics.captured(gradients, made, [matrix])
    inside = 2 * left.square().sum()
    assert found["cap"] == pytest.approx(
        float(inside / (inside + (gradients["b"] @ second[3]).square().sum())), rel=1e-4
    )
    assert found["coherence"] == pytest.approx(2, rel=1e-4), "both bring the same to what they share"
    a, b = nn.Parameter(first[:1]), nn.Parameter(torch.zeros(5, 1))
    assert "coherence" not in diagnostics.captured({"a": gradients["a"]}, {"a": LowRank(nn.Linear(6, 5), a, b)}, [a, b])
    written = {"a": LowRank(nn.Linear(6, 5), (n := nn.Parameter(torch.zeros(2, 6))), torch.eye(5)[:, :2])}
    share = left[:2].square().sum() / left.square().sum()
    assert diagnostics.captured(gradients, written, [n])["cap"] == pytest.approx(float(share), rel=1e-4)


def test_diagnostics_are_of_the_rows_that_were_screened(task: Task, looked: Looked, tmp_path: Path):
    records = Records(tmp_path / "r.jsonl")
    for label, loss in (("activation", 1.0), ("principal", 2.0), ("random", 3.0), ("LoRA r=1", 0.5)):
        record = {"r": 1 if "LoRA" in label else 3, "rate": 1e-2, "test": {"0": [(loss, 1)]}}
        records.get(f"tiny/{label}", lambda record=record: record)
        found = records.get(
            f"tiny/{label}/diagnostics", lambda la=label, re=record: diagnostics.watched(la, looked, re)
        )
        assert set(found) == {"first", "last"}, "two steps have no eleventh"
        assert 0 < found["first"]["cap"] < 1
        found["early"] = found["first"]
    numbers, text = diagnostics.report("tiny", records, 6)
    assert numbers["rows"]["activation"]["first"]["cap"] > numbers["rows"]["random"]["first"]["cap"]
    assert "over 3 rows" in text
    assert not any(parameter.requires_grad for parameter in task.model.parameters())
