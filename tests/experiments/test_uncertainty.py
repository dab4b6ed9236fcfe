"""Intervals and ties, held against scipy."""

import re
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap, pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from pica.experiments.outcomes import Outcomes, kept_outcomes, resampled, scores_of
from pica.experiments.results.comparison import KeptOutcomes
from pica.experiments.uncertainty import (
    Contender,
    Standing,
    loss_change,
    near_the_end,
    score_interval,
    shown_interval,
    standing,
    wilson,
)


@pytest.mark.parametrize(("right", "count"), [(0, 24), (1, 24), (24, 24), (180, 200), (1, 1), (0, 1)])
def test_wilsons_interval_is_scipys(right: int, count: int):
    expected = binomtest(right, count).proportion_ci(0.95, method="wilson")
    low, high = wilson(right / count, count)
    assert (low, high) == (pytest.approx(expected.low, abs=1e-12), pytest.approx(expected.high, abs=1e-12))
    assert score_interval("accuracy", right / count, 0.0, count) == (low, high)


def test_an_interval_of_several_seeds_is_wider_and_never_impossible():
    one = score_interval("accuracy", 0.9, 0.03, 100)
    three = score_interval("accuracy", 0.9, 0.03, 100, 0.05, 3)
    assert one[0] - three[0] > 0.01
    assert score_interval("accuracy", 0.99, 0.01, 100, 0.2, 2)[1] == 1.0
    assert score_interval("matthews", 0.5, 0.1, 100) == (pytest.approx(0.304, abs=1e-3), pytest.approx(0.696, abs=1e-3))
    assert score_interval("r2", -3.0, 0.5, 10)[0] == pytest.approx(-3.98, abs=0.01)


def test_scores_near_the_end_are_those_with_few_right_or_wrong():
    assert near_the_end("accuracy", 0.01, 200)
    assert near_the_end("accuracy", 0.96, 200)
    assert not near_the_end("accuracy", 0.5, 200)
    assert not near_the_end("matthews", 0.0, 200)
    assert shown_interval("accuracy", (0.005, 0.125)) == "0.5–12.5%"


def answers(generator: np.random.Generator, *shares: float, count: int = 400) -> list[np.ndarray]:
    """Right or wrong answers of several models to the same problems, some of which are hard for all."""
    hard = generator.random(count)
    return [(0.7 * hard + 0.3 * generator.random(count) < share).astype(np.float32) for share in shares]


def accuracy(right: np.ndarray, groups: tuple[int, ...] = ()) -> Outcomes:
    return Outcomes("accuracy", right, None, groups or (len(right),))


def contender(label: str, *seeds: Outcomes | None, score: float | None = None) -> Contender:
    means = [run.predicted.mean() for run in seeds if run is not None]
    mean = score if score is not None else float(np.mean(means))
    return Contender(label, mean, score_interval("accuracy", mean, 0.02, 400), dict(enumerate(seeds)))


def stand(*contenders: Contender) -> Standing:
    found = standing("accuracy", contenders)
    assert found is not None
    return found


def test_a_paired_difference_is_that_of_scipys_bootstrap():
    first, second = answers(np.random.default_rng(0), 0.6, 0.5)
    difference = stand(contender("a", accuracy(first)), contender("b", accuracy(second))).differences["b"]
    assert difference.value == pytest.approx(first.mean() - second.mean())
    # With the two made-up problems that each of the two solves alone.
    data = (np.append(first, [1, 0]), np.append(second, [0, 1]))
    expected = bootstrap(
        data, lambda a, b: np.mean(a) - np.mean(b), paired=True, vectorized=False, method="percentile", rng=1
    ).confidence_interval
    assert difference.low == pytest.approx(expected.low, abs=0.004)
    assert difference.high == pytest.approx(expected.high, abs=0.004)
    assert difference.paired


def test_pairing_tells_apart_what_separate_intervals_do_not():
    first, second = answers(np.random.default_rng(1), 0.58, 0.555)
    assert 0.02 < first.mean() - second.mean() < 0.1
    paired = stand(contender("a", accuracy(first)), contender("b", accuracy(second)))
    separate = stand(contender("a", None, score=first.mean()), contender("b", None, score=second.mean()))
    assert [one.label for one in paired.top] == ["a"]
    assert [one.label for one in separate.top] == ["a", "b"]
    assert "was not kept" in separate.statement()
    assert "ahead of every other method" in paired.statement()
    assert "one seed" in paired.statement()


