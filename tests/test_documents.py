"""What anybody may have written is read or refused in a second, with the line."""

import json
import time
from pathlib import Path

import pytest
import yaml

from pica.files.documents import (
    MAX_DEPTH,
    DocumentError,
    parse_json,
    parse_json_at,
    parse_yaml,
    read_json,
    read_yaml,
    yaml_problem,
)

BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)
DEEP_YAML = "".join(f"{' ' * depth}a:\n" for depth in range(300))
YAML = {
    "bomb": (BOMB, "line 6", "its aliases stand for more than 100,000 values"),
    "merged": (BOMB.replace("&a0 [", "&a0 {b: [").replace("1]\n", "1]}\n", 1), "line 6", "its aliases stand for"),
    "recursive": ("a: 1\nb: &b [*b]\n", "line 2", "the alias *b stands within what it names"),
    "flow": ("a: 1\nb: " + "[" * 10_000 + "]" * 10_000, "line 2", "nested more than 100 deep"),
    "block": (DEEP_YAML, "line 101", "nested more than 100 deep"),
    "twice": (
        "model:\n  path: a\n  dtype: auto\n  path: b\n",
        "line 4",
        "the key 'path' occurs twice (first in line 2)",
    ),
    "sections": ("model: {path: a}\n\nmodel: {path: b}\n", "line 3", "the key 'model' occurs twice (first in line 1)"),
    "date": ("seed: 2001-99-99\n", "", "month must be in 1..12"),
    "digits": ("seed: " + "1" * 5000 + "\n", "", "Exceeds the limit"),
    "large": ("a: b\n" * 200_000, "", "1,000,000 characters"),
    "object": ("a: !!python/object/apply:os.getcwd []\n", "line 1", "could not determine a constructor"),
}


def test_what_is_right_is_read():
    text = "shared: &s {a: 1, b: [x, y]}\none: {<<: *s, a: 2}\ntwo: *s\nthree: &n 5\nfour: [*n, *n]\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    value = {"a": [1, {"a": 2}], "b": {"a": '"a": {[', "c": []}, "c": [[[]]] * 200}
    assert parse_json(json.dumps(value)) == value
    assert parse_json_at(f"  {json.dumps(value)} rest", 2) == (value, 2 + len(json.dumps(value)))
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deepest) == parse_yaml(deepest)


@pytest.mark.parametrize("kind", YAML)
def test_yaml_that_is_refused(tmp_path: Path, kind: str):
    text, where, problem = YAML[kind]
    begun = time.process_time()
    with pytest.raises(yaml.YAMLError) as refused:
        parse_yaml(text)
    assert time.process_time() - begun < 1
    assert problem in yaml_problem(refused.value)[1]
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(DocumentError) as told:
        read_yaml(tmp_path / "a.yaml")
    assert str(told.value).startswith(f"{tmp_path}/a.yaml{', ' * bool(where)}{where}: not valid YAML")


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ('{"a": 1,\n"b": ' + "[" * 10_000 + "]" * 10_000 + "}", 2, "nested more than 100 deep"),
        ('{"a": ' * 101 + "1" + "}" * 101, 1, "nested more than 100 deep"),
        ('{"a": {"r": 1},\n "r": 2,\n "b": [{"r": "\\"r\\": "}],\n "r": 3}', 4, "the key 'r' occurs twice"),
        ('{"a": [{"r": 1,\n"\\u0072": 2}]}', 2, "the key 'r' occurs twice"),
        ('{"a": 1,\n"b": ' + "1" * 5000 + "}", 2, "Exceeds the limit"),
        ("{,}", 1, "Expecting property name"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, text: str, line: int, problem: str):
    begun = time.process_time()
    with pytest.raises(json.JSONDecodeError, match=problem) as refused:
        parse_json(text)
    assert refused.value.lineno == line
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DocumentError, match=f"a.json, line {line}: not valid JSON, .*{problem}"):
        read_json(tmp_path / "a.json")
    assert time.process_time() - begun < 1


def test_files_that_are_no_text(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"{}\n\xff")
    for read in (read_json, read_yaml):
        with pytest.raises(DocumentError, match="a, line 2: not UTF-8 text"):
            read(tmp_path / "a")
