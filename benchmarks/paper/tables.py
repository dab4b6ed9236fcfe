"""What each table holds: its rows, their rates, and what was published.

Published numbers are those of the PiCa paper; the rivals' in it equal those of SVFT's, and were not trained anew there.
Where a rate was published (PiCa and SVFT on Gemma-2B) it is the middle one of a row's grid, since nobody has said how rates
were chosen: ours are chosen on problems held out of the training set. MATH is the 500 problems of MATH-500, where papers
have all 5,000.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from pica.experiments.recipes.parsing import builtin_recipes

FIVE = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PICA_RATES = (5e-4, 1e-3, 2e-3)
LORA_RATES = (1e-4, 3e-4, 1e-3)
SVFT_RATES = {"plain": (2e-2, 5e-2, 1e-1), "random": (5e-4, 1e-3, 5e-3), "banded": (1e-3, 5e-3, 2e-2)}
"""By pattern."""


@dataclass(frozen=True)
class Row:
    """One method of a table.

    Attributes:
        label: What it is called.
        adapter: Fields of the recipe's adapter section; None for a row that is published only.
        rates: Its grid.
        published: What the paper has, in percent, by test set; empty where it has nothing.
    """

    label: str
    adapter: Mapping[str, Any] | None = None
    rates: tuple[float, ...] = ()
    published: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """One table of the paper.

    Attributes:
        name: Of the command, of its folder, and of the built-in recipe that all rows share but for the adapter.
        title: Of the page.
        rows: The methods.
        tests: Sets of test problems; none where the recipe's own place has several.
        train_examples, test_examples: How many there are, for the estimate of hours.
        tokens: Of a training sequence on average, for the estimate of hours: a guess, not measured here.
    """

    name: str
    title: str
    rows: tuple[Row, ...]
    tests: Mapping[str, str]
    train_examples: int
    test_examples: int
    tokens: int = 256

    def fields(self) -> dict[str, Any]:
        """The sections that all rows share, as a comparison's `base` has them."""
        recipe = yaml.safe_load(builtin_recipes()[self.name])
        shared = {name: dict(recipe[name]) for name in ("model", "data", "task", "trainer")}
        shared["trainer"].pop("learning_rate")
        shared["adapter"] = {"target_modules": recipe["adapter"]["target_modules"]}
        if self.tests:
            shared["data"]["test"] = dict(self.tests)
        return shared

    def comparison(self, shared: Mapping[str, Any], seeds: tuple[int, ...], *, one_rate: bool) -> dict[str, Any]:
        """What `pica compare` reads; `one_rate` leaves only the middle one of each grid."""
        methods = [
            {
                "label": row.label,
                "adapter": dict(row.adapter),
                "learning_rates": [row.rates[len(row.rates) // 2]] if one_rate else list(row.rates),
            }
            for row in self.rows
            if row.adapter is not None
        ]
        return {
            "name": self.name,
            "title": self.title,
            "seeds": list(seeds),
            "base": {**shared, "evaluate_base": True},
            "methods": methods,
        }


_MATHS_TESTS = {"gsm8k": "hub:openai/gsm8k/main:test", "math": "hub:HuggingFaceH4/MATH-500:test"}


def _pica(r: int, published: Mapping[str, float], projection: str = "principal") -> Row:
    other = "" if projection == "principal" else f", {projection}"
    adapter = {"method": "pica", "r": r} | ({"projection": projection} if other else {})
    return Row(f"PiCa r={r}{other}", adapter, PICA_RATES, published)


def _lora(method: str, r: int, published: Mapping[str, float]) -> Row:
    name = {"lora": "LoRA", "dora": "DoRA"}[method]
    return Row(f"{name} r={r}", {"method": method, "r": r, "target_modules": FIVE}, LORA_RATES, published)


def _svft(pattern: str, published: Mapping[str, float]) -> Row:
    width = {} if pattern == "plain" else {"off_diagonals": 16}
    adapter = {"method": "svft", "pattern": pattern, "target_modules": SEVEN, **width}
    return Row(f"SVFT {pattern}{' d=16' if width else ''}", adapter, SVFT_RATES[pattern], published)


def _maths_table(name: str, title: str, **published: tuple[float, float]) -> Table:
    """A table on MetaMathQA, with what the paper has of each row on GSM8K and MATH."""
    of = {row: dict(zip(_MATHS_TESTS, pair, strict=True)) for row, pair in published.items()}
    rows = (
        _pica(32, of["pica32"]),
        _pica(32, {}, "activation"),
        _lora("lora", 1, of["lora1"]),
        _lora("dora", 1, of["dora1"]),
        _svft("plain", of["svft_plain"]),
        _pica(256, of["pica256"]),
        _pica(256, {}, "activation"),
        _lora("lora", 32, of["lora32"]),
        _lora("dora", 16, of["dora16"]),
        _svft("random", of["svft_random"]),
        Row("VeRA r=1024", published=of["vera"]),
        Row("BOFT b=8 m=2", published=of["boft"]),
        Row("full fine-tuning", published=of["full"]),
    )
    return Table(name, title, rows, _MATHS_TESTS, 40_000, 1_319 + 500)


TABLES = {
    table.name: table
    for table in (
        _maths_table(
            "gemma-2b-metamathqa",
            "Gemma-2B on MetaMathQA-40K",
            pica32=(41.32, 15.22),
            lora1=(32.97, 13.04),
            dora1=(35.35, 13.04),
            svft_plain=(40.34, 14.38),
            pica256=(52.77, 16.36),
            lora32=(43.06, 15.50),
            dora16=(44.27, 16.18),
            svft_random=(50.03, 15.56),
            vera=(36.77, 14.12),
            boft=(36.01, 12.13),
            full=(52.69, 17.94),
        ),
        _maths_table(
            "llama-3-8b-metamathqa",
            "LLaMA-3-8B on MetaMathQA-40K",
            pica32=(73.54, 24.14),
            lora1=(68.84, 20.94),
            dora1=(68.30, 21.96),
            svft_plain=(69.22, 20.44),
            pica256=(76.12, 24.88),
            lora32=(75.89, 24.74),
            dora16=(75.66, 24.72),
            svft_random=(75.90, 24.22),
            vera=(63.76, 20.28),
            boft=(67.09, 21.64),
            full=(64.13, 16.24),
        ),
        Table(
            "gemma-2b-commonsense",
            "Gemma-2B on Commonsense-15K",
            (
                _pica(256, {"mean": 67.60}),
                _pica(256, {"mean": 63.18}, "random"),
                _pica(256, {}, "activation"),
                _pica(32, {}),
                _lora("lora", 1, {"mean": 55.81}),
                _lora("lora", 32, {"mean": 62.43}),
                _lora("dora", 16, {"mean": 64.40}),
                _svft("plain", {"mean": 55.81}),
                _svft("banded", {"mean": 65.86}),
                Row("full fine-tuning", published={"mean": 67.45}),
            ),
            {},
            15_000,
            22_000,
        ),
    )
}
"""By the name that the command takes."""
