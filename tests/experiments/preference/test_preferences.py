"""Learning from preferences: what is trained on and measured against the plain formula, and a run as a user starts it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pica import cli
from pica.errors import ConfigError, DataError
from pica.experiments.chat.rendering import Renderer
from pica.experiments.chat.templates import template_text
from pica.experiments.interrupts import Interrupted
from pica.experiments.measuring import PeakMemory
from pica.experiments.models import load_tokenizer
from pica.experiments.pipelines import make_pipeline
from pica.experiments.preference.encoding import PairCollator, as_pair_dataset, pair_rows
from pica.experiments.preference.measuring import Judge, Judged
from pica.experiments.recipes.parsing import load_recipe
from pica.experiments.recipes.recipe import ModelSection, PreferenceSection, Recipe, TrainerSection
from pica.experiments.reporting import Silent
from pica.experiments.train.policies import preference_trainer
from pica.experiments.train.run import resume, start
from pica.experiments.train.trainers import Steps
from pica.tasks.base import Source
from pica.tasks.preference import Pair, PreferenceTask
from tests.experiments.train.test_run import Recorder
from tests.report.browser import check_page

Make = Callable[..., Recipe]
PAIRS = [
    Pair(
        ({"role": "user", "content": q},),
        ({"role": "assistant", "content": a},),
        ({"role": "assistant", "content": b},),
    )
    for q, a, b in (("2+2?", "4", "five"), ("Sky?", "It is blue.", "Green"), ("Hello", "Hi!", "No."))
]


@pytest.fixture
def preference(recipe: Make) -> Make:
    """A quick recipe on embedded pairs."""

    def make(**overrides: object) -> Recipe:
        quick = {
            "task__name": "preference",
            "task__chat_template": "plain",
            "task__answers": 0,
            "task__max_new_tokens": None,
            "data__train_limit": 24,
            "evaluate_base": True,
        }
        return recipe(**{**quick, **overrides})

    return make


@pytest.fixture(scope="module")
def renderer(model_folder: Path) -> Renderer:
    tokenizer = load_tokenizer(ModelSection(path=str(model_folder)))
    tokenizer.chat_template = template_text("plain")
    return Renderer(tokenizer)


def log_prob(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Of an answer and the end of the text, token by token, in float64."""
    before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    ids = torch.tensor([[*before, *after, tokenizer.eos_token_id]])
    with torch.no_grad():
        scores = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    gold = ids[0, 1:]
    return scores[torch.arange(len(gold)), gold][len(before) - 1 :].sum().item()


def adapted(preference: Make) -> tuple[Recipe, Any]:
    """A model whose adapter has been given some values."""
    recipe = preference()
    model: Any = make_pipeline(recipe).adapt(recipe.adapter, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    return recipe, model


def test_rewards_margins_and_losses_are_those_of_the_formula(preference: Make, renderer: Renderer):
    _, model = adapted(preference)
    found = Judge(beta=0.3, batch_size=2)(model, pair_rows(renderer, PAIRS), 0)
    for pair, one in zip(PAIRS, found):
        prompt = f"User: {pair.prompt[0]['content']}\nAssistant: "  # pyright: ignore[reportArgumentType, reportIndexIssue]
        texts = [each[0]["content"] for each in (pair.chosen, pair.rejected)]  # pyright: ignore[reportArgumentType, reportIndexIssue]
        own = [log_prob(model, renderer.tokenizer, prompt, text) for text in texts]
        with model.disable_adapter():
            reference = [log_prob(model, renderer.tokenizer, prompt, text) for text in texts]
        margin = 0.3 * (own[0] - reference[0]) - 0.3 * (own[1] - reference[1])
        assert one.margin == pytest.approx(margin, abs=1e-4)
        assert one.loss == pytest.approx(-torch.tensor(margin).sigmoid().log().item(), abs=1e-4)
        assert one.right == float(margin > 0)
        assert abs(margin) > 0.01
    with model.disable_adapter():
        plain = Judge(beta=0.3, batch_size=2)(model, pair_rows(renderer, PAIRS), 0)
    assert {(one.right, one.margin) for one in plain} == {(0.5, 0.0)}, "its own reference"
    far = Judged(-1e4, 0.0, 0.0, 0.0, 1.0)
    assert (far.loss, far.right) == (1e4, 0.0)


def test_the_reference_is_asked_once_for_each_set_of_rows(preference: Make, renderer: Renderer):
    _, model = adapted(preference)
    rows, some, calls = pair_rows(renderer, PAIRS), pair_rows(renderer, PAIRS[:2]), list[bool]()
    model.register_forward_pre_hook(lambda *_: calls.append(True))
    judge, told = Judge(beta=0.3, batch_size=2), list[int]()
    for step, (chosen, passes) in enumerate([(rows, 6), (rows, 3), (some, 4), (rows, 3), (some, 2)]):
        calls.clear()
        told.clear()
        expected = judge.sequences(model, chosen)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1 + step)
        found = judge(model, chosen, 0, told.append)
        assert (len(calls), sum(told)) == (passes, expected)
        assert found == Judge(beta=0.3, batch_size=2)(model, chosen, 0)
    switched = Judge(beta=0.3, batch_size=2)
    with model.disable_adapter():
        plain = switched(model, rows, 0)
        assert all(layer.disable_adapters for layer in model.modules() if hasattr(layer, "disable_adapters"))
    calls.clear()
    assert switched.sequences(model, rows) == 6
    assert [one.reference_chosen for one in switched(model, rows, 0)] == [one.chosen for one in plain]
    assert len(calls) == 3, "the model alone is its own reference"


