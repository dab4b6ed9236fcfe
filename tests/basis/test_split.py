"""Sharing work out between processes: what can be said in one process. Two real ones are in tests/distributed."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from pica.basis import BasisRequest, Holdings, _split, solve_basis, solve_many
from pica.errors import BasisError, ConfigError, RankError


def test_work_is_divided_by_cost_and_completely() -> None:
    costs = [1.0, 1.0, 10.0, 1.0, 5.0, 4.0, 2.0]
    shares = _split.divide(costs, [0, 1], 2)
    assert sorted(shares[0] + shares[1]) == list(range(7))
    loads = [sum(costs[i] for i in share) for share in shares]
    assert loads == [12.0, 12.0]
    assert shares[0][0] == 2  # the dearest first


def test_only_those_who_have_the_weights_work() -> None:
    assert _split.divide([1.0, 2.0, 3.0], [0], 2) == [[2, 1, 0], []]


def test_one_wide_layer_costs_more_than_many_narrow_ones() -> None:
    wide, narrow, tall = Holdings([(1000, 1000), (100, 1000), (1000, 100)]).costs
    assert wide > 40 * narrow
    assert narrow == tall


def test_the_switch_takes_nought_and_one_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PICA_SPLIT_BASIS", "no")
    with pytest.raises(ConfigError, match="PICA_SPLIT_BASIS='no' must be 0"):
        _split.enabled()
    monkeypatch.setenv("PICA_SPLIT_BASIS", "1")
    assert not _split.enabled()  # no distributed job


def test_description_survives_the_journey() -> None:
    solved = _split.Solved((torch.zeros(3, 5), torch.zeros(3, dtype=torch.float64)), "out subset eigh")
    row = _split._describe(solved)
    assert _split._layout(row) == [((3, 5), torch.float32), ((3,), torch.float64)]
    assert bytes(v for v in row[16:] if v).decode() == "out subset eigh"


class _Job:
    """Stands for a job of `size` processes that share a store, for what `meet` asks of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
        self.store = torch.distributed.HashStore()
        monkeypatch.setattr(_split, "process_count", lambda: size)
        monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: self.store)
        monkeypatch.setattr(_split, "_left_alone", False)
        monkeypatch.setattr(_split, "LEAST_PATIENCE", 0.3)


def test_who_comes_alone_is_not_kept_waiting(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    job, holdings = _Job(monkeypatch, 2), Holdings([(8, 8)])
    with caplog.at_level(logging.INFO, logger="pica"):
        assert not _split.meet("work", holdings)
    assert "did not come" in caplog.text
    # another process that comes later finds the answer given, and does not wait for one that has gone on
    monkeypatch.setattr(_split, "_met", type(_split._met)())
    assert not _split.meet("work", holdings)
    assert job.store.num_keys() > 0


def test_all_that_come_get_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    _Job(monkeypatch, 3)
    monkeypatch.setattr(_split, "LEAST_PATIENCE", 30.0)
    holdings = Holdings([(8, 8)])

    class Once(dict):  # each thread here stands for a process, with a count of its own
        def __missing__(self, key: str) -> int:
            return 0

        def __setitem__(self, key: str, value: int) -> None: ...

        def __getitem__(self, key: str) -> int:
            return 1

    monkeypatch.setattr(_split, "_met", Once())
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(lambda _: _split.meet("work", holdings), range(3))) == [True] * 3


def test_another_model_is_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    _Job(monkeypatch, 2)
    assert not _split.meet("work", Holdings([(8, 8)], sample=b"one"))
    assert not _split.meet("work", Holdings([(8, 8)], sample=b"two"))


def test_without_weights_and_without_others_there_is_no_basis() -> None:
    request = BasisRequest("layers.0.q_proj", 4)
    with pytest.raises(BasisError, match="layers.0.q_proj: this process has no weights"):
        solve_many([request], lambda r: (torch.zeros(8, 8), "in"), Holdings([(8, 8)], here=False))


def test_in_one_process_nothing_changes() -> None:
    weight = torch.randn(12, 8)
    (basis,) = solve_many([BasisRequest("w", 4)], lambda r: (weight, "in"), Holdings([(12, 8)]))
    assert torch.equal(basis.projector, solve_basis(weight, 4, side="in").projector)


@pytest.mark.parametrize(
    ("told", "kind", "message"),
    [
        ("RankError\nrank=9 is too large", RankError, "^rank=9 is too large$"),
        (
            "RuntimeError\nout of memory",
            BasisError,
            r"Process 1 could not solve its share.*\(RuntimeError: out of memory\)",
        ),
        ("annotations\nno class", BasisError, r"Process 1 .*\(annotations: no class\)"),
    ],
    ids=["of the package", "of a library", "a name that is no class"],
)
def test_the_failure_of_one_process_is_raised_in_the_others(
    monkeypatch: pytest.MonkeyPatch, told, kind, message
) -> None:
    def gather(parts: list[torch.Tensor], mine: torch.Tensor) -> None:
        assert not mine.any()  # this process has nothing to tell
        content = told.encode().ljust(len(mine), b"\0")
        for part, text in zip(parts, (bytes(len(mine)), content)):
            part.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))

    monkeypatch.setattr(_split, "process_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather", gather)
    with pytest.raises(kind, match=message):
        _split._raise_together(None, torch.device("cpu"))
