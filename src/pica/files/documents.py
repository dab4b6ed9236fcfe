"""JSON and YAML that anybody may have written: read whole, or refused at once with the line where it goes wrong.

What the libraries let through is refused too: a key that occurs twice in one object (the last would win silently), nesting
so deep that reading or printing it ends in a RecursionError, and YAML aliases that stand for more than a computer holds.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

MAX_DEPTH = 100
"""Lists and mappings inside one another."""
MAX_NODES = 100_000
"""Values of a YAML text, each alias counted as what it stands for."""
MAX_YAML = 500_000
"""Characters of a YAML text, which takes its parser seconds."""

_TOO_DEEP = f"lists and mappings are nested more than {MAX_DEPTH} deep"
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_COLON = re.compile(r"\s*:")
_LONG_NUMBER = re.compile(r"\d{4000,}")


class DocumentError(ValueError):
    """A file that cannot be used as the JSON or YAML it should be; the message names the file and the line."""


class _RefusedError(yaml.MarkedYAMLError):
    """Valid YAML that is not taken all the same."""


class _TwiceError(Exception):
    """A key occurs twice in one object; where, the decoder does not say."""


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Returns:
        The value in it.
    Raises:
        DocumentError: It is not UTF-8, not valid JSON, too deep, or has a key twice.
        OSError: It cannot be read.
    """
    try:
        return parse_json(path.read_bytes().decode("utf-8"))
    except json.JSONDecodeError as error:
        raise DocumentError(f"{path}, line {error.lineno}: not valid JSON, {error.msg}") from None
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path}, line {_line(error)}: not UTF-8 text") from None


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Returns:
        The value in it.
    Raises:
        DocumentError: It is not UTF-8, not valid YAML, too large or too deep, or has a key twice.
        OSError: It cannot be read.
    """
    try:
        return parse_yaml(path.read_bytes().decode("utf-8"))
    except yaml.YAMLError as error:
        where, problem = yaml_problem(error)
        raise DocumentError(f"{path}{where}: not valid YAML, {problem}") from None
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path}, line {_line(error)}: not UTF-8 text") from None


def parse_json(text: str, *, long_integers: bool = False) -> Any:
    """As `json.loads`, within bounds.

    Args:
        text: A JSON document.
        long_integers: Whether whole numbers of more digits than Python reads are given as text.
    Returns:
        The value in it.
    Raises:
        json.JSONDecodeError: It is not valid JSON, deeper than `MAX_DEPTH`, or has a key twice in one object.
    """
    if text.count("{") + text.count("[") > MAX_DEPTH:
        _check_json(text, 0, twice=False)
    decoder = _LONG_DECODER if long_integers else _DECODER
    return _decoding(text, 0, lambda: decoder.decode(text))


def parse_json_at(text: str, position: int, *, long_integers: bool = False) -> tuple[Any, int]:
    """As `json.JSONDecoder.raw_decode`, within bounds.

    Args:
        text: Has a JSON document in it.
        position: Where that begins.
        long_integers: As for `parse_json`.
    Returns:
        The value, and where it ends.
    Raises:
        json.JSONDecodeError: As `parse_json`.
    """
    decoder = _LONG_DECODER if long_integers else _DECODER
    return _decoding(text, position, lambda: decoder.raw_decode(text, position))


def parse_yaml(text: str) -> Any:
    """As `yaml.safe_load`, within bounds.

    Returns:
        The value in the document.
    Raises:
        yaml.YAMLError: It is not valid YAML.
        _RefusedError: It is larger than `MAX_YAML`, deeper than `MAX_DEPTH`, worth more than `MAX_NODES`, or has a key
            twice in one mapping; a `yaml.YAMLError` as well.
    """
    if len(text) > MAX_YAML:
        raise _RefusedError(problem=f"it has {len(text):,} characters, and at most {MAX_YAML:,} are read")
    _check_yaml(text)
    try:
        return yaml.safe_load(text)
    except (ValueError, OverflowError, TypeError) as error:  # such as a date that there is not
        raise _RefusedError(problem=f"a value in it cannot be read ({error})") from None


def text_problem(value: Any) -> str | None:
    """Look for a text, also inside of lists and mappings, that must not be given to a parser which may take it for YAML.

    Returns:
        Why not; None for what may be given, also where it is no YAML at all: such a text is then nothing but text.
    """
    if isinstance(value, (list, dict)):
        inner = value if isinstance(value, list) else value.values()
        return next((problem for item in inner if (problem := text_problem(item))), None)
    if not isinstance(value, str) or not set("[{&*") & set(value):
        return None
    try:
        parse_yaml(value)
    except _RefusedError as error:
        return yaml_problem(error)[1]
    except yaml.YAMLError:
        pass
    return None


def yaml_problem(error: yaml.YAMLError) -> tuple[str, str]:
    """Where and what: (", line 3", "mapping values are not allowed here"); the place is "" where it is not known."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be parsed"
    return (f", line {mark.line + 1}" if mark else ""), problem


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _TwiceError
    return found


