"""Files of labelled texts: tables with and without a header, classes, GLUE's eight forms, and every mistake's line."""

import json
from pathlib import Path

import pytest

from pica.errors import ConfigError, DataError
from pica.tasks import Source
from pica.tasks.base import Target
from pica.tasks.glue import GlueTask
from pica.tasks.labelled import check_labels, checked_target, classes_of
from pica.tasks.places import check_location
from pica.tasks.records import class_name
from pica.tasks.sentiment import SentimentTask

SENTIMENT, GLUE = SentimentTask(), GlueTask()
TAB = "\t"


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def loaded(location: str, **options) -> list[tuple]:
    return [(example.text, example.label) for example in SENTIMENT.load("train", Source(location, **options))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.tsv", 'the "film"\t1\nso, so\t0\n'),
        ("a.tsv", 'sentence\tlabel\r\nthe "film"\t1\r\n\r\nso, so\t0\r\n'),
        ("a.tsv", 'Label\tid\tText\n1\ta\tthe "film"\n0\tb\tso, so\n'),
        ("a.csv", '"the ""film""",1\n"so, so",0\n'),
        ("a.csv", 'review,label\n"the ""film""",1\n"so, so",0\n'),
        ("a.jsonl", '{"text": "the \\"film\\"", "label": 1}\n{"text": "so, so", "label": 0}\n'),
        ("a.json", '[{"text": "the \\"film\\"", "label": 1}, {"text": "so, so", "label": "0"}]'),
    ],
)
def test_every_form_of_file_gives_the_same_examples(tmp_path: Path, name: str, text: str):
    assert loaded(write(tmp_path, name, text)) == [('the "film"', "1"), ("so, so", "0")]


def test_columns_by_name_and_by_number(tmp_path: Path):
    named = write(tmp_path, "a.csv", "id,stars,phrase\n7,5,nice\n8,1,poor\n")
    assert loaded(named, columns={"text": "phrase", "label": "stars"}) == [("nice", "5"), ("poor", "1")]
    bare = write(tmp_path, "b.csv", "7,5,nice\n8,1,poor\n")
    assert loaded(bare, columns={"text": "3", "label": "2"}) == [("nice", "5"), ("poor", "1")]
    with pytest.raises(ConfigError, match="'texts' is no field of this task; it has text, label, pair"):
        loaded(bare, columns={"texts": "3"})


def test_rows_keep_their_lines_through_quoted_line_breaks(tmp_path: Path):
    location = write(tmp_path, "a.csv", 'text,label\n"one\ntwo",1\nthree,0\nfour\n')
    with pytest.raises(DataError, match="a.csv, line 5: 1 cells where the first row has 2"):
        loaded(location)
    location = write(tmp_path, "a.csv", 'text,label\n"one\ntwo",1\nthree,\n')
    with pytest.raises(DataError, match="a.csv, line 4: field 'label' is empty"):
        loaded(location)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('text,label\n"open,1\n', "line 2: not valid CSV"),
        ("text,label,label\na,1,2\n", "line 1: two columns have the same name"),
        ("text,label\n", "holds no rows"),
        ("a,b,c\n", None),
        ("text,mood\na,1\n", "field 'label' or .* is missing .*data.columns"),
    ],
)
def test_malformed_tables(tmp_path: Path, text: str, message: str | None):
    location = write(tmp_path, "a.csv", text)
    if message is None:
        assert loaded(location) == [("a", "b")], "two columns are enough, a third is nobody's"
        return
    with pytest.raises(DataError, match=message):
        loaded(location)


def test_folder_stands_for_the_splits_file(tmp_path: Path):
    for name, word in (("train", "a"), ("dev", "b"), ("test", "c")):
        write(tmp_path, f"{name}.tsv", f"{word}\t1\n")
    found = [SENTIMENT.load(split, Source(str(tmp_path)))[0].text for split in ("train", "validation", "test")]
    assert found == ["a", "b", "c"]
    assert check_location(str(tmp_path)) is None
    (tmp_path / "dev.tsv").unlink()
    with pytest.raises(DataError, match="folder without a validation.jsonl or valid.jsonl or .*dev.jsonl"):
        SENTIMENT.load("validation", Source(str(tmp_path)))