def test_trl_trains_on_that_loss_with_the_adapter_switched_off_as_the_reference(
    preference: Make, renderer: Renderer, tmp_path: Path
):
    recipe, model = adapted(preference)
    rows = pair_rows(renderer, PAIRS)
    expected = Judge(beta=0.3, batch_size=8)(model, rows, 0)
    dataset = as_pair_dataset(rows)
    trainer = preference_trainer(
        model,
        renderer.tokenizer,
        dataset,
        Steps(recipe.trainer, 0.01, tmp_path),
        PreferenceSection(beta=0.3),
    )
    assert list(model.peft_config) == ["default"], "no second adapter"
    assert trainer.ref_model is None, "no second model"
    batch = PairCollator(0)([dataset[at] for at in range(len(PAIRS))])
    loss = trainer.compute_loss(model, batch)
    assert loss.item() == pytest.approx(sum(one.loss for one in expected) / len(expected), abs=1e-4)
    model.add_adapter("other", model.peft_config["default"])  # what was kept from TRL works again
    assert model.get_parameter(next(name for name, _ in model.named_parameters())) is not None


@pytest.mark.parametrize("method", ["pica", "lora", "adalora", "full"])
def test_methods_learn_from_preferences(preference: Make, method: str):
    changes = {
        "trainer__learning_rate": 0.02,
        "trainer__max_steps": 4,
        "adapter__method": method,
        "evaluate_base": False,
    }
    metrics = measured(start(preference(**changes), reporter=Silent()))["adapter"]
    assert metrics["reward_margin"] != 0
    assert metrics["metric"] == "reward_accuracy"


def test_a_method_that_changes_the_base_has_no_reference(preference: Make):
    with pytest.raises(ConfigError, match="pissa: it changes the frozen weights"):
        start(preference(adapter__method="pissa"), reporter=Silent())


def test_resuming_ends_in_the_same_adapter_and_the_same_numbers(preference: Make, tmp_path: Path):
    changes = {
        "trainer__max_steps": 6,
        "data__train_limit": 16,
        "trainer__log_steps": 1,
    }  # half of them in a second epoch
    whole = start(preference(output=str(tmp_path / "whole"), **changes), reporter=Silent())
    with pytest.raises(Interrupted):
        start(preference(**changes), reporter=Recorder(interrupt_in="rate"))
    resumed = resume(tmp_path / "out", reporter=Silent())
    same_results(whole, resumed)