def _integer(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:
        return digits


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_LONG_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer)


def _decoding(text: str, start: int, decode: Any) -> Any:
    try:
        return decode()
    except (_TwiceError, RecursionError):
        _check_json(text, start, twice=True)
        raise json.JSONDecodeError("it is nested too deeply", text, start) from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # a whole number of more digits than Python reads
        match = _LONG_NUMBER.search(text, start)
        raise json.JSONDecodeError(str(error), text, match.start() if match else start) from None


def _check_json(text: str, start: int, *, twice: bool) -> None:
    """Raise `json.JSONDecodeError` at the first bracket that is too deep, or the first key that is there already."""
    within: list[set[str]] = []
    for token in _TOKEN.finditer(text, start):
        piece = token[0]
        if piece in "{[":
            within.append(set())
            if len(within) > MAX_DEPTH:
                message = f"lists and objects are nested more than {MAX_DEPTH} deep"
                raise json.JSONDecodeError(message, text, token.start())
        elif piece in "}]":
            if within:
                within.pop()
        elif twice and within and _COLON.match(text, token.end()):
            try:
                key = json.loads(piece)
            except ValueError:  # the decoder says what is wrong with it
                continue
            if key in within[-1]:
                raise json.JSONDecodeError(f"the key {key!r} occurs twice in one object", text, token.start())
            within[-1].add(key)


class _Loader(yaml.SafeLoader):
    """Stops at brackets that are too deep as soon as it sees them; its parser takes seconds for thousands of them."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level >= MAX_DEPTH:
            raise _RefusedError(problem=_TOO_DEEP, problem_mark=self.get_mark())
        super().fetch_flow_collection_start(TokenClass)


class _Node:
    """A YAML list or mapping whose end has not been read yet."""

    def __init__(self, anchor: str | None, mapping: bool) -> None:
        self.anchor, self.mapping = anchor, mapping
        self.values, self.children = 1, 0
        self.keys: dict[str, int] = {}


def _check_yaml(text: str) -> None:
    """Raise `yaml.MarkedYAMLError` at what `parse_yaml` refuses; reads events one by one and builds nothing."""
    within: list[_Node] = []
    worth: dict[str, int] = {}  # of what each anchor names

    def add(values: int, event: yaml.Event) -> None:
        if not within:
            return
        within[-1].values += values
        within[-1].children += 1
        if sum(node.values for node in within) > MAX_NODES:
            raise _RefusedError(
                problem=f"its aliases stand for more than {MAX_NODES:,} values", problem_mark=event.start_mark
            )

    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            if any(node.anchor == event.anchor for node in within):
                raise _RefusedError(
                    problem=f"the alias *{event.anchor} stands within what it names", problem_mark=event.start_mark
                )
            add(worth.get(event.anchor, 1), event)
        elif isinstance(event, yaml.ScalarEvent):
            parent = within[-1] if within else None
            if parent and parent.mapping and parent.children % 2 == 0 and event.value != "<<":
                line = event.start_mark.line + 1
                if event.value in parent.keys:
                    first = parent.keys[event.value]
                    raise _RefusedError(
                        problem=f"the key {event.value!r} occurs twice (first in line {first})",
                        problem_mark=event.start_mark,
                    )
                parent.keys[event.value] = line
            if event.anchor:
                worth[event.anchor] = 1
            add(1, event)
        elif isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            if len(within) == MAX_DEPTH:
                raise _RefusedError(problem=_TOO_DEEP, problem_mark=event.start_mark)
            within.append(_Node(event.anchor, isinstance(event, yaml.MappingStartEvent)))
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            node = within.pop()
            if node.anchor:
                worth[node.anchor] = node.values
            add(node.values, event)


def _line(error: UnicodeDecodeError) -> int:
    return error.object[: error.start].count(b"\n") + 1
