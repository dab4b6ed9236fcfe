"""The page that reports share."""

import base64
import re
from pathlib import Path

import pytest
from html5lib.html5parser import ParseError
from matplotlib.lines import Line2D
from tests.report.browser import check_page, document_after, needs_browser

from pica.report import figures
from pica.report.page import Cell, Column, Page, bullets, csv_text, details, notice, preformatted, table

COLUMNS = [Column("name", "method", numeric=False), Column("value", "value", help="What it is worth.")]
COSTS = [Column("name", "method", numeric=False), Column("value", "seconds", lower_first=True)]
ROWS = [
    {"name": "b", "value": 10},
    {"name": "a<b>", "value": Cell("9.0% ± 1%", 0.09)},
    {"name": "c", "value": None},
    {"name": "d", "value": 2.5},
]


def draw(sheet: figures.Sheet) -> None:
    axes = sheet.figure.subplots()
    for index in range(3):
        look = figures.style(index)
        line = axes.plot([1, 10, 1000], [index, 2, 3], label=f"line {index}", **look._asdict())[0]
        sheet.tip(line, f"tip <{index}>")
    axes.legend()
    figures.log_axis(axes.xaxis)


@pytest.fixture(scope="module")
def text() -> str:
    page = Page("Some <title> & more", lead="Lead", facts={"Model": "a/b", "Cells": 3})
    drawn = figures.figure("plot", draw, caption="A caption <i>.", alt='Three "lines"')
    page.section("First part", "A <b>paragraph</b>.", notice("Beware.", "warning"), drawn)
    again = figures.figure("plot-two", draw, caption="", alt="The same")
    page.section("Second part", again, table(COLUMNS, ROWS, caption="Some numbers."), bullets(["one", "two"]))
    page.section("Costs", table(COSTS, ROWS, caption="Less is better.", marked=[1]))
    page.section("Third", details("More", preformatted("a: 1\nb: <2>")))
    page.download("numbers.csv", "a,b\n1,é\n", kind="text/csv")
    return page.html()


def test_page_is_valid_and_needs_nothing_from_outside(text: str):
    check_page(text)
    assert "http" not in re.sub("http-equiv", "", text), "not even a namespace"


def test_the_check_of_pages_can_fail(text: str):
    with pytest.raises(ParseError):
        check_page(text.replace("</table>", ""))
    for bad in (
        '<a href="https://example.org/x">x</a>',
        '<img src="x.png" alt="">',
        '<p id="plot"></p>',
        '<a href="#no">x</a>',
    ):
        with pytest.raises(AssertionError):
            check_page(text.replace("</main>", f"{bad}</main>"))


def test_what_is_given_as_text_is_shown_as_text(text: str):
    assert "<title>Some &lt;title&gt; &amp; more</title>" in text
    for shown in (
        "A &lt;b&gt;paragraph&lt;/b&gt;.",
        "a&lt;b&gt;",
        "b: &lt;2&gt;",
        "A caption &lt;i&gt;.",
        "tip &lt;0&gt;",
    ):
        assert shown in text
    assert 'aria-label="Three &quot;lines&quot;"' in text


def test_what_stands_between_backticks_is_code():
    page = Page("T", lead="As `pica train` <b>.", facts={"A": "`x`"})
    page.section(
        "S", "Take `a` and `b`.", notice("See `c`."), bullets(["`d`"]), table(COLUMNS, ROWS, caption="Of `e`.")
    )
    text = page.html()
    check_page(text)
    assert "As <code>pica train</code> &lt;b&gt;." in text
    assert all(f"<code>{name}</code>" in text for name in "abcdex")
    assert "`" not in re.sub(r"<script>.*</script>", "", text, flags=re.DOTALL)


def test_downloads_carry_their_bytes(text: str):
    found = re.search(r'download="numbers.csv" href="data:text/csv;charset=utf-8;base64,([^"]*)"', text)
    assert found is not None
    assert base64.b64decode(found[1]).decode() == "a,b\n1,é\n"