def test_a_limit_samples_since_files_are_sorted(tmp_path: Path):
    location = write(tmp_path, "a.tsv", "".join(f"text {n}\t{n // 50}\n" for n in range(100)))
    found = loaded(location, limit=20)
    assert {label for _, label in found} == {"0", "1"}
    assert found == sorted(found, key=lambda pair: int(pair[0].split()[1])), "in the file's order"
    assert loaded(location, limit=20) == found
    assert loaded(location, limit=20, seed=1) != found


def test_classes_are_found_and_odd_ones_refused(tmp_path: Path):
    def classes(*labels: str) -> tuple[str, ...]:
        rows = "".join(f"{name}\t{label}\n" for name, label in enumerate(labels))
        return classes_of(SENTIMENT.load("train", Source(write(tmp_path, "a.tsv", rows))))

    assert classes("10", "9", "10") == ("9", "10")
    assert classes("b", "a", "b") == ("a", "b")
    with pytest.raises(DataError, match="line 1: label 'polarity' is the only one of its kind.*header"):
        classes("polarity", "1", "0", "1", "0")
    with pytest.raises(DataError, match="All training examples have the label '1'"):
        classes("1", "1")
    with pytest.raises(DataError, match="1001 different labels"):
        classes(*[str(number / 7) for number in range(1001)], "0.0")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.tsv"])
@pytest.mark.parametrize(
    ("written", "classes"),
    [
        (["1", "1.0", "0", "0.0", "-0.0", "+1", "1.00"], ("0", "1")),
        (["-1", "0", "1.0", "-1.0"], ("-1", "0", "1")),
        (["true", "false", "true"], ("false", "true")),
        (["0.5", "0.50", "-1.5", "10"], ("-1.5", "0.5", "10")),
    ],
)
def test_labels_are_compared_by_value(tmp_path: Path, name: str, written: list[str], classes: tuple[str, ...]):
    def line(number: int, label: str) -> str:
        if name == "a.jsonl":
            return f'{{"text": "t{number}", "label": {label.lstrip("+")}}}\n'
        return f"t{number}{',' if name == 'a.csv' else TAB}{label.title()}\n"

    header = "" if name == "a.jsonl" else line(0, "x").replace("t0", "text").replace("X", "label")
    text = header + "".join(line(number, label) for number, label in enumerate(written))
    assert classes_of(SENTIMENT.load("train", Source(write(tmp_path, name, text)))) == classes


def test_names_that_look_like_numbers_stay_names():
    assert [class_name(value) for value in ("01", "1", " a ", "1e3", "٣", "1.2.3")] == [
        "01",
        "1",
        "a",
        "1e3",
        "٣",
        "1.2.3",
    ]


@pytest.mark.parametrize("label", ["NaN", '"nan"', "null", "[1]", "1e999"])
@pytest.mark.parametrize("metric", ["accuracy", "pearson"])
def test_labels_that_are_no_value_name_their_line(tmp_path: Path, label: str, metric: str):
    location = write(tmp_path, "a.jsonl", f'{{"text": "a", "label": 1}}\n{{"text": "b", "label": {label}}}\n')
    with pytest.raises(DataError, match="line 2: (field 'label' (is null|must be text)|label ('nan'|'inf') is no)"):
        loaded(location, target=Target(metric=metric))


def test_a_header_shows_before_its_row_is_sampled_or_left_out(tmp_path: Path):
    rows = "".join(f"phrase {n},{n % 2}\n" for n in range(50))
    location = write(tmp_path, "a.csv", f"phrase,stars\n{rows}")
    for limit in (None, 5):
        with pytest.raises(DataError, match="a.csv, line 1: label 'stars' is the only one of its kind"):
            loaded(location, limit=limit)
    examples = SENTIMENT.load("test", Source(location))
    with pytest.raises(
        DataError, match="line 1: label 'stars' of the test data is none of '0', '1'. If that row is a header"
    ):
        check_labels(examples, ("0", "1"), "test")
    lone = "".join(f'{{"text": "t{n}", "label": "{"other" if n == 0 else n % 2}"}}\n' for n in range(9))
    assert classes_of(SENTIMENT.load("train", Source(write(tmp_path, "a.jsonl", lone)))) == ("0", "1", "other")


