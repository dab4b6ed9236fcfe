"""Data files: every mistake in one is reported with its line."""

import gzip
from pathlib import Path

import pytest

from pica.errors import DataError
from pica.tasks.places import check_location
from pica.tasks.records import read_records


def write(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_json_lines_keep_their_line_numbers_across_blank_lines(tmp_path: Path):
    records = read_records(write(tmp_path, "a.jsonl", '{"a": 1}\r\n\r\n{"a": 2}\r\n'))
    assert [(dict(record.fields), record.place.rsplit(" ", 1)[1]) for record in records] == [
        ({"a": 1}, "1"),
        ({"a": 2}, "3"),
    ]


def test_json_list_rows_know_the_line_they_begin_at(tmp_path: Path):
    records = read_records(write(tmp_path, "a.json", '[\n  {"a": 1,\n   "b": 2},\n\n  {"a": 3}\n]\n'))
    assert [record.place.rsplit(" ", 1)[1] for record in records] == ["2", "5"]


def test_byte_order_mark_is_accepted(tmp_path: Path):
    assert len(read_records(write(tmp_path, "a.jsonl", b'\xef\xbb\xbf{"a": 1}\n'))) == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2: not valid JSON"),
        ("a.jsonl", '{"a": 1}\n[1, 2]\n', "line 2: expected an object .* found a list"),
        ("a.jsonl", "\n\n", "holds no rows"),
        ("a.jsonl", "", "holds no rows"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "line 2: not UTF-8"),
        ("a.json", "[]", "holds no rows"),
        ("a.json", "", "holds no rows"),
        ("a.json", '{"a": 1}\n{"a": }', "line 2: .*expected a list of rows, or one object a line"),
        ("a.json", '"a"', "line 1: .*expected a list of rows, or one object a line"),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": ' + "[" * 100_000,
            "line 2: not valid JSON .lists and objects are nested more than 100 deep",
        ),
        (
            "a.json",
            '[{"a": ' + "[" * 100_000,
            "line 1: not valid JSON .lists and objects are nested more than 100 deep",
        ),
        ("a.csv", b"a,b\n1,2\n3,\x004\n", "line 3: holds a NUL"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16-le"), "line 1: holds a NUL character; .*UTF-16"),
        ("a.jsonl.gz", b"no gzip", "not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n', mtime=0)[:-9], "not a whole gzip file"),
        ("a.parquet", b"PAR1 no parquet", "not a readable .parquet file"),
        ("a.json", '[\n{"a": 1},\n{"a": }\n]', "line 3: not valid JSON"),
        ("a.json", '[\n{"a": 1},\n{"a": 2}', "line 3: .*cut short"),
        ("a.json", '[\n{"a": 1}\n{"a": 2}]', "line 3: .*expected ','"),
        ("a.json", '[{"a": 1}]\n\nmore', "line 3: .*text after the end"),
        ("a.json", "[\n1]", "line 2: expected an object .* found a number"),
        ("a.json", '[{"a": 1}, 1]', "row 2: expected an object .* found a number"),
        ("a.txt", "a,b", "unknown ending"),
    ],
)
def test_malformed_files_name_the_line(tmp_path: Path, name: str, text: str | bytes, message: str):
    with pytest.raises(DataError, match=message):
        read_records(write(tmp_path, name, text))


def test_missing_file_and_folder(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        read_records(str(tmp_path / "none.json"))
    with pytest.raises(DataError, match="is a folder"):
        read_records(str(tmp_path))


def test_fields_are_checked_where_they_are_read(tmp_path: Path):
    location = write(tmp_path, "a.jsonl", '{"q": "x", "empty": " ", "list": [1], "n": 4.0, "none": null}\n')
    (record,) = read_records(location)
    assert record.text("query", "q") == "x"
    assert record.text("n") == "4.0"
    assert record.text("none", required=False) == ""
    assert record.text("empty", filled=False) == " "
    with pytest.raises(DataError, match="line 1: field 'none' is null"):
        record.text("none")
    with pytest.raises(DataError, match="line 1: field 'empty' is empty"):
        record.text("empty")
    with pytest.raises(DataError, match="must be text, found a list"):
        record.text("list")
    with pytest.raises(DataError, match="'question' or 'query' is missing .*data.columns"):
        record.text("question", "query")


@pytest.mark.parametrize("location", ["hub:openai/gsm8k/main:test", "hub:meta-math/MetaMathQA-40K", "embedded"])
def test_hub_names_are_recognised_without_asking_the_hub(location: str):
    assert check_location(location) is None


def test_malformed_hub_name_is_a_problem():
    assert "hub:OWNER/NAME" in str(check_location("hub:gsm8k"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('"half \\ud83d"', r"line 1: field 'q' holds half of a character \(\\ud83d without"),
        ("NaN", "line 1: field 'q' must be text, found nan, which is no value"),
        ("1e999", "line 1: field 'q' must be text, found inf, which is no value"),
        ("true", "must be text, found true or false"),
        ('{"a": 1}', "must be text, found an object"),
    ],
)
def test_values_that_are_no_text_name_their_line(tmp_path: Path, value: str, message: str):
    (record,) = read_records(write(tmp_path, "a.jsonl", f'{{"q": {value}}}\n'))
    with pytest.raises(DataError, match=message):
        record.text("q")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_number_of_thousands_of_digits_is_text_like_any_other(tmp_path: Path, name: str):
    row = f'{{"q": 1{"0" * 5000}}}'
    (record,) = read_records(write(tmp_path, name, row if name == "a.jsonl" else f"[{row}]"))
    assert record.text("q") == "1" + "0" * 5000