def test_figures_take_their_colours_from_the_page(text: str):
    drawn = str(figures.figure("plot", draw, caption="", alt=""))
    for name in ("--ink", "--grid", "--series-1", "--series-2", "--series-3"):
        assert f"var({name})" in drawn
        assert re.search(rf"^\s*{name}: light-dark\(#\w{{6}}, #\w{{6}}\);", text, flags=re.MULTILINE)
    assert "#0101" not in drawn, "no stand-in colour is left"
    assert "#0102" not in drawn, "no stand-in colour is left"
    assert "<style" not in drawn, "matplotlib's rule on every element would reach the page"
    assert re.findall('class="(wide|narrow)"', drawn) == ["wide", "narrow"]


def test_figures_are_the_same_bytes_each_time():
    one, other = (figures.figure("plot", draw, caption="c", alt="a") for _ in range(2))
    assert one == other


def test_series_differ_without_colour():
    looks = [figures.style(index) for index in range(12)]
    assert len({look.marker for look in looks}) == 12
    assert len({(look.color, look.marker, str(look.linestyle)) for look in map(figures.style, range(24))}) == 24
    assert all(look.marker in Line2D.markers for look in looks)


@pytest.mark.parametrize(
    ("value", "shown"), [(671744, "672k"), (1e6, "1M"), (2.5e9, "2.5G"), (950, "950"), (0.003, "0.003")]
)
def test_quantities(value: float, shown: str):
    assert figures.quantity(value) == shown


def test_csv_leaves_out_what_is_no_column_and_leaves_empty_what_is_missing():
    assert csv_text([{"a": 1, "z": 2}, {"b": "x,y"}], ["a", "b"]) == 'a,b\n1,\n,"x,y"\n'


@needs_browser
def test_a_browser_sorts_the_table_and_changes_the_theme(text: str, tmp_path: Path):
    page = tmp_path / "page.html"
    page.write_text(text, encoding="utf-8")
    script = """
      const table = document.querySelector("table.sortable"), heads = table.tHead.rows[0].cells;
      const order = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent).join("|");
      const ground = () => getComputedStyle(document.body).backgroundColor;
      const out = [order()];
      for (const column of [1, 1, 0, 0]) {
        heads[column].querySelector("button").click();
        out.push(order() + " " + heads[column].getAttribute("aria-sort"));
      }
      const costs = document.querySelectorAll("table.sortable")[1];
      costs.tHead.rows[0].cells[1].querySelector("button").click();
      out.push([...costs.tBodies[0].rows].map((row) => row.cells[0].textContent).join("|"));
      const tip = document.getElementById("tip"), help = heads[1].querySelector("button");
      help.focus();
      out.push(tip.textContent + tip.hidden + help.hasAttribute("title"));
      const button = document.getElementById("theme");
      for (let press = 0; press < 3; press++) { button.click(); out.push(button.textContent + " " + ground()); }
      const shown = (name) => getComputedStyle(document.querySelector("svg." + name)).display;
      out.push(shown("wide") + " " + shown("narrow"), String(document.documentElement.scrollWidth <= innerWidth));
      document.body.dataset.out = out.join(";");
    """
    document = document_after(page, script, folder=tmp_path)
    found = re.search(r'data-out="([^"]*)"', document)
    assert found is not None
    assert found[1].replace("&lt;", "<").replace("&gt;", ">").split(";") == [
        "b|a<b>|c|d",
        "b|d|a<b>|c descending",
        "a<b>|d|b|c ascending",
        "a<b>|b|c|d ascending",
        "d|c|b|a<b> descending",
        "a<b>|d|b|c",
        "What it is worth.falsefalse",
        "Theme: light rgb(247, 246, 243)",
        "Theme: dark rgb(18, 21, 24)",
        "Theme: auto rgb(247, 246, 243)",
        "block none",
        "true",
    ]
