"""Only the same problem is the same: what is left aside is case, spacing and sentence punctuation."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pica.tasks import LabelledText
from pica.tasks.identity import same_problem


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("What is 2 + 2?", "what is 2+2"),
        ("Hello, world!", "hello   world."),
        ("“Quoted”, he said…", '"quoted" he said'),
        ("Straße", "STRASSE"),
        ("caf\u00e9", "cafe\u0301"),
        ("क्या है?", "क्या है।"),
        ("这是什么？", "这是什么"),
        ("great 😀", "great😀!"),
        ("(a + b) * c", "( a+b )*c."),
        ("one\u200btwo\r\nthree", "one two three"),
    ],
)
def test_case_spacing_and_sentence_punctuation_are_aside(first: str, second: str):
    assert same_problem(first) == same_problem(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("What is 5 + 3?", "What is 5 - 3?"),
        ("What is 5 * 3?", "What is 5 / 3?"),
        ("What is 5 - 3?", "What is 5 − 3?"),  # whatever looks like it: better one problem too many than one lost
        ("x² = 4", "x2 = 4"),
        ("What is 1.5?", "What is 15?"),
        ("What is .5 + 2?", "What is 5 + 2?"),
        ("What is 1 2?", "What is 12?"),
        ("What is 5!?", "What is 5?"),
        ("(1 + 2) * 3", "1 + 2 * 3"),
        ("Find f'(3).", "Find f(3)."),
        ("5' tall", '5" tall'),
        ("a < b", "a > b"),
        ("x_1", "x1"),
        ("50%", "50$"),
        ("खाना अच्छा था", "खाने अच्छे थे"),
        ("मिल", "मील"),
        ("שָׁלוֹם", "שלום"),
        ("😀", "😡"),
        ("👍🏻", "👍🏿"),
        (":)", ":("),
        ("!!!", "???"),
        ("C++", "C"),
        ("résumé", "resume"),
    ],
)
def test_everything_else_counts(first: str, second: str):
    assert same_problem(first) != same_problem(second)


def test_two_texts_are_not_one_nor_divided_elsewhere():
    def key(text: str, pair: str | None) -> str:
        return same_problem(LabelledText(text, "a", pair).identity)

    assert len({key("a b", "c"), key("a", "b c"), key("a b c", None), key("a b c", "")}) == 4
    assert key("A  b", "c.") == key("a b", "C")


@given(st.text())
def test_the_form_is_that_of_any_spelling_and_never_empty_for_a_text(text: str):
    form = same_problem(text)
    assert same_problem(f" {text}\t") == form
    assert same_problem(unicodedata.normalize("NFD", text)) == form
    assert bool(form) == bool(text.replace("\u200b", "").replace("\ufeff", "").split())