@pytest.mark.parametrize(("alone", "apart"), [(4, False), (7, True)])
def test_few_problems_that_one_alone_solves_are_a_tie(alone: int, apart: bool):
    """An exact test (McNemar) has p = 0.125 for four of four, 0.016 for seven of seven."""
    second = np.zeros(24, np.float32)
    first = second.copy()
    first[:alone] = 1
    assert stand(contender("a", accuracy(first)), contender("b", accuracy(second))).differences["b"].tie is not apart


def test_seeds_count_as_well_as_problems():
    generator = np.random.default_rng(2)
    steady, *shaky = answers(generator, 0.55, 0.48, 0.66, count=4000)
    found = stand(contender("shaky", *map(accuracy, shaky)), contender("steady", accuracy(steady), accuracy(steady)))
    assert found.differences["steady"].tie, "one of its two seeds is worse"
    assert "2 seeds" in found.statement()
    only = stand(contender("shaky", accuracy(shaky[1])), contender("steady", accuracy(steady)))
    assert not only.differences["steady"].tie


def test_only_seeds_that_both_have_are_paired():
    first, second, third = answers(np.random.default_rng(3), 0.6, 0.5, 0.5)
    found = stand(contender("a", accuracy(first), accuracy(first)), contender("b", accuracy(second)))
    assert found.differences["b"].seeds == 1
    other = Contender("c", float(third.mean()), (0.45, 0.55), {5: accuracy(third)})
    assert not stand(contender("a", accuracy(first)), other).differences["c"].paired


def test_the_same_input_gives_the_same_result():
    first, second = answers(np.random.default_rng(4), 0.55, 0.53)
    one, other = (stand(contender("a", accuracy(first)), contender("b", accuracy(second))) for _ in range(2))
    assert one.differences == other.differences


def test_equal_methods_tie_whatever_their_order():
    (right,) = answers(np.random.default_rng(5), 0.5)
    found = stand(contender("a", accuracy(right)), contender("b", accuracy(right)))
    assert [found.place(label) for label in ("a", "b")] == ["tie", "tie"]
    assert "a tie of both: a (" in found.statement()
    perfect = np.ones(30, np.float32)
    assert stand(contender("a", accuracy(perfect)), contender("b", accuracy(perfect))).differences["b"].tie
    assert standing("accuracy", []) is None
    assert standing("accuracy", [Contender("a", float("nan"), (0, 1))]) is None


def test_data_sets_count_the_same_whatever_their_size():
    right = np.array([1] * 90 + [0] * 10, np.float32)
    found = scores_of(accuracy(right, (90, 10)), np.ones((1, 100), np.float32), (90, 10))
    assert found[0] == pytest.approx(0.5)


def test_other_metrics_are_those_of_the_resampled_problems():
    generator = np.random.default_rng(6)
    gold = generator.integers(0, 3, 60)
    predicted = np.where(generator.random(60) < 0.6, gold, generator.integers(0, 3, 60))
    numbers = generator.integers(0, 6, 60) / 5
    guessed = numbers + generator.normal(size=60).round(1)
    index = generator.integers(0, 60, 60)
    weights = np.bincount(index, minlength=60)[None].astype(np.float32)

    def score(metric: str, one: np.ndarray, other: np.ndarray, classes: int = 0) -> float:
        return scores_of(Outcomes(metric, one, other, (60,), classes), weights, (60,))[0]

    assert score("f1", predicted, gold, 3) == pytest.approx(f1_score(gold[index], predicted[index], average="macro"))
    assert score("matthews", predicted, gold, 3) == pytest.approx(matthews_corrcoef(gold[index], predicted[index]))
    assert score("pearson", guessed, numbers) == pytest.approx(pearsonr(guessed[index], numbers[index])[0], abs=1e-6)
    assert score("spearman", guessed, numbers) == pytest.approx(spearmanr(guessed[index], numbers[index])[0], abs=1e-6)
    assert score("pearson", guessed * 0, numbers) == 0


