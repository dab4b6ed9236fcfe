"""Every form of file, compressed or not, and every layout of a folder gives the same rows with their places."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from pica.errors import DataError
from pica.tasks import Source, get_task
from pica.tasks.places import check_location, data_files, has_split
from pica.tasks.rows import read_rows

ROWS = [{"question": "What is 1 + 1?", "answer": "one,\nand one: 2"}, {"question": 'the "second"', "answer": "4"}]


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def table(delimiter: str = ",", rows: list[dict] = ROWS) -> str:
    cells = [row[name] for row in rows for name in ("question", "answer")]
    quoted = ['"' + cell.replace('"', '""') + '"' for cell in cells]
    body = "".join(f"{quoted[index]}{delimiter}{quoted[index + 1]}\r\n" for index in range(0, len(quoted), 2))
    return f"\ufeffquestion{delimiter}answer\r\n{body}"


FORMS = {
    "a.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "a.json": json.dumps(ROWS),
    "b.json": "".join(json.dumps(row) + "\n" for row in ROWS),
    "a.csv": table(),
    "b.csv": table(";"),
    "a.tsv": table("\t"),
    "A.CSV": table(),
}


@pytest.mark.parametrize("name", [*FORMS, *(f"{name}.gz" for name in FORMS), "a.parquet"])
def test_every_form_gives_the_same_problems(tmp_path: Path, name: str):
    if name == "a.parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / name)
        path = tmp_path / name
    else:
        path = write(tmp_path, name, FORMS[name.removesuffix(".gz")])
    assert check_location(str(path)) is None
    rows = list(read_rows(str(path), names={"question", "answer"}, headed=True))
    assert [dict(row.fields) for row in rows] == ROWS
    in_one_line = name in ("a.json", "a.json.gz", "a.parquet")
    number = 2 if "json" in name or "parquet" in name else 4  # after the header, and a cell of two lines
    assert rows[1].place == f"{path}, {'row' if in_one_line else 'line'} {number}"
    task: Any = get_task("math")
    examples = task.load("train", Source(str(path), template="plain"))
    assert [example.completion for example in examples] == [row["answer"] for row in ROWS]


@pytest.mark.parametrize(
    "layout",
    [
        {"train.jsonl": 2, "test.jsonl": 1},
        {"train.csv.gz": 2, "test.csv.gz": 1},
        {
            "data/train-00000-of-00002.parquet": 1,
            "data/train-00001-of-00002.parquet": 1,
            "data/test-00000-of-00001.parquet": 1,
        },
        {"train-00000-of-00001.parquet": 2, "test-00000-of-00001.parquet": 1},
        {"train/0000.parquet": 1, "train/0001.parquet": 1, "test/0000.parquet": 1},
        {"data/train.jsonl": 2, "data/test.jsonl": 1},
    ],
    ids=lambda layout: next(iter(layout)),
)
def test_folders_are_read_as_datasets_reads_them(tmp_path: Path, layout: dict[str, int], monkeypatch):
    folder, begun = tmp_path / "set", {"train": 0, "test": 0}
    for name, count in layout.items():
        split = "train" if "train" in name else "test"
        made = [{"question": f"{split} {begun[split] + n}", "answer": "1"} for n in range(count)]
        begun[split] += count
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".parquet"):
            datasets.Dataset.from_list(made).to_parquet(folder / name)
        else:
            write(folder, name, table(rows=made) if "csv" in name else "".join(json.dumps(row) + "\n" for row in made))
    (folder / "README.md").write_text("# A data set")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    theirs = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    for split in ("train", "test"):
        ours = [row.fields["question"] for row in read_rows(str(folder), split, headed=True)]
        assert ours == list(theirs[split]["question"]) == [f"{split} {n}" for n in range(begun[split])]  # pyright: ignore
        assert has_split(str(folder), split)
        assert len(data_files(str(folder), split)) == sum(split in name for name in layout)
    assert not has_split(str(folder), "validation")


def test_saved_data_sets_are_read_with_and_without_splits(tmp_path: Path):
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": whole, "dev": whole.select([1])}).save_to_disk(tmp_path / "splits")
    assert [dict(row.fields) for row in read_rows(str(tmp_path / "one"), "train")] == ROWS
    (row,) = read_rows(str(tmp_path / "splits"), "validation")
    assert (dict(row.fields), row.place) == (ROWS[1], f"{tmp_path / 'splits' / 'dev'}, row 1")
    splits = ("train", "validation", "test")
    assert [has_split(str(tmp_path / "splits"), split) for split in splits] == [True, True, False]
    assert not any(has_split(str(tmp_path / "one"), split) for split in splits), "its rows are no one split's"
    assert data_files(str(tmp_path / "splits"), "train")
    with pytest.raises(DataError, match="saved data set without a split test"):
        list(read_rows(str(tmp_path / "splits"), "test"))
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"damaged")
    with pytest.raises(DataError, match="saved data set cannot be read"):
        list(read_rows(str(tmp_path / "one")))


def test_a_folder_of_several_sets_names_them(tmp_path: Path):
    write(tmp_path, "main/train.jsonl", FORMS["a.jsonl"])
    with pytest.raises(DataError, match="of its own, but with main in it, which have one"):
        list(read_rows(str(tmp_path), "train"))


def test_cells_may_be_longer_than_the_csv_module_likes(tmp_path: Path):
    limit = csv.field_size_limit()
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        path = write(tmp_path, name, f"question{delimiter}answer\n{'x' * 200_000}{delimiter}1\n")
        (row,) = read_rows(str(path), headed=True)
        assert len(row.fields["question"]) == 200_000
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("task", ["math", "arithmetic", "commonsense"])
def test_tasks_that_generate_read_tables(tmp_path: Path, task: str):
    choices = "Is it? Answer format: true/false"
    texts = {
        "math": ("question,answer", "What is 3 + 1?,The answer is 4."),
        "arithmetic": ("instruction,input,output,answer", "What is 3 + 1?,,The answer is 4.,4"),
        "commonsense": ("instruction,answer", f"{choices},true"),
    }
    header, row = texts[task]

    def read(location: str, **options: Any) -> Any:
        return get_task(task).load("test", Source(location, **options))

    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        path = write(tmp_path, name, f"{header}\r\n{row}\r\n".replace(",", delimiter))
        (example,) = read(str(path))
        assert example.answer in ("4", "true")
    path = write(tmp_path, "other.csv", f"{header}\n{row}\n".replace("question", "ask").replace("instruction", "ask"))
    (example,) = read(str(path), columns={"question": "ask"})
    assert example.answer in ("4", "true")
    with pytest.raises(DataError, match="line 2: field .* is missing .the row has 'ask'"):
        read(str(path))


def test_columns_without_a_header_have_numbers_where_they_are_asked_for(tmp_path: Path):
    path = write(tmp_path, "a.csv", "What is 3 + 1?,The answer is 4.\n")
    task: Any = get_task("math")
    (example,) = task.load("test", Source(str(path), columns={"question": "1", "solution": "2"}))
    assert example.answer == "4"


def test_a_header_that_is_repeated_is_no_row(tmp_path: Path):
    path = write(tmp_path, "a.csv", "question,answer\na,1\nquestion,answer\nb,2\n")
    with pytest.raises(DataError, match="line 3: repeats the header"):
        list(read_rows(str(path), names={"question", "answer"}))
