"""Names from files steer no terminal, no page and no spreadsheet."""

import ast
import csv
import io
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

import pica
from pica.cli.console import VisibleConsole, print_sentences
from pica.cli.show import say, show
from pica.report.page import Column, Page, table
from pica.text import csv_text, shortened, visible

HOSTILE = "q_proj\x1b]0;owned\x07\x1b[2J\r\x00\x9b31m\u202egpj\u2028\ud800"
SHOWN = r"q_proj\x1b]0;owned\x07\x1b[2J\r\x00\x9b31m\u202egpj\u2028\ud800"


def test_what_steers_is_written_out_and_the_rest_is_kept():
    assert visible(HOSTILE) == SHOWN
    assert visible(SHOWN) == SHOWN
    assert visible("Zeile\n\tné 漢字 🙂 ± –") == "Zeile\n\tné 漢字 🙂 ± –"


def test_both_ways_to_print(capsys: pytest.CaptureFixture[str]):
    show(f"Adapter: {HOSTILE}")
    say(HOSTILE)
    shown = capsys.readouterr()
    assert shown.out == f"Adapter: {SHOWN}\n"
    assert shown.err == f"pica: {SHOWN}\n"


def test_tables_and_notes_of_a_terminal():
    """The console's own colours still reach the terminal."""
    file = io.StringIO()
    console = VisibleConsole(file=file, force_terminal=True, width=200, color_system="standard")
    rows = Table(title=HOSTILE)
    rows.add_column(HOSTILE)
    rows.add_row(HOSTILE)
    console.print(rows)
    console.print(f"warning: {HOSTILE}", markup=False)
    console.print(Text(HOSTILE, style="red"))
    with console.status(HOSTILE):
        pass
    written = file.getvalue()
    assert "\x1b[31m" in written
    for raw in ("\x1b]0", "\x07", "\x1b[2J\\", "\x00", "\x9b", "\u202e", "\ud800"):
        assert raw not in written
    assert r"\x1b]0;owned" in written


def test_commands_print_in_no_other_way():
    for file in (Path(pica.__file__).parent / "cli").glob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        called = {function.id for function in calls if isinstance(function, ast.Name)}
        assert not called & {"print", "Console"} or file.name == "show.py", file


def test_pages():
    page = Page(f"<script>alert(1)</script>{HOSTILE}", lead=HOSTILE, facts={HOSTILE: "<b>"})
    rows = [{"label": '"><img src=x onerror=alert(1)>', "value": HOSTILE}]
    columns = [Column("label", "<i>"), Column("value", HOSTILE)]
    page.section("<u>x</u>", "<em>", table(columns, rows, caption='" onclick="alert(1)'))
    html = page.html()
    for piece in ("<script>alert", "<img", "<i>", "<u>", "<em>", '" onclick', "\x1b", "\u202e", "\ud800"):
        assert piece not in html
    assert r"q_proj\x1b]0;owned" in html


def test_cells_that_a_spreadsheet_would_run():
    given = [
        "=HYPERLINK(1)",
        "+1+1",
        "-1+1",
        "@SUM(1)",
        "\t=1",
        "\r=1",
        "-0.5",
        "+3e4",
        "-inf",
        "a=1",
        "",
        -1.5,
        None,
        7,
    ]
    rows = list(csv.reader(io.StringIO(csv_text([{"a": value, "c": 1} for value in given], ["a", "b"]), newline="")))
    assert rows[0] == ["a", "b"]
    escaped = [f"'{text}" for text in given[:5]]  # pyright: ignore[reportArgumentType]
    assert [row[0] for row in rows[1:]] == [*escaped, r"\r=1", "-0.5", "+3e4", "-inf", "a=1", "", "-1.5", "", "7"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\n words", "two words"),
        ("x" * 10, "x" * 10),
        ("x" * 11, "xxxxxx ..."),
        ("one two three", "one tw ..."),
        ("", ""),
    ],
)
def test_a_text_is_shortened_to_a_line(text: str, shown: str):
    assert shortened(text, 10) == shown


@pytest.mark.parametrize(("terminal", "lines"), [(True, ["Four conversations", "were held out."]), (False, None)])
def test_sentences_are_broken_between_words_and_only_on_a_terminal(terminal: bool, lines: list[str] | None):
    said = "Four conversations were held out."
    file = io.StringIO()
    print_sentences(VisibleConsole(file=file, force_terminal=terminal, width=20, soft_wrap=True), said)
    assert [line.rstrip() for line in file.getvalue().splitlines()] == (lines or [said])