def same_results(whole: Any, resumed: Any) -> None:
    for name in (
        "adapter/adapter_model.safetensors",
        "predictions-adapter.jsonl",
        "predictions-base.jsonl",
        "loss_curve.csv",
    ):
        assert (whole.output / name).read_bytes() == (resumed.output / name).read_bytes(), name
    assert measured(whole)["adapter"]["loss"] == measured(resumed)["adapter"]["loss"]


def measured(result: Any) -> dict[str, Any]:
    """What metrics.json holds."""
    return json.loads((result.output / "metrics.json").read_text())


def test_too_long_pairs_are_cut_left_out_or_refused(
    renderer: Renderer, preference: Make, caplog: pytest.LogCaptureFixture
):
    chosen, rejected = (({"role": "assistant", "content": f"{'long ' * 9}{end}"},) for end in "ab")
    alike = Pair(PAIRS[0].prompt, chosen, rejected)
    pairs = [*PAIRS, alike]
    rows = pair_rows(renderer, pairs, max_length=40)
    assert (rows.owners, rows.empty, rows.cut) == ([0, 1, 2], [3], 0)
    rows = pair_rows(renderer, pairs, max_length=28)
    assert rows.cut == 1
    assert all(len(ids) <= 28 for ids, _ in [*rows.chosen, *rows.rejected])
    assert pair_rows(renderer, pairs, max_length=28, overflow="drop").dropped == 2
    with pytest.raises(
        DataError, match=r"None of the 4 pairs has answers that differ within trainer.max_length = 10 tokens"
    ):
        pair_rows(renderer, pairs, max_length=10)
    recipe = preference(trainer__max_length=110, data__train_limit=None)
    pipeline, train = make_pipeline(recipe), PreferenceTask().load("train", Source("embedded", 100))
    kept = pipeline.encode(train)
    assert 0 < len(kept) < 100
    assert f"{100 - len(kept)} pairs left out, whose prompt takes up trainer.max_length = 110" in caplog.text


def test_the_reference_takes_no_second_copy_of_the_model(renderer: Renderer, tmp_path: Path):
    """A step on a base of 160 MiB, as it is done here and with a copy beside it, as TRL has it for whole models."""

    def peak(copy: bool) -> float:
        config = LlamaConfig(
            vocab_size=258, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=4
        )
        model: Any = LlamaForCausalLM(config)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        trainer = preference_trainer(
            model,
            renderer.tokenizer,
            as_pair_dataset(pair_rows(renderer, PAIRS)),
            Steps(TrainerSection(max_steps=1, batch_size=2), 0.01, tmp_path),
            PreferenceSection(),
        )
        memory = PeakMemory()
        before = memory.read()["host"]
        if copy:
            trainer.ref_model = LlamaForCausalLM(config)
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(trainer.ref_model)
        trainer.train()
        return memory.read()["host"] - before

    size = 4 * (4 + 3 * 2) * 1024**2 * 4 / 2**20
    assert peak(copy=False) < size / 2 < 0.9 * size < peak(copy=True)


