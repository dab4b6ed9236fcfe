"""What a model reads when a basis is made: texts, a file, a data set, batches, or a text inside this package."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pica.errors import ConfigError, DataError
from pica.tasks.rows import read_rows

EMBEDDED = "embedded"
"""Name of the text inside this package. It never changes, so that a basis can be made from it again."""
TOKENS = 16_384
"""How many tokens are read, where there are as many."""
LENGTH = 512
"""Longest sequence; the rest of a longer one is left out."""
_TEXTS = (".txt", ".md")

Batch = Mapping[str, Tensor]
Source = str | Path | Sequence[str] | Iterable[Batch] | Any


@dataclass(frozen=True)
class Calibration:
    """What is read.

    Attributes:
        batches: Each the arguments of one forward pass. Texts are one sequence each, so that nothing is padded; where a
            batch has an `attention_mask`, what that leaves out is not counted.
        about: `source`, `digest` of what is read, `tokens`, `sequences`, `seed`.
    """

    batches: Sequence[Batch]
    about: dict[str, Any]


def calibration(
    source: Source = None,
    tokenizer: Any = None,
    *,
    tokens: int = TOKENS,
    seed: int = 0,
    length: int = LENGTH,
    labels: bool = False,
) -> Calibration:
    """Choose what is read.

    Args:
        source: None or "embedded": the text inside this package. A path: .txt and .md hold texts with an empty line between
            them, other files (and folders, and hub: names) rows, of which the field "text" counts, else all text that a row
            has. A sequence of texts. A `datasets.Dataset` with `input_ids`, or with texts. Else batches as a model takes
            them, mappings of tensors, which are read as they are and to the end.
        tokenizer: Of the model; batches and `input_ids` need none.
        tokens: Read about so many: the sequences, in an order that the seed decides, until there are enough.
        seed: Decides the order.
        length: Longest sequence, in tokens.
        labels: Whether the labels of a data set's `input_ids` are kept: for directions of a loss, whose digest they enter.

    Returns:
        What is read, in its order.

    Raises:
        ConfigError: A number is out of range, or texts come without a tokenizer.
        DataError: There is nothing to read.
    """
    for name, value in (("tokens", tokens), ("length", length)):
        if value < 1:
            raise ConfigError(f"Calibration: {name}={value} must be at least 1.")
    name, given, gold = _given(source)
    if given and isinstance(given[0], Mapping) and any(isinstance(v, Tensor) for v in given[0].values()):
        return _of_batches(given, name, seed)
    if given and not isinstance(given[0], str):
        rows = given
    else:
        if tokenizer is None:
            raise ConfigError("Calibration: texts need the model's tokenizer; pass it as tokenizer.")
        texts = [text for text in given if text.strip()]
        rows = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    pairs = [(row, gold[i] if labels and gold else None) for i, row in enumerate(rows) if len(row)]
    if not pairs:
        raise DataError(f"Calibration: {name} holds no text to read.")
    random.Random(seed).shuffle(pairs)
    chosen: list[list[int]] = []
    batches: list[Batch] = []
    digest = hashlib.sha256()
    left = tokens
    for row, label in pairs:
        chosen.append([int(token) for token in row[: min(length, left)]])
        left -= len(chosen[-1])
        batch = {"input_ids": torch.tensor([chosen[-1]])}
        digest.update(len(chosen[-1]).to_bytes(8, "little") + np.asarray(chosen[-1], dtype="<i8").tobytes())
        if label is not None:
            batch["labels"] = torch.tensor([label[: len(chosen[-1])] if isinstance(label, Sequence) else label])
            digest.update(batch["labels"].numpy().tobytes())
        batches.append(batch)
        if left <= 0:
            break
    about = {
        "source": name,
        "digest": digest.hexdigest()[:32],
        "tokens": sum(map(len, chosen)),
        "sequences": len(chosen),
        "seed": seed,
    }
    return Calibration(batches, about)


def embedded_text() -> str:
    """The text inside this package."""
    return (resources.files("pica") / "assets" / "calibration.txt").read_text(encoding="utf-8")


def _given(source: Source) -> tuple[str, list[Any], list[Any]]:
    """A source's name for messages; its texts, rows of token numbers, or batches; and the labels of such rows, if any."""
    if source is None or source == EMBEDDED:
        return EMBEDDED, _paragraphs(embedded_text()), []
    if isinstance(source, (str, Path)):
        return Path(source).name, _of_place(str(source)), []
    data: Any = source
    if isinstance(columns := getattr(data, "column_names", None), list):
        name = str(getattr(data, "builder_name", None) or "a data set")
        if "input_ids" in columns:
            return name, list(data["input_ids"]), list(data["labels"]) if "labels" in columns else []
        return name, [_text_of(row) for row in data], []
    return "what was passed", list(source), []


def _of_place(place: str) -> list[str]:
    path = Path(place).expanduser()
    if path.suffix in _TEXTS and path.is_file():
        try:
            return _paragraphs(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            raise DataError(f"{place!r} is not UTF-8 text.") from None
    return [_text_of(row.fields) for row in read_rows(place, "train")]


def _text_of(fields: Mapping[str, Any]) -> str:
    """The field "text" of a row, else all that it holds of text."""
    own = fields.get("text")
    return own if isinstance(own, str) else "\n".join(_strings(fields))


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        if any(letter.isalpha() for letter in value):  # no labels, no numbers
            yield value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if name != "role":  # of a conversation's messages
                yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in text.replace("\r\n", "\n").split("\n\n") if part.strip()]


def _of_batches(batches: list[Batch], name: str, seed: int) -> Calibration:
    digest, positions, samples = hashlib.sha256(), 0, 0
    for batch in batches:
        for key in sorted(batch):
            value = batch[key]
            if isinstance(value, Tensor):
                digest.update(
                    key.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                )
        mask, ids = batch.get("attention_mask"), batch.get("input_ids")
        positions += int(mask.sum()) if mask is not None else 0 if ids is None else ids.numel()
        samples += len(next(iter(batch.values())))
    about = {"source": name, "digest": digest.hexdigest()[:32], "sequences": samples, "seed": seed}
    return Calibration(batches, about | ({"tokens": positions} if positions else {}))