def test_numbers_are_needed_where_a_correlation_is_the_metric(tmp_path: Path):
    location = write(tmp_path, "a.tsv", "a\t1.5\nb\tgood\n")
    with pytest.raises(DataError, match="line 2: label 'good' is not a number, which task.metric = pearson needs"):
        loaded(location, target=Target(metric="pearson"))


@pytest.mark.parametrize(
    ("subset", "rows", "expected"),
    [
        ("cola", [{"sentence": "It go.", "label": 0, "idx": 0}], ("It go.", None, "unacceptable")),
        ("sst2", [{"sentence": "fine", "label": 1}], ("fine", None, "positive")),
        ("mrpc", [{"sentence1": "a", "sentence2": "b", "label": 1}], ("a", "b", "equivalent")),
        ("mrpc", [{"Quality": "0", "#1 String": "a", "#2 String": "b"}], ("a", "b", "not_equivalent")),
        ("qqp", [{"question1": "a", "question2": "", "is_duplicate": 0}], ("a", "", "not_duplicate")),
        ("stsb", [{"sentence1": "a", "sentence2": "b", "label": 3.8}], ("a", "b", 3.8)),
        ("mnli", [{"premise": "a", "hypothesis": "b", "label": 2}], ("a", "b", "contradiction")),
        ("mnli", [{"sentence1": "a", "sentence2": "b", "gold_label": "neutral"}], ("a", "b", "neutral")),
        ("qnli", [{"question": "a", "sentence": "b", "label": "not_entailment"}], ("a", "b", "not_entailment")),
        ("rte", [{"sentence1": "a", "sentence2": "b", "label": 0}], ("a", "b", "entailment")),
    ],
)
def test_glue_rows(tmp_path: Path, subset: str, rows: list[dict], expected: tuple):
    location = write(tmp_path, "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    (example,) = GLUE.load("test", Source(location, subset=subset))
    assert (example.text, example.pair, example.label) == expected


def test_glue_benchmark_files(tmp_path: Path):
    cola = write(tmp_path, "cola.tsv", 'gj04\t1\t\tThe book "falls.\ngj04\t0\t*\tBooks fall the.\n')
    found = GLUE.load("train", Source(cola, subset="cola"))
    assert [(example.text, example.label) for example in found] == [
        ('The book "falls.', "acceptable"),
        ("Books fall the.", "unacceptable"),
    ]


def test_glue_metrics_are_the_papers_and_the_eight_are_there():
    metrics = {subset: GLUE.target(subset).metric for subset in GLUE.subsets}
    assert len(metrics) == 8
    assert {name: metric for name, metric in metrics.items() if metric != "accuracy"} == {
        "cola": "matthews",
        "stsb": "pearson",
    }
    with pytest.raises(ConfigError, match="choose one of cola, mnli"):
        GLUE.target("wnli")


def test_secret_labels_are_told_apart(tmp_path: Path):
    location = write(tmp_path, "a.jsonl", '{"sentence": "x", "label": -1}\n')
    with pytest.raises(DataError, match="label -1 marks rows whose label is kept secret"):
        GLUE.load("test", Source(location, subset="sst2"))
    location = write(tmp_path, "b.jsonl", '{"sentence1": "x", "sentence2": "y", "label": -1.0}\n')
    with pytest.raises(DataError, match="label -1 marks rows whose label is kept secret"):
        GLUE.load("test", Source(location, subset="stsb"))


def test_targets_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="classes are negative, positive"):
        checked_target(GLUE.target("sst2"), labels=["a", "b"], metric=None)
    with pytest.raises(ConfigError, match="pearson is for numbers"):
        checked_target(GLUE.target("sst2"), labels=None, metric="pearson")
    with pytest.raises(ConfigError, match="f1 is for classes"):
        checked_target(GLUE.target("stsb"), labels=None, metric="f1")
    assert checked_target(GLUE.target("mrpc"), labels=None, metric="f1").metric == "f1"
