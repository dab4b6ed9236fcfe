"""Help on the fields of a recipe: the ones that matter first, one section, or all."""

import argparse
import dataclasses
from collections.abc import Iterable
from difflib import get_close_matches

from pica.errors import ConfigError
from pica.experiments.recipes.parsing import field_help, recipe_fields, section_names, type_in_words

FIRST = (
    "model.path",
    "model.dtype",
    "model.quantization",
    "data.train",
    "data.test",
    "data.columns",
    "task.name",
    "adapter.method",
    "adapter.r",
    "adapter.target_modules",
    "adapter.share",
    "trainer.epochs",
    "trainer.max_steps",
    "trainer.batch_size",
    "trainer.learning_rate",
    "trainer.learning_rates",
    "trainer.max_length",
    "trainer.packing",
    "trainer.eval_steps",
    "trainer.seed",
)
"""Fields that `pica train --help` shows."""

_PLACEHOLDERS = {bool: "true|false", int: "N", float: "X", str: "TEXT"}


def check_topics(topics: Iterable[str]) -> None:
    """Raise `ConfigError` on a topic of help that is no section of a recipe."""
    known = section_names()
    for topic in topics:
        if topic not in known:
            near = get_close_matches(topic, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"Help has no topic {topic!r}.{hint} Sections of a recipe: {', '.join(known)}.")


def add_fields(parser: argparse.ArgumentParser, *, sections: Iterable[str] = (), everything: bool = False) -> None:
    """Add options for fields of a recipe, a group a section, for their help.

    Args:
        parser: Gets them.
        sections: All fields of these; the fields in `FIRST` if there are none.
        everything: Add all fields there are.
    """
    chosen, texts = tuple(sections), field_help()
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, found in recipe_fields().items():
        section = name.rpartition(".")[0]
        if name == "output":  # an option of the commands themselves
            continue
        if not everything and (section not in chosen if chosen else name not in FIRST):
            continue
        if section not in groups:
            groups[section] = parser.add_argument_group(texts.get(section, "").rstrip(".") or "A training run")
        placeholder = _placeholder(found)
        choices = placeholder.split("|") if "|" in placeholder else None  # for completion
        text, kind = texts[name], "" if choices else type_in_words(found.type).removesuffix(" or null")
        if not (chosen or everything):  # the first sentence will do
            text, kind = text.partition(". ")[0].partition("; ")[0].rstrip(".") + ".", ""
        groups[section].add_argument(
            f"--{name}", metavar=placeholder, choices=choices, help=_told(found, text, kind).replace("%", "%%")
        )


def _told(found: dataclasses.Field, text: str, kind: str) -> str:
    """A field's help with its type in words, if that is to be said, and its default."""
    notes = [kind] if kind else []
    default = found.default if found.default is not dataclasses.MISSING else None
    if default is not None:
        notes.append(f"default: {str(default).lower() if isinstance(default, bool) else default}")
    return f"{text} ({'; '.join(notes)})" if notes else text


def _placeholder(found: dataclasses.Field) -> str:
    """What stands for a field's value in its help."""
    for kind, shown in _PLACEHOLDERS.items():
        if found.type in (kind, kind | None):
            return shown
    words = type_in_words(found.type).removesuffix(" or null")
    if words.startswith("one of "):
        return "|".join(words.removeprefix("one of ").split(", "))
    return {"a list": "[...]", "a mapp": "{...}"}.get(words[:6], "VALUE")
