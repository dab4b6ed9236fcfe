"""`pica chat`: a conversation in the terminal with a model, with and without its adapters."""

from __future__ import annotations

import argparse
import json
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pica.cli.options import add_trust, command_parser, whole
from pica.cli.show import show
from pica.errors import ConfigError, OutputError, PicaError
from pica.experiments.interrupts import heed

if TYPE_CHECKING:
    from pica.cli.console import ConsoleReporter
    from pica.experiments.chat.loading import Talker
    from pica.experiments.chat.talking import Sampling

EPILOG = """examples:
  pica chat pica-run                          what a run learnt
  pica chat out/adapter other/adapter         two adapters of one model; /use NAME changes over
  pica chat ./SmolLM2-135M-Instruct           a model as it is
  pica chat pica-run --web                    in a browser: the model alone and what the run learnt, side by side
  echo "Who are you?" | pica chat pica-run    one answer on standard output
"""

_LOCAL = "127.0.0.1"

HELP = """/both            from now on, the model alone and the adapter side by side
/base            from now on, the model alone
/use NAME        from now on, that adapter
/system [TEXT]   begin again with this system prompt, or without one
/reset           begin again
/save FILE       write the conversation as a line of JSON that pica train reads
/set NAME VALUE  temperature, top_p, seed or max_new_tokens
/help            this
/quit            end, as Ctrl-D does; Ctrl-C stops an answer"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = command_parser(
        "chat",
        "Talk to a model, an adapter, or what a run learnt. Type /help for what can be changed meanwhile.",
        EPILOG,
    )
    made.add_argument(
        "places", nargs="+", metavar="ADAPTER|RUN|MODEL", help="what to talk to; several adapters of one model"
    )
    add_speaking(made, max_new_tokens=512, temperature=0.7)
    made.add_argument(
        "--top-p", type=float, default=0.9, metavar="P", help="share of the probability to choose from (0.9)"
    )
    made.add_argument("--seed", type=whole, default=0, metavar="N", help="decides the choices (default: 0)")
    made.add_argument("--system", metavar="TEXT", help="system prompt; that of the training if unset")
    made.add_argument(
        "--web", action="store_true", help="talk in a browser: the model alone and an adapter side by side"
    )
    made.add_argument(
        "--host", metavar="NAME", help="with --web: address to be reached at (127.0.0.1: this machine alone)"
    )
    made.add_argument("--port", type=whole, metavar="N", help="with --web: port (7860); 0 takes a free one")
    return made


def add_speaking(made: argparse.ArgumentParser, *, max_new_tokens: int, temperature: float) -> None:
    """What chat and generate both take."""
    made.add_argument("--base", metavar="MODEL", help="base model of the adapter, if not the one it records")
    made.add_argument(
        "--chat-template", metavar="NAME|FILE", help="alpaca, chatml or plain, or a file; the trained one if unset"
    )
    made.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), help="precision of the model")
    made.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    add_trust(made)
    made.add_argument(
        "--temperature", type=float, default=temperature, metavar="T", help=f"0: the likeliest words ({temperature})"
    )
    made.add_argument(
        "--max-new-tokens", type=whole, default=max_new_tokens, metavar="N", help=f"longest answer ({max_new_tokens})"
    )


def load_named(given: argparse.Namespace) -> Talker:
    """Load what the arguments of `add_speaking` and `places` name.

    Args:
        given: The parsed arguments.
    Returns:
        The model and its adapters, ready to answer.
    Raises:
        PicaError: As `pica.experiments.chat.loading.load_talker`.
    """
    from pica.experiments.chat.loading import load_talker

    return load_talker(
        given.places,
        base=given.base,
        template=given.chat_template,
        dtype=given.dtype,
        revision=given.revision,
        trust_remote_code=given.trust_remote_code,
    )


def run(arguments: Sequence[str]) -> int:
    """Parse, load and talk until the input ends."""
    given = parser().parse_args(arguments)
    if not given.web and (given.host is not None or given.port is not None):
        raise ConfigError("--host and --port are for --web; give that too, or leave them out.")
    listening = _listen(given) if given.web else None  # before the model is loaded

    from pica.cli.console import loading

    with loading() as shown:
        from pica.experiments.chat.loading import BASE
        from pica.experiments.chat.talking import Sampling, check_sampling

        sampling = Sampling(given.temperature, given.top_p, given.seed, given.max_new_tokens)
        check_sampling(sampling)
    talker = load_named(given)
    if talker.note is not None:
        shown.say(talker.note)
    speaking = talker.adapters[0] if talker.adapters else BASE
    system = given.system if given.system is not None else talker.system
    if listening is not None:
        _serve(talker, sampling, system, listening, given.host or _LOCAL, shown)
        return 0
    conversation = Conversation(talker, sampling, speaking, system)
    typed = sys.stdin is not None and sys.stdin.isatty()
    if typed:
        shown.say(
            f"{talker.model}{', with ' + ', '.join(talker.adapters) if talker.adapters else ''}. /help lists the commands."
        )
    while True:
        try:
            line = input(f"{conversation.title}> ") if typed else _read_line()
        except EOFError:
            if typed:
                show()
            return 0
        if not line.strip():
            continue
        if line.strip() in ("/quit", "/exit"):
            return 0
        try:
            conversation.take(line.strip())
        except PicaError as error:
            if not typed:
                raise
            shown.say(str(error))


def _listen(given: argparse.Namespace) -> socket.socket:
    """Take the address that --web is to be reached at.

    Args:
        given: The parsed arguments.
    Returns:
        A socket that is bound and not yet listening.
    Raises:
        ConfigError: What --web needs is not installed, or the address cannot be had.
    """
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise ConfigError(f"--web needs {' and '.join(missing)}: pip install 'pica-peft[web]'.")
    host, port = given.host or _LOCAL, 7860 if given.port is None else given.port
    if not 0 <= port < 65536:
        raise ConfigError(f"--port {port}: must be between 0 and 65535.")
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except OSError as error:
        taken.close()
        raise ConfigError(
            f"{host}:{port} cannot be had ({error.strerror or error}); name another --port (0: any that is free) or --host."
        ) from None
    return taken


def _serve(
    talker: Talker, sampling: Sampling, system: str | None, listening: socket.socket, host: str, shown: ConsoleReporter
) -> None:
    """Answer a browser until Ctrl-C."""
    from pica.experiments.chat.web import serve

    shown.say(f"Talk at http://{host}:{listening.getsockname()[1]}/ - Ctrl-C ends it.")
    if host not in (_LOCAL, "localhost"):
        shown.say("warning: whoever can reach this address can talk to the model; there is no password.")
    with suppress(KeyboardInterrupt):
        serve(talker, sampling, system, listening=listening, host=host)


def _read_line() -> str:
    line = sys.stdin.readline() if sys.stdin is not None else ""
    if not line:
        raise EOFError
    return line


@dataclass
class Conversation:
    """What was said so far, and who answers."""

    talker: Talker
    sampling: Sampling
    speaking: str
    system: str | None
    both: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.speaking}+base" if self.both else self.speaking

    def take(self, line: str) -> None:
        """A command or something to answer."""
        if not line.startswith("/"):
            self._answer(line)
            return
        word, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        actions = {
            "help": lambda: show(HELP),
            "both": self._side_by_side,
            "base": lambda: self._use("base"),
            "use": lambda: self._use(rest),
            "system": lambda: self._begin(rest or None),
            "reset": lambda: self._begin(self.system),
            "save": lambda: self._save(rest),
            "set": lambda: self._set(rest),
        }
        if word not in actions:
            raise ConfigError(f"There is no /{word}; /help lists what there is.")
        actions[word]()

    def _begin(self, system: str | None) -> None:
        self.system, self.messages = system, []

    def _use(self, name: str) -> None:
        with self.talker.use(name):  # refuses a name that is not there
            self.speaking, self.both = name, False

    def _side_by_side(self) -> None:
        if not self.talker.adapters:
            raise ConfigError("There is no adapter here to hold beside the model.")
        if self.speaking == "base":
            self.speaking = self.talker.adapters[0]
        self.both = True

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        kinds = {"temperature": float, "top_p": float, "seed": int, "max_new_tokens": int}
        try:
            changed = replace(self.sampling, **{name: kinds[name](value)})
        except (KeyError, ValueError):
            raise ConfigError(f"/set takes a number for {', '.join(kinds)}, for instance /set temperature 0.") from None
        from pica.experiments.chat.talking import check_sampling

        check_sampling(changed)
        self.sampling = changed

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigError("/save needs the name of a file.")
        if not self.messages:
            raise ConfigError("Nothing has been said yet.")
        path = Path(name).expanduser()
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self._said()}, ensure_ascii=False) + "\n")
        except FileExistsError:
            raise OutputError(f"{name!r} exists; name another file.") from None
        except OSError as error:
            raise OutputError(f"{name!r} cannot be written ({error.strerror}).") from None

    def _said(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}, *self.messages] if self.system else list(self.messages)

    def _answer(self, question: str) -> None:
        asked = [*self._said(), {"role": "user", "content": question}]
        said = self._compare(asked) if self.both else self._stream(asked)
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": said}]

    def _stream(self, asked: list[dict[str, Any]]) -> str:
        pieces: list[str] = []
        with self.talker.use(self.speaking):
            answer = self.talker.speaker.stream(asked, self.sampling)
            try:
                for piece in answer:
                    pieces.append(piece)
                    show(piece, end="", flush=True)
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                heed()
            finally:
                answer.close()  # pyright: ignore[reportAttributeAccessIssue] -- a generator
                show()
        return "".join(pieces).strip()

    def _compare(self, asked: list[dict[str, Any]]) -> str:
        from rich.table import Table
        from rich.text import Text

        from pica.cli.console import table_console

        said = {}
        for name in ("base", self.speaking):
            with self.talker.use(name):
                said[name] = "".join(self.talker.speaker.stream(asked, self.sampling)).strip()
        table = Table(show_lines=False, expand=True)
        for name in said:
            table.add_column("the model alone" if name == "base" else name, ratio=1, overflow="fold")
        table.add_row(*(Text(text) for text in said.values()))
        table_console().print(table)
        return said[self.speaking]
