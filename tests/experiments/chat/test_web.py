"""`pica chat --web`: what the server answers and refuses, and the page in a real browser."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
import torch
import uvicorn
from peft import get_peft_model

import pica
from pica import cli
from pica.experiments.chat.loading import Talker
from pica.experiments.chat.rendering import Renderer
from pica.experiments.chat.talking import Sampling, Speaker
from pica.experiments.chat.templates import set_template
from pica.experiments.chat.web import _answer, make_app
from pica.experiments.models import load_model, load_tokenizer
from pica.experiments.recipes.recipe import ModelSection
from tests.report.browser import browser, needs_browser

QUESTION = {"role": "user", "content": "Tom has 3 apples and eats 1. How many has he?"}


@pytest.fixture(scope="module")
def talker() -> Talker:
    """The embedded model with an adapter that makes it say other things."""
    section = ModelSection(path="embedded")
    model = get_peft_model(load_model(section), pica.PicaConfig(r=8, target_modules=["up_proj"]), "style")
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.requires_grad:
                values.copy_(torch.randn(values.shape, generator=torch.Generator().manual_seed(len(name))))
    tokenizer = load_tokenizer(section)
    set_template(tokenizer, "alpaca")
    return Talker(Speaker(model, tokenizer, Renderer(tokenizer)), ["style"], "embedded", None, "No chat template: <b>.")


@pytest.fixture(scope="module")
def port(talker: Talker) -> Iterator[int]:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    app = make_app(talker, Sampling(max_new_tokens=12), "Be </script> brief.")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield taken.getsockname()[1]
    server.should_exit = True
    thread.join()


def ask(port: int, body: object, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    sent = body if isinstance(body, str) else json.dumps(body)
    connection.request("POST", "/answer", sent, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def said(text: str) -> str:
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[-1] == {"done": True}
    return "".join(line["piece"] for line in lines[:-1]).strip()


def test_answers_are_those_of_the_terminal(port: int, talker: Talker):
    found = {}
    for speaker in ("base", "style"):
        status, text = ask(port, {"messages": [QUESTION], "speaker": speaker, "temperature": 0.5, "seed": 3})
        assert status == 200
        with talker.use(speaker):
            pieces = talker.speaker.stream([QUESTION], Sampling(0.5, 1.0, 3, 12))
            assert said(text) == "".join(pieces).strip() != ""
        found[speaker] = said(text)
    assert found["base"] != found["style"]


@pytest.mark.parametrize(
    ("body", "headers", "told"),
    [
        ({"messages": [QUESTION], "speaker": "other"}, {}, "There is no adapter 'other' here; there are style, base."),
        ({"messages": [QUESTION], "speaker": "base", "top_p": 0}, {}, "top_p = 0.0: must be above 0"),
        ({"messages": [QUESTION], "speaker": "base", "seed": None}, {}, "not of the form"),
        ({"messages": [{"role": "user", "content": 1}], "speaker": "base"}, {}, "not of the form"),
        ({"messages": [{"role": "root", "content": "x"}], "speaker": "base"}, {}, "not of the form"),
        ({"messages": [], "speaker": "base"}, {}, "not of the form"),
        ("[" * 5000, {}, "not of the form"),
        ({"messages": [{**QUESTION, "content": (5 << 20) * "x"}], "speaker": "base"}, {}, "longer than 4 MiB"),
        # what a page of another site can have a browser send without asking
        ({"messages": [QUESTION], "speaker": "base"}, {"Content-Type": "text/plain"}, "sent as application/json"),
        ({"messages": [QUESTION], "speaker": "base"}, {"Host": "elsewhere.example:80"}, "Invalid host header"),
    ],
)
def test_what_is_no_question_is_refused(port: int, body: object, headers: dict[str, str], told: str):
    status, text = ask(port, body, **headers)
    assert status == 400
    assert told in text


def test_an_answer_that_nobody_reads_is_not_written_on(talker: Talker):
    async def leave() -> int:
        turn, before = anyio.Lock(), threading.active_count()
        answer = _answer(talker, turn, [QUESTION], "base", Sampling(1.5, max_new_tokens=400, seed=1))
        await answer.__anext__()
        assert turn.locked()
        await answer.aclose()  # pyright: ignore[reportAttributeAccessIssue] -- a generator
        assert not turn.locked()
        return threading.active_count() - before

    assert anyio.run(leave) <= 1, "the thread that wrote has ended; anyio keeps one of its own"


@needs_browser
def test_the_page_shows_both_columns_as_they_are_written(port: int, tmp_path: Path):
    with browser(tmp_path) as tab:
        tab.open(f"http://127.0.0.1:{port}/")
        tab.wait("document.querySelectorAll('.column').length === 2 && document.body.dataset.busy === 'false'")
        assert tab.run("[...document.querySelectorAll('.system')].map((line) => line.textContent)") == 2 * [
            "Be </script> brief."
        ]
        assert tab.run("byId('note').checkVisibility() && byId('note').textContent") == "No chat template: <b>."
        tab.run(
            "window.seen = {}; new MutationObserver(() => { for (const line of document.querySelectorAll('.writing'))"
            " (seen[line.parentNode === columns[0].said ? 0 : 1] ??= new Set()).add(line.textContent); })"
            ".observe(document.body, {subtree: true, childList: true, attributes: true})"
        )
        tab.run(f"ask.elements.question.value = {QUESTION['content']!r}; ask.requestSubmit()")
        tab.wait("document.body.dataset.busy === 'false'")
        assert tab.run("[0, 1].every((column) => seen[column].size > 2)"), "piece by piece, in both"
        answers = tab.run("[...document.querySelectorAll('.assistant')].map((line) => line.textContent)")
        asked = [{"role": "system", "content": "Be </script> brief."}, QUESTION]
        assert answers == [said(ask(port, {"messages": asked, "speaker": one})[1]) for one in ("base", "style")]
        tab.run("byId('settings').click(); panel.elements.top_p.value = 0.5; panel.elements.system.value = ''")
        tab.run("panel.elements.system.dispatchEvent(new Event('change'))")
        assert tab.run("document.querySelectorAll('.said p').length") == 0, "another system prompt begins anew"
        picture = tmp_path / "page.png"
        tab.screenshot(picture)
        assert picture.stat().st_size > 10_000


def test_the_address_is_taken_before_anything_is_loaded(port: int, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["chat", "nowhere", "--web", "--port", str(port)]) == 2
    assert f"127.0.0.1:{port} cannot be had" in capsys.readouterr().err
    assert cli.main(["chat", "nowhere", "--web", "--port", "70000"]) == 2
    assert "must be between 0 and 65535" in capsys.readouterr().err
    assert cli.main(["chat", "nowhere", "--port", "1"]) == 2
    assert "--host and --port are for --web" in capsys.readouterr().err