def test_problems_are_drawn_in_parts_alike(monkeypatch: pytest.MonkeyPatch):
    run = accuracy(np.ones(50, np.float32))
    whole = resampled([run], (50,))[0]
    monkeypatch.setattr("pica.experiments.outcomes._AT_ONCE", 50 * 700)
    parts = resampled([run], (50,))[0]
    assert parts.shape == whole.shape == (1, 5000)
    assert abs(parts.mean() - whole.mean()) < 1e-3


def test_a_file_of_predictions_is_kept_short():
    rows = [{"correct": index % 3 == 0, "group": "b" if index % 2 else "a"} for index in range(6)]
    kept = kept_outcomes("accuracy", rows)
    assert kept == KeptOutcomes(correct="100010", groups=[3, 3])
    read = Outcomes.read("accuracy", kept)
    assert read is not None
    assert read.predicted.tolist() == [1, 0, 0, 0, 1, 0]
    named = [{"predicted": "no", "gold": "yes", "correct": False, "probabilities": {"yes": 0.1, "no": 0.9}}]
    assert kept_outcomes("f1", named) == KeptOutcomes(predicted=[1], gold=[0], classes=2)
    assert kept_outcomes("spearman", [{"predicted": 1.5, "gold": 2}]) == KeptOutcomes(predicted=[1.5], gold=[2.0])
    assert kept_outcomes("r2", [{"prompt": "x"}]) is None
    assert Outcomes.read("r2", None) is None


def conversations(losses: Sequence[float], accuracy: float = 0.5, tokens: int = 10) -> list[dict]:
    return [{"loss": loss, "token_accuracy": accuracy, "tokens": tokens} for loss in losses]


def test_token_accuracy_is_held_against_another_conversation_by_conversation():
    before = [{"tokens": n, "token_accuracy": right / n} for n, right in ((10, 2), (40, 30), (30, 3), (20, 10))]
    after = [{"tokens": row["tokens"], "token_accuracy": row["token_accuracy"] + 0.1} for row in before]
    first, second = (Outcomes.read("token_accuracy", kept_outcomes("token_accuracy", rows)) for rows in (before, after))
    assert first is not None
    assert scores_of(first, np.ones((1, 4), np.float32), (4,))[0] == pytest.approx(45 / 100)
    apart = [Contender("before", 0.45, (0.2, 0.7), {0: first}), Contender("after", 0.55, (0.3, 0.8), {0: second})]
    found = standing("token_accuracy", apart)
    assert found is not None
    assert found.differences["before"].paired
    assert found.differences["before"].value == pytest.approx(0.1)
    assert found.statement().startswith(
        "Highest token accuracy: after (55.0%), ahead of every other method. 95% paired "
    )
    assert "4 test conversations" in found.statement()
    other = Outcomes.read("token_accuracy", KeptOutcomes(predicted=[1, 2, 3, 4], gold=[10, 40, 30, 21]))
    found = standing("token_accuracy", [apart[1], Contender("cut otherwise", 0.1, (0.0, 0.2), {0: other})])
    assert found is not None
    assert not found.differences["cut otherwise"].paired


def test_the_change_of_a_loss_says_how_sure_it_is():
    before = conversations([9.0, 3.0, 5.0])
    assert loss_change(before, conversations([7.0, 1.0, 3.0])) == (
        "The held-out loss changes by -2.0000 nats a token (95%: -2.0000 to -2.0000, paired bootstrap, 3 test "
        "conversations); it is lower in 3 of 3."
    )
    mixed = loss_change(before, conversations([6.0, 1.0, 6.0]))
    assert "changes by -1.3333" in mixed
    assert "which may be chance; it is lower in 2 of 3" in mixed
    assert "two or more are needed" in loss_change(before[:1], conversations([7.0]))
    assert "no number" in loss_change(before[:1], [{**before[0], "loss": None}])


def test_limits_of_few_conversations_hold_as_often_as_they_say():
    generator, held = np.random.default_rng(0), 0
    for _ in range(200):
        after = generator.normal(-1, 1, 5).tolist()
        text = loss_change(conversations(5 * [5.0]), conversations([5 + change for change in after]))
        low, high = map(float, re.findall(r"95%: (\S+) to ([^\s,]+)", text)[0])
        held += low <= -1 <= high
    assert 0.9 <= held / 200 <= 0.99
