"""Metrics against their formulas, and standard errors against what they are the error of."""

import math

import numpy as np
import pytest

from pica.tasks.metrics import (
    class_metrics,
    class_stderr,
    f1_of_tables,
    matthews_of_tables,
    regression_metrics,
    regression_stderr,
)


def test_binary_metrics_are_the_formulas():
    predicted, gold = [1, 1, 1, 0, 0, 0, 0, 1], [1, 1, 0, 0, 0, 1, 0, 1]
    right, missed, false, rest = 3, 1, 1, 3
    found = class_metrics(predicted, gold, 2)
    assert found["accuracy"] == 6 / 8
    assert found["f1"] == pytest.approx(2 * right / (2 * right + missed + false))
    root = math.sqrt((right + false) * (right + missed) * (rest + false) * (rest + missed))
    assert found["matthews"] == pytest.approx((right * rest - missed * false) / root)


def test_f1_of_three_classes_is_the_mean_over_them():
    # class 0: 1 of 2 found, none wrongly; class 1: 1 of 1, one wrongly; class 2: 1 of 1
    assert class_metrics([0, 1, 1, 2], [0, 0, 1, 2], 3)["f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)


def test_undefined_metrics_are_zero():
    assert class_metrics([0, 0], [0, 1], 2) == {"accuracy": 0.5, "f1": 0.0, "matthews": 0.0}
    assert regression_metrics([1.0, 1.0], [0.0, 2.0]) == {"pearson": 0.0, "spearman": 0.0}
    assert regression_metrics([1.0], [2.0]) == {"pearson": 0.0, "spearman": 0.0}


def test_spearman_sees_order_only():
    found = regression_metrics([1.0, 2.0, 3.0, 40.0], [1.0, 4.0, 9.0, 16.0])
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] < 0.9


def test_error_of_accuracy_is_the_binomial_one():
    assert class_stderr("accuracy", [0, 1, 1, 1], [0, 1, 1, 0], 2) == pytest.approx(math.sqrt(0.75 * 0.25 / 4))


@pytest.mark.parametrize("metric", ["matthews", "f1"])
def test_bootstrap_over_counts_is_the_bootstrap_over_examples(metric: str):
    generator = np.random.default_rng(1)
    gold = generator.integers(0, 2, 300)
    predicted = np.where(generator.random(300) < 0.8, gold, 1 - gold)
    drawn = []
    for _ in range(400):
        rows = generator.integers(0, 300, 300)
        drawn.append(class_metrics(list(predicted[rows]), list(gold[rows]), 2)[metric])
    assert class_stderr(metric, list(predicted), list(gold), 2) == pytest.approx(np.std(drawn, ddof=1), rel=0.15)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_metrics_of_counts_are_those_of_examples(classes: int):
    generator = np.random.default_rng(classes)
    predicted, gold = generator.integers(0, classes, (2, 60))
    table = np.zeros((1, classes, classes))
    np.add.at(table[0], (predicted, gold), 1)
    expected = class_metrics(list(predicted), list(gold), classes)
    assert f1_of_tables(table)[0] == pytest.approx(expected["f1"])
    assert matthews_of_tables(table)[0] == pytest.approx(expected["matthews"])


def test_error_of_a_correlation_is_near_its_asymptotic_value():
    generator = np.random.default_rng(2)
    gold = generator.normal(size=400)
    predicted = 0.8 * gold + 0.6 * generator.normal(size=400)
    share = regression_metrics(list(predicted), list(gold))["pearson"]
    # for two normal variables (1 - rho^2) / sqrt(n)
    assert regression_stderr("pearson", list(predicted), list(gold)) == pytest.approx((1 - share**2) / 20, rel=0.15)


def test_the_error_is_the_same_each_time_and_zero_where_all_is_right():
    given = ("matthews", [0, 1, 1, 0], [0, 1, 0, 0], 2)
    assert class_stderr(*given) == class_stderr(*given) > 0
    assert class_stderr("matthews", [0, 1] * 50, [0, 1] * 50, 2) == 0
