"""The pytest plugin that points PEFT's tests at PiCa; the driver loads it with `-p peft_suite.plugin` in a subprocess.

PEFT's tests take their cases from tables in `pytest.mark.parametrize`. Right after a test module is imported and before
it is collected, the tables that `cases.FILES` names are exchanged for PiCa's rows. PEFT's files stay as they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest

from .cases import FILES, FilePlan
from .exclusions import EXCLUSIONS, SVFT_EXCLUSIONS
from .rows import ROWS, SVFT, MethodAsExample

# Helpers of PEFT's tests that skip methods which cannot do something; PiCa takes Conv1D and needs no bias.
SKIP_HELPERS = ("_skip_if_conv1d_not_supported", "_skip_if_not_conv1d_supported", "check_beft_config", "beft_tests")
# Tests that skip every method except those they name, and that PiCa passes under such a name: {test: class names}.
RESERVED = {
    "test_mixed_adapter_batches": ("LoraConfig", "RoadConfig"),
    "test_generate_with_mixed_adapter_batches": ("LoraConfig",),
    "test_generate_with_mixed_adapter_batches_and_beam_search": ("LoraConfig",),
}

_outcomes: dict[str, dict[str, str]] = {}


class AdaptedModule(pytest.Module):
    """A test module whose case tables hold PiCa's rows by the time it is collected."""

    def collect(self) -> Any:
        plan = FILES.get(self.path.name)
        if plan is not None:
            _adapt(self.obj, plan)
        return super().collect()


def pytest_configure(config: pytest.Config) -> None:
    sys.path.insert(0, str(config.rootpath))
    if importlib.util.find_spec("attr") is None:
        # A module of PEFT that test_initialization imports takes its decorator from attrs, which PEFT does not require.
        sys.modules["attr"] = ModuleType("attr")
        vars(sys.modules["attr"])["dataclass"] = dataclasses.dataclass
    for name in ("testing_utils", "testing_common"):
        _localise(importlib.import_module(f"tests.{name}"))


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    return AdaptedModule.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, dropped = [], []
    for item in items:
        reason = _reason_not_to_run(item)
        (kept if reason is None else dropped).append(item)
        if reason is not None:
            _record(item.nodeid, "deselected", reason)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Put PiCa in the place of the method that a test names, its fixtures included."""
    module = sys.modules[item.module.__name__]  # pyright: ignore[reportAttributeAccessIssue] - a function item has it
    with contextlib.ExitStack() as stack:
        if not _takes_method(item):
            name = FILES[item.path.name].example
            if hasattr(module, name):
                stack.enter_context(mock.patch.object(module, name, MethodAsExample))
        for name in RESERVED.get(getattr(item, "originalname", ""), ()):
            for holder in (module, sys.modules["tests.testing_common"]):
                if _takes_method(item) and hasattr(holder, name):
                    stack.enter_context(mock.patch.object(holder, name, ROWS.config))
        return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    if _outcomes.get(report.nodeid, {}).get("outcome") == "failed":
        return  # whatever the teardown says
    detail = ""
    if report.skipped:
        detail = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    elif report.failed:
        detail = report.longreprtext.strip().splitlines()[-1]
    _record(report.nodeid, report.outcome, detail.removeprefix("Skipped: "))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _record(report.nodeid, "failed", f"not collected: {report.longreprtext.strip().splitlines()[-1]}")


def pytest_sessionfinish() -> None:
    Path(os.environ["PICA_PEFT_TESTS_JSON"]).write_text(json.dumps(_outcomes, indent=1))


def _record(nodeid: str, outcome: str, detail: str) -> None:
    _outcomes[nodeid] = {"outcome": outcome, "detail": detail}


def _adapt(module: ModuleType, plan: FilePlan) -> None:
    tests = dict(_test_functions(module))
    for name, rows in plan.tables.items():
        _exchange(tests.values(), getattr(module, name), rows, f"{module.__name__}.{name}")
        setattr(module, name, rows)
    for name, rows in plan.inline.items():
        matching = [test for path, test in tests.items() if path.rpartition(".")[2] == name]
        marks = [m for test in matching for m in getattr(test, "pytestmark", []) if m.name == "parametrize"]
        assert marks, f"{module.__name__}: {name} has no cases any more"
        _exchange(matching, marks[0].args[1], rows, name)
    _localise(module)


def _test_functions(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """(dotted name, function) of the tests that `module` itself defines."""
    for name, value in vars(module).items():
        if name.startswith("test_"):
            yield name, value
        elif isinstance(value, type) and name.startswith("Test") and value.__module__ == module.__name__:
            yield from ((f"{name}.{k}", f) for k, f in vars(value).items() if k.startswith("test_"))


def _exchange(tests: Any, table: object, rows: list, what: str) -> None:
    """Give `rows` to each parametrisation that holds the very object `table`."""
    found = False
    for test in tests:
        marks = getattr(test, "pytestmark", [])
        for i, mark in enumerate(marks):
            if mark.name == "parametrize" and len(mark.args) > 1 and mark.args[1] is table:
                marks[i] = pytest.mark.parametrize(mark.args[0], rows).mark
                found = True
    assert found, f"no test is parametrised with {what} any more"


def _localise(module: ModuleType) -> None:
    """All models are local: `hub_online_once` must not go online for a model's first use."""
    for name, replacement in {
        "hub_online_once": contextlib.nullcontext,
        **dict.fromkeys(SKIP_HELPERS, lambda *args, **kwargs: None),
    }.items():
        if hasattr(module, name):
            setattr(module, name, replacement)


def _reason_not_to_run(item: pytest.Item) -> str | None:
    plan = FILES[item.path.name]
    name = item.nodeid.partition("::")[2]
    for pattern, reason in {**EXCLUSIONS, **(SVFT_EXCLUSIONS if ROWS is SVFT else {})}.items():
        if fnmatch.fnmatchcase(f"{item.path.name}::{name}", pattern):
            return reason
    if _takes_method(item) or any(fnmatch.fnmatchcase(name, p) for p in plan.lora_tests):
        return None
    return plan.rest


def _takes_method(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    values = callspec.params.values() if callspec is not None else ()
    return any(v is ROWS.config or isinstance(v, ROWS.config) for v in values)
