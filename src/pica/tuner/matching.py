"""Regular expressions that may come from a file that anybody wrote, matched within a time limit.

Python's `re` backtracks for as long as it takes, which can be for ever, and nothing can stop it. `regex`, which
transformers needs as well, means the same by an expression and has a limit.
"""

from __future__ import annotations

import copy
from typing import Any

import regex

from pica.errors import ConfigError

SECONDS = 2.0
"""For one name; those of a model are a few dozen characters long, and a match takes microseconds."""


def matches(pattern: str, name: str, *, what: str) -> regex.Match[str] | None:
    """The match of `pattern` with the whole of `name`, or None; `what` is the setting that the pattern is from.

    Raises:
        ConfigError: it takes longer than `SECONDS`, or is no regular expression.
    """
    try:
        return regex.fullmatch(pattern, name, timeout=SECONDS)
    except TimeoutError as error:
        raise ConfigError(
            f"{what}={pattern!r} takes longer than {SECONDS:.0f} seconds to compare with {name!r}; write it without "
            "repetitions within repetitions."
        ) from error
    except (regex.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{what}={pattern!r} is not a regular expression ({error}).") from error


def at_end(pattern: str, name: str, *, what: str) -> bool:
    """Whether `pattern` matches the end of `name` from a dot on, as PEFT matches `rank_pattern`."""
    return matches(rf"(.*\.)?({pattern})", name, what=what) is not None


def resolved(config: Any, key: str) -> Any:
    """A copy of a configuration that chooses the module `key` just if `config` does, without an expression in it."""
    plain = copy.copy(config)
    if isinstance(config.target_modules, str):
        plain.target_modules = {key} if matches(config.target_modules, key, what="target_modules") else set()
    if isinstance(config.exclude_modules, str):
        plain.exclude_modules = {key} if matches(config.exclude_modules, key, what="exclude_modules") else None
    if names := getattr(config, "modules_to_save", None):
        hit = any(matches(rf"(.*\.)?{name}(\..*)?", key, what="modules_to_save") for name in names)
        plain.modules_to_save = [regex.escape(key)] if hit else None
    if patterns := getattr(config, "layers_pattern", None):
        wanted = config.layers_to_transform
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = matches(rf"(?:|.*?\.){pattern}\.(?P<idx>\d+)\..*", key, what="layers_pattern")
            if found is not None:
                chosen = int(found["idx"]) in ([wanted] if isinstance(wanted, int) else wanted or [])
                break
        else:
            chosen = False
        plain.layers_pattern = plain.layers_to_transform = None
        if not chosen:
            plain.target_modules = set()
    return plain
