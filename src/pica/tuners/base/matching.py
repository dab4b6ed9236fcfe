"""Regular expressions that may come from a file that anybody wrote, matched within a time limit.

Python's `re` backtracks for as long as it takes, which can be for ever, and nothing can stop it. `regex`, which
transformers needs as well, means the same by an expression and has a limit. PEFT matches with `re`, so it is never shown
an expression: it gets what one chose (`resolved`), and no `rank_pattern`.
"""

from __future__ import annotations

import copy
import functools
import math
import re
import threading
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import regex

from pica.errors import ConfigError

SECONDS = 2.0
"""Of computing, for one name; those of a model are a few dozen characters long, and a match takes microseconds."""
SECONDS_IN_ALL = 10.0
"""The same for all expressions and names of one adapter."""
LARGEST = 300_000
"""Characters of an expression, with those that must repeat counted as often: `regex` takes memory for each."""


class _Form(NamedTuple):
    """How PEFT matches a setting's expressions: what it puts around one, and whether that has to match the whole name."""

    before: str = ""
    after: str = ""
    whole: bool = True


_ENDS = _Form(r"(.*\.)?(", ")")
_FORMS = {
    "target_modules": _Form(),
    "exclude_modules": _Form(),
    "modules_to_save": _Form(r"(^|.*\.)", r"($|\..*)", whole=False),
    "layers_pattern": _Form(r"(?:^|.*?\.)", r"\.(?P<idx>\d+)\.", whole=False),
    "rank_pattern": _ENDS,
    "share": _ENDS,
    "input_side": _ENDS,
}
_COUNT = re.compile(r"(\)?)\{(\d+)")
_VERBOSE = re.compile(r"\(\?[A-Za-z-]*x")  # blanks within a count would hide it
_spent = threading.local()


def matches(pattern: str, name: str, *, what: str) -> regex.Match[str] | None:
    """Match a module's name as PEFT does, within a time limit.

    Args:
        pattern: A regular expression of a configuration.
        name: The module's path.
        what: The setting that it is of, for messages.
    Returns:
        The match, or None.
    Raises:
        ConfigError: It takes longer than `SECONDS`, all of an adapter take longer than `SECONDS_IN_ALL`, or it is no
            regular expression.
    """  # noqa: DOC501 - TimeoutError is caught here
    expression = _compiled(pattern, what)
    match = expression.fullmatch if _FORMS[what].whole else expression.match
    before = getattr(_spent, "seconds", 0.0)
    started = time.thread_time()
    try:
        if before >= SECONDS_IN_ALL:
            raise TimeoutError
        return match(name, timeout=min(SECONDS, SECONDS_IN_ALL - before))
    except TimeoutError as error:
        raise ConfigError(
            f"{what}={pattern!r} takes too long to compare with the names of modules ({name!r} was one too many); write it "
            "without repetitions within repetitions."
        ) from error
    finally:
        _spent.seconds = before + time.thread_time() - started


def start_counting() -> None:
    """Begin with another adapter, which has `SECONDS_IN_ALL` for itself."""
    _spent.seconds = 0.0


def problem_of_pattern(pattern: str, what: str) -> str | None:
    """What is wrong with an expression of the setting `what`, or None."""
    try:
        _compiled(pattern, what)
    except ConfigError as error:
        return str(error).removesuffix(".")
    return None


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str, what: str) -> regex.Pattern[str]:
    if (problem := _size_problem(pattern)) is not None:
        raise ConfigError(f"{what}={pattern[:60]!r} {problem}.")
    form = _FORMS[what]
    around = f"{form.before}{pattern}{form.after}"
    try:
        for part in [around] if what == "modules_to_save" else [pattern, around]:  # a name, to which PEFT adds
            re.compile(part)  # what `re` refuses means nothing to PEFT
        return regex.compile(around)
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error)
        raise ConfigError(f"{what}={pattern!r} is not a regular expression ({reason}).") from error


def _size_problem(pattern: str) -> str | None:
    """What makes an expression too large to prepare, or None; a group that repeats multiplies what is in it."""
    if "{" in pattern and _VERBOSE.search(pattern):
        return "has a count of repetitions in a verbose expression, (?x); write it without that flag"
    counts = [(bool(group), int(number[:12])) for group, number in _COUNT.findall(pattern)]
    single = sum(number for group, number in counts if not group)
    if (len(pattern) + single) * math.prod(max(1, number) for group, number in counts if group) > LARGEST:
        return f"repeats too much, or is too long (more than {LARGEST:,} characters with every repetition counted)"
    return None


def resolved(config: Any, key: str) -> Any:
    """A copy of a configuration that chooses the module `key` just if `config` does, without an expression in it."""
    plain = with_plain_targets(config, [key])
    if isinstance(config.exclude_modules, str):
        plain.exclude_modules = {key} if matches(config.exclude_modules, key, what="exclude_modules") else None
    if names := getattr(config, "modules_to_save", None):
        hit = any(matches(name, key, what="modules_to_save") for name in names)
        plain.modules_to_save = [re.escape(key)] if hit else None
    patterns, wanted = getattr(config, "layers_pattern", None), config.layers_to_transform
    if patterns:
        plain.layers_pattern = plain.layers_to_transform = None
        counted = wanted not in (None, []) and key not in (config.target_modules or ())
        if counted and not _is_wanted(patterns, wanted, key):
            plain.target_modules = set()
    return plain


def with_plain_targets(config: Any, keys: Iterable[str]) -> Any:
    """A copy of a configuration that targets those of the modules `keys` that `config` does, by their names."""
    plain = copy.copy(config)
    if isinstance(config.target_modules, str):
        plain.target_modules = {key for key in keys if matches(config.target_modules, key, what="target_modules")}
    return plain


def _is_wanted(patterns: Any, wanted: Any, key: str) -> bool:
    """Whether `key` is in one of the blocks that are `wanted`; of several patterns the first that matches counts."""
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if (found := matches(pattern, key, what="layers_pattern")) is not None:
            return int(found["idx"]) in ([wanted] if isinstance(wanted, int) else wanted)
    return False
