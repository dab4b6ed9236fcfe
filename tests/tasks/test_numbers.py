"""Finding and comparing the numbers that answers are."""

from fractions import Fraction

import pytest

from pica.tasks.numbers import after_marker, answer_in, find_numbers, same_number, whole_number


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("The answer is 4.", ["4"]),
        ("$1,200.50 in all", ["1200.50"]),
        ("16-12", ["16", "12"]),
        ("16 - 12 = 4", ["16", "12", "4"]),
        ("(3)-2", ["3", "2"]),
        ("-$5", ["-5"]),
        ("$-5", ["-5"]),
        ("\u22127", ["-7"]),
        ("a loss of -3.5%", ["-3.5"]),
        ("1, 2 and 3", ["1", "2", "3"]),
        ("1,000,000", ["1000000"]),
        ("1,2345", ["1", "2345"]),
        ("3/4 of it", ["3/4"]),
        ("x = .5", [".5"]),
        ("on 12/11/2026", ["12", "11/2026"]),
        ("none", []),
        ("9" * 5000, []),
    ],
)
def test_numbers_are_found_in_plain_form(text: str, numbers: list[str]):
    assert find_numbers(text) == numbers


@pytest.mark.parametrize(
    ("text", "number"),
    [("72", "72"), (" $72. ", "72"), ("1,080", "1080"), ("50%", "50"), ("-3", "-3"), ("72 apples", None), ("", None)],
)
def test_a_whole_number_has_nothing_else_around_it(text: str, number: str | None):
    assert whole_number(text) == number


def test_the_earlier_marker_in_the_list_wins_over_the_earlier_place():
    assert after_marker("the answer is <<8=8>>8.\n#### 8", ("####", "the answer is")) == "8"


def test_the_first_place_of_a_marker_wins_as_models_go_on_to_invent_problems():
    assert answer_in("The answer is 5.\n\nQuestion: 2 and 2?\nThe answer is 4.", ("the answer is",)) == "5"


def test_the_number_must_stand_on_the_markers_line():
    assert after_marker("####\n7\n8", ("####",)) == "7"
    assert answer_in("The answer is unclear.\n3 apples and 9 pears", ("the answer is",)) == "9"


def test_without_a_marker_the_last_number_counts():
    assert answer_in("I have 3 and get 4, so 7", ("####",)) == "7"
    assert answer_in("I do not know", ("####",)) is None


@pytest.mark.parametrize(("first", "second"), [("4", "4.0"), ("1/2", "0.5"), ("-3", "-3.00"), ("007", "7")])
def test_equal_values_are_equal(first: str, second: str):
    assert same_number(first, second)


@pytest.mark.parametrize(("first", "second"), [("4", "5"), ("0.33", "1/3"), ("4", None), (None, None), ("1/0", "1")])
def test_other_values_and_missing_ones_are_not(first: str | None, second: str | None):
    assert not same_number(first, second)


def test_tolerance_is_inclusive_and_two_sided():
    tolerance = Fraction(1, 1000)
    assert same_number("0.333", "0.334", tolerance=tolerance)
    assert same_number("0.334", "0.333", tolerance=tolerance)
    assert not same_number("0.333", "0.3341", tolerance=tolerance)
