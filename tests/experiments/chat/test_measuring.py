"""Held-out numbers against the plain formula."""

from __future__ import annotations

import math

import pytest
import torch

from pica.experiments.chat.measuring import Measured, measure_rows, pooled_mean, summed_up
from pica.experiments.preference.measuring import mean_and_error

from .test_packing import llama, some_rows


def test_losses_and_right_tokens_are_those_of_the_plain_formula():
    model, rows = llama("sdpa"), some_rows()
    rows.owners = [0, 0, 1, 2, 3, 4]  # two rows of one conversation
    found = measure_rows(model, rows, 0, batch_size=4)
    expected: dict[int, list[float]] = {}
    for ids, labels, owner in zip(rows.input_ids, rows.labels, rows.owners):
        scores = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        for position, label in enumerate(labels[1:]):
            if label != -100:
                loss, right = -scores[position, label].item(), float(scores[position].argmax() == label)
                sums = expected.setdefault(owner, [0.0, 0.0, 0])
                sums[0], sums[1], sums[2] = sums[0] + loss, sums[1] + right, sums[2] + 1
    assert found.keys() == expected.keys()
    for owner, (loss, right, tokens) in expected.items():
        assert found[owner].loss == pytest.approx(loss, rel=1e-5)
        assert (found[owner].right, found[owner].tokens) == (right, tokens)


def test_standard_errors_are_those_of_a_ratio_of_means():
    g = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 30, (400,), generator=g)
    sums = counts * (2 + 0.5 * torch.randn(400, generator=g))
    total = summed_up([Measured(float(s), int(c) // 2, int(c)) for s, c in zip(sums, counts)])
    assert total.loss == pytest.approx(float(sums.sum() / counts.sum()))
    assert total.perplexity == pytest.approx(math.exp(total.loss))
    draws = torch.randint(0, 400, (4000, 400), generator=g)
    bootstrap = (sums[draws].sum(1) / counts[draws].sum(1)).std()
    assert total.loss_stderr == pytest.approx(float(bootstrap), rel=0.1)
    assert math.isnan(summed_up([Measured(2.0, 1, 2)]).loss_stderr)


def test_the_error_of_one_conversation_is_unknown():
    mean, error = pooled_mean([3.0], [4])
    assert mean == 0.75
    assert math.isnan(error)
    assert math.isnan(mean_and_error([0.5])[1])
    assert mean_and_error([0.0, 1.0]) == (0.5, pytest.approx(0.5 / math.sqrt(2)))
