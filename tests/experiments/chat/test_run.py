"""A whole run on conversations, then talking to what it learnt: the commands as a user gives them."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from pica import cli
from pica.cli.chat import Conversation
from pica.errors import PicaError
from pica.experiments.chat.loading import Talker, load_talker
from pica.experiments.chat.talking import Sampling
from pica.experiments.encoding import encode, prompt_ids
from pica.tasks import chat
from pica.tasks.base import make_example
from tests import results

QUESTIONS = ("Tom has 3 apples.", "How many in all?", "Ann buys 5 pens.", "What is left?")


def write(path: Path, count: int = 30) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"{QUESTIONS[n % 4]} {n}"},
                {"role": "assistant", "content": "The answer is 7."},
            ]
        }
        for n in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps on thirty conversations, packed."""
    folder = tmp_path_factory.mktemp("chat")
    data = write(folder / "chats.jsonl")
    arguments = ["train", "--model.path", "embedded", "--data.train", str(data), "--task.chat_template", "alpaca"]
    arguments += ["--trainer.max_steps", "8", "--trainer.learning_rate", "0.02", "--trainer.packing", "true"]
    arguments += [
        "--trainer.max_length",
        "128",
        "--trainer.threads",
        "1",
        "--adapter.r",
        "8",
        "--task.max_new_tokens",
        "12",
    ]
    assert cli.main([*arguments, "-o", str(folder / "run")]) == 0
    return folder / "run"


