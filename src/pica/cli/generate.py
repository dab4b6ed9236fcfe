"""`pica generate`: answers to one prompt or to a file of prompts."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pica.cli.chat import add_speaking, load_named
from pica.cli.options import command_parser, positive
from pica.cli.show import show
from pica.errors import ConfigError

EPILOG = """examples:
  pica generate pica-run -p "Who are you?"
  pica generate pica-run --prompts questions.jsonl -o answers.jsonl --base-answers

A file of prompts is read as pica train reads conversations: the last thing that the assistant says, if it says anything,
is left out and answered anew. A file of plain lines (.txt) has a prompt a line. An interrupted command goes on where it
stopped when it is given again.
"""


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = command_parser(
        "generate",
        "Answer prompts with a model, an adapter, or what a run learnt; the likeliest words.",
        EPILOG,
    )
    made.add_argument(
        "places", nargs="+", metavar="ADAPTER|RUN|MODEL", help="what to ask; several adapters of one model"
    )
    asked = made.add_mutually_exclusive_group(required=True)
    asked.add_argument("-p", "--prompt", metavar="TEXT", help="one prompt")
    asked.add_argument("--prompts", metavar="FILE", help="a file of prompts")
    made.add_argument("-o", "--output", type=Path, metavar="FILE", help="answers, as .jsonl; required with --prompts")
    made.add_argument("--base-answers", action="store_true", help="answer without the adapter too")
    made.add_argument("--adapter-column", metavar="NAME", help="field of the file that names the adapter for each row")
    made.add_argument("--system", metavar="TEXT", help="system prompt; that of the training if unset")
    made.add_argument("--batch-size", type=positive, default=8, metavar="N", help="prompts at once (default: 8)")
    add_speaking(made, max_new_tokens=256, temperature=0.0)
    return made


def run(arguments: Sequence[str]) -> int:
    """Parse, load, answer and write."""
    given = parser().parse_args(arguments)
    if given.temperature:
        raise ConfigError("pica generate takes the likeliest words; --temperature is pica chat's.")
    if given.prompts and given.output is None:
        raise ConfigError("Name the file for the answers with --output.")

    from pica.cli.console import loading

    with loading() as shown:
        from pica.experiments.chat.answering import answer_file, read_prompts
        from pica.experiments.chat.loading import BASE

        prompts = read_prompts(given.prompts, given.adapter_column) if given.prompts else []
    talker = load_named(given)
    if talker.note is not None:
        shown.say(talker.note)
    system = given.system if given.system is not None else talker.system
    if given.prompt is not None:
        messages = [{"role": "user", "content": given.prompt}]
        messages = [{"role": "system", "content": system}, *messages] if system else messages
        names = [*([BASE] if given.base_answers and talker.adapters else []), *(talker.adapters[:1] or [BASE])]
        for name in names:
            with talker.use(name):
                (answer,) = talker.speaker.answer_all(
                    [(messages, ())], max_new_tokens=given.max_new_tokens, batch_size=1
                )
            show(f"[{name}] {answer}" if len(names) > 1 else answer)
        return 0
    count = answer_file(
        talker,
        prompts,
        given.output,
        system=system,
        base_too=given.base_answers,
        max_new_tokens=given.max_new_tokens,
        batch_size=given.batch_size,
        reporter=shown,
    )
    show(f"{count} answers in {given.output}")
    return 0
