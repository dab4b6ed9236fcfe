"""A conversation in the browser: one page, and answers that are sent piece by piece.

Who may ask: programs of this machine, unless another address is named. Pages of other sites may not, although they run in a
browser here: a request has to name this very server (against names that are made to point here), and to be JSON, which a
browser sends to another site only where that allows it.
"""

import json
import secrets
import socket
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from importlib import resources
from typing import Any

import anyio
import uvicorn
from anyio import to_thread
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pica.errors import ConfigError, PicaError
from pica.experiments.chat.loading import BASE, Talker
from pica.experiments.chat.talking import Sampling, check_sampling
from pica.files.documents import parse_json
from pica.tasks.messages import ROLES

LOCAL = "127.0.0.1"
EVERYWHERE = "0.0.0.0"
"""All of this machine's addresses."""
_LARGEST = 4 << 20  # bytes of a question with all that was said before
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}


def serve(talker: Talker, sampling: Sampling, system: str | None, *, listening: socket.socket, host: str) -> None:
    """Answer until the process is told to stop; see `make_app`."""
    app = make_app(talker, sampling, system, host=host)
    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1, server_header=False)
    uvicorn.Server(config).run(sockets=[listening])


def make_app(talker: Talker, sampling: Sampling, system: str | None, *, host: str = LOCAL) -> Starlette:
    """The server's application: its page at /, and answers to JSON that is posted to /answer.

    Args:
        talker: Who answers.
        sampling: How, where a question does not say.
        system: The system prompt that the page begins with.
        host: The address that it is reached at.

    Returns:
        The application.
    """
    turn = anyio.Lock()  # there is one model: a question waits for those before

    async def page(_: Request) -> Response:
        return _page(talker, sampling, system)

    async def answer(request: Request) -> Response:
        try:
            messages, speaker, chosen = await _question(request, talker, sampling)
        except PicaError as error:
            return JSONResponse({"error": str(error)}, status_code=400, headers=_HEADERS)
        lines = _answer(talker, turn, messages, speaker, chosen)
        return StreamingResponse(lines, media_type="application/x-ndjson", headers=_HEADERS)

    hosts = ["*"] if host == EVERYWHERE else [LOCAL, "localhost", host]
    return Starlette(
        routes=[Route("/", page), Route("/answer", answer, methods=["POST"])],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
    )


def _page(talker: Talker, sampling: Sampling, system: str | None) -> Response:
    """The page with what it has to know; nothing of it comes from elsewhere."""
    assets = resources.files("pica") / "assets"
    page, style, script = (
        (assets / "web" / f"chat.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    style = (assets / "report" / "page.css").read_text(encoding="utf-8") + style
    about = {"model": talker.model, "speakers": [BASE, *talker.adapters], "system": system or ""}
    about |= {"note": talker.note or ""} | asdict(sampling)
    told = json.dumps(about).replace("<", "\\u003c")  # so that no name ends the script
    nonce = secrets.token_urlsafe(16)
    for mark, text in (("{{nonce}}", nonce), ("{{style}}", style), ("{{script}}", script), ("{{about}}", told)):
        page = page.replace(mark, text)
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; img-src data:"
    )
    policy += "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return HTMLResponse(page, headers={**_HEADERS, "Content-Security-Policy": policy})


async def _question(request: Request, talker: Talker, sampling: Sampling) -> tuple[list[dict[str, str]], str, Sampling]:
    """Read what is asked.

    Returns:
        The messages, whom they go to, and how the answer is drawn.
    Raises:
        ConfigError: It is not of the form that the page sends, or a setting is out of range.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ConfigError("A question is sent as application/json.")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _LARGEST:
            raise ConfigError(f"The conversation is longer than {_LARGEST >> 20} MiB; begin a new one.")
    try:
        given = parse_json(body.decode("utf-8"))
        messages = [{"role": each["role"], "content": each["content"]} for each in given["messages"]]
        speaker = given["speaker"]
        chosen = replace(
            sampling, **{name: type(value)(given.get(name, value)) for name, value in asdict(sampling).items()}
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise ConfigError("The question is not of the form that the page sends.") from None
    known = all(each["role"] in ROLES and isinstance(each["content"], str) for each in messages)
    if not messages or not known or not isinstance(speaker, str):
        raise ConfigError("The question is not of the form that the page sends.")
    talker.check(speaker)
    check_sampling(chosen)
    return messages, speaker, chosen


async def _answer(
    talker: Talker, turn: anyio.Lock, messages: list[dict[str, str]], speaker: str, sampling: Sampling
) -> AsyncIterator[str]:
    """The answer as lines of JSON: pieces of text, then that it is done; or what went wrong."""
    # Writing stops where nobody reads any more: the page was closed, or the answer stopped.
    async with turn:
        with talker.use(speaker):
            pieces = talker.speaker.stream(messages, sampling)
            try:
                while (piece := await to_thread.run_sync(next, pieces, None)) is not None:
                    yield _line(piece=piece)
                yield _line(done=True)
            except PicaError as error:
                yield _line(error=str(error))
            finally:
                with anyio.CancelScope(shield=True):
                    await to_thread.run_sync(pieces.close)  # pyright: ignore[reportAttributeAccessIssue] -- a generator


def _line(**values: Any) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"