def test_a_part_is_held_out_and_measured_before_and_after(run: Path):
    metrics = json.loads((run / "metrics.json").read_text())
    results.check_file("metrics", run / "metrics.json")
    assert metrics["task"] == "chat"  # found by what the data looks like
    assert metrics["problems"] == {"train": 27, "validation": 0, "test": 3}
    before, after = metrics["base"], metrics["adapter"]
    assert after["metric"] == "token_accuracy"
    assert after["loss"] < before["loss"] - 1
    assert after["score"] > before["score"]
    assert after["perplexity"] == pytest.approx(torch.tensor(after["loss"]).exp().item(), rel=1e-5)
    rows = [json.loads(line) for line in (run / "predictions-adapter.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all("answer" in row and row["messages"][-1]["role"] == "assistant" for row in rows)


def test_the_adapter_has_a_card_with_what_was_measured(run: Path):
    text = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    assert {"pica", "peft", "chat"} <= set(ModelCard(text).data.to_dict()["tags"])
    metrics = json.loads((run / "metrics.json").read_text())
    for model in ("base", "adapter"):
        assert f"{metrics[model]['loss']:.4f} ± {metrics[model]['loss_stderr']:.4f}" in text
    assert f"| parameters | {metrics['adapter']['parameters']['trainable']:,} |" in text
    assert "`chats.jsonl`: 27 conversations, `messages`" in text
    assert "chat_template.jinja" in text
    assert str(run.parent) not in text


def test_the_template_lies_beside_the_adapter_and_evaluation_uses_it(run: Path, capsys: pytest.CaptureFixture[str]):
    assert "### Response:" in (run / "adapter" / "chat_template.jinja").read_text()
    capsys.readouterr()
    assert cli.main(["evaluate", str(run), "--json", "--data", str(run.parent / "chats.jsonl"), "--limit", "5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["metric"] == "token_accuracy"
    assert found["examples"] == 5


def test_a_run_is_evaluated_on_what_it_held_out_and_on_nothing_that_it_learnt(
    run: Path, capsys: pytest.CaptureFixture[str]
):
    measured = json.loads((run / "metrics.json").read_text())["adapter"]
    for limit in ([], ["--limit", "2"]):
        capsys.readouterr()
        assert cli.main(["evaluate", str(run), "--json", *limit]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["examples"] == (2 if limit else 3)
        assert found["data"] == f"held out of {run.parent / 'chats.jsonl'}"
        assert limit or found["loss"] == pytest.approx(measured["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("template", "shown"), [(None, "Question: ...\\nAnswer:"), ("plain", "...\\n"), ("alpaca", "Below")]
)
def test_a_run_on_problems_is_asked_as_it_was_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str | None, shown: str
):
    sums = str(tmp_path / "sums")
    few = ["--data.train_limit", "8", "--data.test_limit", "1", "--trainer.max_steps", "2", "--trainer.threads", "1"]
    few += ["--evaluate_base", "false", "--baseline.method", "null", "--task.max_new_tokens", "2"]
    few += ["--task.template", template] if template else []
    assert cli.main(["train", "arithmetic-tiny", "-o", sums, *few]) == 0
    talker = load_talker([sums])
    question, earlier = "Tom has 3 apples. How many?", [{"role": "user", "content": "1?"}]
    earlier += [{"role": "assistant", "content": "The answer is 1."}]
    example = make_example(template or "question", question, "The answer is 3.", answer="3")
    asked = [*earlier, {"role": "user", "content": f" {question}\n"}]
    renderer = talker.speaker.renderer
    assert renderer.prompt(asked) == prompt_ids([example], talker.speaker.tokenizer)[0], "by itself"
    ids, labels = renderer.tokens(
        chat.Conversation((*asked, {"role": "assistant", "content": "The answer is 3."}))  # pyright: ignore[reportArgumentType]
    )
    expected = encode([example], talker.speaker.tokenizer)[0]
    assert (ids, labels) == (expected["input_ids"], expected["labels"])
    assert shown in (talker.note or "")
    capsys.readouterr()
    assert cli.main(["generate", sums, "-p", question, "--max-new-tokens", "4"]) == 0
    assert "No chat template: each question is asked by itself, as in training" in capsys.readouterr().err
    assert cli.main(["generate", sums, "-p", question, "--system", "Be kind."]) == 2
    assert "it was trained on questions alone, without a system prompt" in capsys.readouterr().err
    assert cli.main(["generate", sums, "-p", question, "--chat-template", "plain", "--max-new-tokens", "1"]) == 0
    assert "No chat template" not in capsys.readouterr().err


def test_the_same_run_gives_the_same_adapter(run: Path, tmp_path: Path):
    again = tmp_path / "again"
    assert cli.main(["train", str(run / "recipe.resolved.yaml"), "-o", str(again)]) == 0
    one, other = ((folder / "adapter" / "adapter_model.safetensors").read_bytes() for folder in (run, again))
    assert one == other


@pytest.fixture(scope="module")
def talker(run: Path) -> Talker:
    return load_talker([str(run)])


def test_streaming_says_what_generating_says_and_base_and_adapter_differ(talker: Talker):
    asked = [{"role": "user", "content": QUESTIONS[0]}]
    sampling = Sampling(max_new_tokens=12)
    with talker.use(talker.adapters[0]):
        streamed = "".join(talker.speaker.stream(asked, sampling)).strip()
        (whole,) = talker.speaker.answer_all([(asked, ())], max_new_tokens=12, batch_size=1)
        both = talker.speaker.answer_all([(asked, ()), ([*asked, *asked], ())], max_new_tokens=12, batch_size=2)
    assert streamed == whole == both[0] != ""
    with talker.use("base"):
        (base,) = talker.speaker.answer_all([(asked, ())], max_new_tokens=12, batch_size=1)
    assert base != whole
    warm = Sampling(temperature=1.5, top_p=0.9, seed=3, max_new_tokens=12)
    one, same, other = ("".join(talker.speaker.stream(asked, s)) for s in (warm, warm, Sampling(1.5, 0.9, 4, 12)))
    assert one == same != other


def test_chat_answers_what_comes_through_a_pipe(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    saved = tmp_path / "said.jsonl"
    lines = [
        QUESTIONS[0],
        "/both",
        QUESTIONS[1],
        f"/save {saved}",
        "/reset",
        "/base",
        QUESTIONS[0],
        "/help",
        "/quit",
        "never",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert cli.main(["chat", str(run), "--temperature", "0", "--max-new-tokens", "12"]) == 0
    printed = capsys.readouterr().out
    assert "the model alone" in printed
    assert "/system [TEXT]" in printed
    said = json.loads(saved.read_text())["messages"]
    assert [message["role"] for message in said] == ["user", "assistant", "user", "assistant"]
    assert (
        cli.main(["data", str(saved), "--model", "embedded", "--chat-template", "alpaca"]) == 0
    )  # and it can be learnt


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/nothing", "There is no /nothing; /help lists what there is."),
        ("/use other", "There is no adapter 'other' here; there are run, base."),
        ("/set temperature hot", "/set takes a number for temperature, top_p, seed, max_new_tokens"),
        ("/set top_p 2", "top_p = 2.0: must be above 0 and at most 1."),
        ("/save x", "Nothing has been said yet."),
    ],
)
def test_a_wrong_command_is_said_in_one_sentence(talker: Talker, line: str, said: str):
    with pytest.raises(PicaError) as caught:
        Conversation(talker, Sampling(), talker.adapters[0], None).take(line)
    assert said in str(caught.value)


def test_a_wrong_command_ends_a_pipe(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/use other\n"))
    assert cli.main(["chat", str(run)]) == 2
    assert "There is no adapter 'other' here; there are run, base." in capsys.readouterr().err


def test_a_file_of_prompts_is_answered_and_gone_on_with(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    prompts = write(tmp_path / "prompts.jsonl", count=5)
    arguments = ["generate", str(run), "--prompts", str(prompts), "--max-new-tokens", "8", "--batch-size", "2"]
    arguments += ["--base-answers"]
    whole, halved = tmp_path / "whole.jsonl", tmp_path / "halved.jsonl"
    assert cli.main([*arguments, "-o", str(whole)]) == 0
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [row["messages"][-1]["content"] for row in rows] == [f"{QUESTIONS[n % 4]} {n}" for n in range(5)]
    assert all(row["adapter"] == "run" and row["answer"] != row["base_answer"] for row in rows)

    from pica.experiments.chat import answering

    real, calls = answering._answer, []

    def interrupted(*given):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(given)
        return real(*given)

    monkeypatch.setattr(answering, "_answer", interrupted)
    assert cli.main([*arguments, "-o", str(halved)]) == 130
    assert not halved.exists()
    (partial,) = tmp_path.glob("halved.jsonl.partial-*")
    with partial.open("a") as file:
        file.write('{"row": 4, "answ')  # as a kill in the middle of writing leaves it
    monkeypatch.setattr(answering, "_answer", lambda *given: calls.append(given) or real(*given))
    assert cli.main([*arguments, "-o", str(halved)]) == 0
    assert len(calls) == 3  # three batches in all
    assert halved.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.partial-*"))

    halved.unlink()
    partial.write_text('{"row": 0, "answ')  # killed in the first line, and interrupted again
    calls.clear()
    monkeypatch.setattr(answering, "_answer", interrupted)
    assert cli.main([*arguments, "-o", str(halved)]) == 130
    monkeypatch.setattr(answering, "_answer", real)
    assert cli.main([*arguments, "-o", str(halved)]) == 0
    assert halved.read_bytes() == whole.read_bytes()
    capsys.readouterr()
    assert cli.main([*arguments, "-o", str(whole)]) == 2
    assert "exists; name another file" in capsys.readouterr().err


def test_data_shows_what_is_learnt(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page = tmp_path / "page.html"
    arguments = ["data", str(run / "recipe.resolved.yaml"), "--examples", "1", "--page", str(page)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "30 conversations, `messages`, one turn each" in printed
    assert "«The answer is 7.</s>»" in printed
    assert "<mark>The answer is 7.&lt;/s&gt;</mark>" in page.read_text()
    capsys.readouterr()
    assert cli.main(["data", str(run.parent / "chats.jsonl"), "--model", "embedded"]) == 2
    assert "no chat template" in capsys.readouterr().err
    assert cli.main(["data", str(run.parent / "chats.jsonl")]) == 2
    assert "Name the model with --model" in capsys.readouterr().err


def test_a_dry_run_shows_what_would_be_learnt_of_several_files_and_writes_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other.csv"
    other.write_text("question,answer\n" + "\n".join(f"What is {n}?,A number." for n in range(10)))
    arguments = ["train", "--model.path", "embedded", "--task.chat_template", "alpaca", "--dry-run"]
    sources = f"{{{run.parent / 'chats.jsonl'}: 0.5, other.csv: 2}}"
    assert cli.main([*arguments, "--data.train", sources]) == 0
    printed = capsys.readouterr().out
    assert re.search(
        r"other.csv: (8|9|10) conversations, `question/answer`, one turn each; (16|18|20) in one pass", printed
    )
    assert "«" in printed
    assert "held out  4 to be measured on" in printed
    assert [path.name for path in tmp_path.iterdir()] == [other.name]
    assert cli.main(["train", "--dry-run"]) == 2
    assert "--dry-run is for tasks chat, preference, reward, and the task is arithmetic" in capsys.readouterr().err
