"""A file of prompts, answered batch by batch into a file that is gone on with after an interruption."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pica.errors import DataError, OutputError
from pica.experiments.chat.loading import BASE, Talker
from pica.experiments.reporting import Reporter
from pica.files.output import json_text, translated_write_errors, write_jsonl
from pica.tasks.chat import Conversation, Message, form_of, with_system
from pica.tasks.records import read_records


@dataclass(frozen=True)
class Prompt:
    """What is to be answered, and by which adapter (None: the first one)."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] = ()
    adapter: str | None = None


def read_prompts(location: str, adapter_column: str | None = None) -> list[Prompt]:
    """Read prompts: conversations without what the assistant says last, or the lines of a .txt file.

    Returns:
        The prompts, in the file's order.
    Raises:
        DataError: The file is missing, empty or malformed; with the line.
    """
    path = Path(location).expanduser()
    if path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read ({error}).") from None
        prompts = [Prompt(({"role": "user", "content": line},)) for line in lines if line.strip()]
        if not prompts:
            raise DataError(f"{path}: the file holds no prompts.")
        return prompts
    records = read_records(location)
    if all("prompt" in record.fields and isinstance(record.fields["prompt"], str) for record in records):
        conversations = [Conversation(({"role": "user", "content": record.text("prompt")},)) for record in records]
    else:
        form = form_of(records)
        conversations = [form.read(record) for record in records]
    prompts = []
    for record, conversation in zip(records, conversations):
        messages = conversation.messages or ({"role": "user", "content": conversation.text},)
        messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        adapter = record.text(adapter_column) if adapter_column else None
        prompts.append(Prompt(messages, conversation.tools, adapter))
    return prompts


def answer_file(
    talker: Talker,
    prompts: Sequence[Prompt],
    output: Path,
    *,
    system: str | None,
    base_too: bool,
    max_new_tokens: int,
    batch_size: int,
    reporter: Reporter,
) -> int:
    """Answer all prompts and write a line of JSON for each, in their order.

    What is done is kept beside the output until all of it is there, so that the same call goes on after an interruption.

    Returns:
        How many there are.
    Raises:
        ConfigError: A prompt names an adapter that is not there.
        OutputError: The output exists, or cannot be written.
    """
    if output.exists():
        raise OutputError(f"{str(output)!r} exists; name another file with --output.")
    names = [prompt.adapter or (talker.adapters[0] if talker.adapters else BASE) for prompt in prompts]
    for name in dict.fromkeys(names):
        talker.check(name)  # before anything is answered
    asked = [(with_system(Conversation(p.messages), system).messages, p.tools) for p in prompts]
    settings = [talker.model, system, max_new_tokens, base_too, [names, [list(map(dict, m)) for m, _ in asked]]]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    partial = output.with_name(f"{output.name}.partial-{digest[:12]}")
    with translated_write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        done = _read_done(partial)
        if partial.is_file():  # without a line that was cut off in the writing
            write_jsonl(partial, ({"row": index, **row} for index, row in done.items()))
        with reporter.bar("Answering", len(prompts)) as advance, partial.open("a", encoding="utf-8") as file:
            advance(len(done), "")
            for indices in _batches(names, done, batch_size):
                rows = _answer(talker, indices, names, asked, base_too, max_new_tokens, batch_size)
                file.writelines(json_text({"row": index, **row}) + "\n" for index, row in rows.items())
                file.flush()
                done |= rows
                advance(len(indices), "")
        write_jsonl(output, [done[index] for index in range(len(prompts))])
        partial.unlink()
    return len(prompts)


def _read_done(partial: Path) -> dict[int, dict[str, Any]]:
    """Rows that were answered before, by index; a line that was cut off in the writing is none."""
    done: dict[int, dict[str, Any]] = {}
    if partial.is_file():
        for line in partial.read_text(encoding="utf-8").split("\n")[:-1]:
            row = json.loads(line)
            done[row.pop("row")] = row
    return done


def _batches(names: Sequence[str], done: dict[int, Any], size: int) -> list[list[int]]:
    """Indices that are left, of one adapter each time."""
    batches = []
    for name in dict.fromkeys(names):
        left = [index for index, other in enumerate(names) if other == name and index not in done]
        batches += [left[at : at + size] for at in range(0, len(left), size)]
    return batches


def _answer(
    talker: Talker,
    indices: Sequence[int],
    names: Sequence[str],
    asked: Sequence[tuple[tuple[Message, ...], tuple[Any, ...]]],
    base_too: bool,
    max_new_tokens: int,
    batch_size: int,
) -> dict[int, dict[str, Any]]:
    name = names[indices[0]]
    said: dict[str, list[str]] = {}
    for key, speaker in (("answer", name), *((("base_answer", BASE),) if base_too and name != BASE else ())):
        with talker.use(speaker):
            chosen = [asked[index] for index in indices]
            said[key] = talker.speaker.answer_all(chosen, max_new_tokens=max_new_tokens, batch_size=batch_size)
    return {
        index: {
            "messages": [dict(message) for message in asked[index][0]],
            **({"adapter": name} if talker.adapters else {}),
            **{key: answers[at] for key, answers in said.items()},
        }
        for at, index in enumerate(indices)
    }