def test_a_run_from_the_command_line_is_reported_evaluated_and_talked_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    data, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    rows = [{"prompt": f"Say {n}.", "chosen": f"The answer is {n}.", "rejected": f"No {n % 3}"} for n in range(24)]
    data.write_text("\n".join(map(json.dumps, [*rows, {**rows[0], "rejected": rows[0]["chosen"]}])), encoding="utf-8")
    steps = [
        "--trainer.max_steps",
        "10",
        "--trainer.learning_rate",
        "0.02",
        "--trainer.threads",
        "1",
        "--adapter.r",
        "8",
    ]
    model = [
        "--model.path",
        "embedded",
        "--task.chat_template",
        "alpaca",
        "--task.max_new_tokens",
        "4",
        "--task.answers",
        "1",
    ]
    watched = [
        "--trainer.eval_steps",
        "5",
        "--trainer.sample_steps",
        "5",
        "--data.test_limit",
        "6",
        "--data.validation_limit",
        "4",
    ]
    assert cli.main(["train", "--data.train", str(data), *model, *steps, *watched, "-o", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "held-out question" in printed
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["task"] == "preference"  # found by what the data looks like
    assert metrics["problems"] == {"train": 14, "validation": 4, "test": 6}
    base, adapter = metrics["base"], metrics["adapter"]
    assert (base["score"], base["reward_margin"]) == (0.5, 0.0)
    assert base["loss"] == pytest.approx(torch.tensor(2.0).log().item())
    assert adapter["score"] == 1.0
    assert adapter["loss"] < 0.3
    assert adapter["reward_margin"] > 4 * adapter["reward_margin_stderr"] > 0
    header = (run / "loss_curve.csv").read_text().splitlines()[0]
    assert "reward_accuracy,reward_margin" in header
    assert len((run / "samples.jsonl").read_text().splitlines()) == 2
    assert "1 left out" in printed or (run / "left-out.jsonl").is_file()
    assert "| reward margin |" in (run / "adapter" / "README.md").read_text()

    assert cli.main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "held-out pairs" in page
    assert "reward_accuracy-plot" in page
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["score"] == 1.0  # on what the run held out
    assert cli.main(["data", str(data), "--model", "embedded", "--chat-template", "alpaca", "--examples", "1"]) == 0
    assert "«The answer is 0.</s>»" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", iter(["Say 3.\n"]))
    assert cli.main(["generate", str(run), "-p", "Say 3.", "--max-new-tokens", "4"]) == 0


def test_the_recipe_runs_in_miniature(tmp_path: Path):
    small = {
        "data.train_limit": 12,
        "data.test_limit": 4,
        "task.answers": 0,
        "trainer.max_steps": 2,  # the rate of the first one is 0
        "output": str(tmp_path / "out"),
    }
    metrics = measured(start(load_recipe("preference-tiny", list(small.items())), reporter=Silent()))
    assert metrics["base"]["chosen_likelier"] > 0.5  # what the template makes of a pair is what the model knows
    assert metrics["adapter"]["loss"] != metrics["base"]["loss"]


def test_preferences_are_compared(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = {
        "model": {"path": str(model_folder)},
        "data": {"train": "embedded", "train_limit": 16, "test_limit": 6, "validation_limit": 4},
        "task": {"name": "preference", "chat_template": "plain", "answers": 0},
        "trainer": {"max_steps": 2, "batch_size": 4, "threads": 1},
    }
    methods = [
        {"label": "PiCa", "adapter": {"method": "pica", "r": 2}, "learning_rates": [0.01, 0.02]},
        {"label": "LoRA", "adapter": {"method": "lora", "r": 1}, "learning_rates": [0.01]},
        {"label": "PiSSA", "adapter": {"method": "pissa", "r": 1}, "learning_rates": [0.01]},
    ]
    file, folder = tmp_path / "both.yaml", tmp_path / "compared"
    file.write_text(json.dumps({"name": "both", "seeds": [0, 1], "base": base, "methods": methods}))
    assert cli.main(["compare", str(file), "-o", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "reward accuracy" in printed
    assert "reward_accuracy" not in printed
    assert "PiSSA: 2 failed: adapter.method = pissa: it changes the frozen weights" in printed
    found = json.loads((folder / "results.json").read_text())
    assert [row["seeds_done"] for row in found["rows"]] == [2, 2, 0]
    assert found["base"]["reward_accuracy"] == 0.5
    page = (folder / "report.html").read_text()
    check_page(page)
    assert "reward_accuracy" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_what_does_not_go_with_preferences_is_said(preference: Make):
    for changes, said in (
        ({"trainer__overflow": "split"}, "trainer.overflow = split: a pair cannot be split"),
        ({"trainer__packing": True}, "trainer.packing is for task chat"),
        ({"preference__beta": 0.0}, "preference.beta = 0.0: must be above 0"),
        (
            {"adapter__method": "lora", "adapter__lora_dropout": 0.1},
            "adapter.lora_dropout: task preference trains without",
        ),
        ({"task__template": "alpaca"}, "task.template is for other tasks; preference has task.chat_template"),
        ({"reward__num_generations": 4}, "The section reward is for task reward, and the task is preference"),
    ):
        with pytest.raises(ConfigError, match=said):
            preference(**changes)
