"""A comparison: one recipe, several methods in its adapter's place, each with a grid of learning rates and seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from pica.errors import ConfigError
from pica.experiments.recipes.parsing import change_recipe, load_recipe, read_named, section_names
from pica.experiments.recipes.recipe import Recipe

_TOP = ("name", "title", "description", "seeds", "learning_rates", "base", "methods", "ablations")
_ROW = ("label", "adapter", "learning_rates")
_ABLATION = ("title", "question", "methods")


@dataclass(frozen=True)
class Row:
    """One method of a comparison.

    Attributes:
        label: What it is called; distinct.
        adapter: Fields of the adapter section that differ from the base recipe's.
        learning_rates: Its grid.
    """

    label: str
    adapter: Mapping[str, Any]
    learning_rates: tuple[float, ...]


@dataclass(frozen=True)
class Ablation:
    """Rows that answer one question side by side."""

    title: str
    question: str
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """A checked comparison.

    Attributes:
        name: A plain word; part of the output folder's name.
        title: Of the report.
        description: Below the title.
        seeds: The first one chooses each row's learning rate.
        base: What all cells share: dotted recipe fields and values.
        rows: The methods.
        ablations: Questions that some of the rows answer.
    """

    name: str
    title: str
    description: str
    seeds: tuple[int, ...]
    base: Mapping[str, Any]
    rows: tuple[Row, ...]
    ablations: tuple[Ablation, ...] = field(default=())

    def recipe(self, row: Row, seed: int, rates: Sequence[float]) -> Recipe:
        """Make the recipe of one cell.

        Returns:
            It, checked.
        Raises:
            ConfigError: As `load_recipe`.
        """
        recipe = change_recipe(self._shared, [(f"adapter.{name}", value) for name, value in row.adapter.items()])
        first = row.label == self.rows[0].label and seed == self.seeds[0]
        trainer = replace(recipe.trainer, seed=seed, learning_rates=list(rates), learning_rate=rates[0])
        # The base model is the same for all: it is measured once.
        return replace(recipe, trainer=trainer, evaluate_base=recipe.evaluate_base and first)

    @cached_property
    def _shared(self) -> Recipe:
        values = {**self.base, "name": self.name, "data.hold_out": True, "output": None, "baseline.method": None}
        return load_recipe(None, list(values.items()))

    def selected(self, labels: Sequence[str]) -> tuple[Row, ...]:
        """Select rows by their labels (any case, or the beginning of one).

        Returns:
            The rows, in their own order; all if there are no labels.
        Raises:
            ConfigError: A label fits no row.
        """
        if not labels:
            return self.rows
        chosen: list[Row] = []
        for label in labels:
            exact = [row for row in self.rows if row.label.casefold() == label.casefold()]
            found = exact or [row for row in self.rows if row.label.casefold().startswith(label.casefold())]
            if not found:
                near = get_close_matches(label, [row.label for row in self.rows], n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ConfigError(
                    f"--methods: {label!r} is no row of {self.name}.{hint} "
                    f"Its rows: {'; '.join(row.label for row in self.rows)}."
                )
            chosen += [row for row in found if row not in chosen]
        return tuple(row for row in self.rows if row in chosen)


def builtin_comparisons() -> dict[str, str]:
    """Name and text of each comparison inside the package."""
    folder = resources.files("pica") / "assets" / "comparisons"
    found = {entry.name.removesuffix(".yaml"): entry for entry in folder.iterdir() if entry.name.endswith(".yaml")}
    return {name: found[name].read_text(encoding="utf-8") for name in sorted(found)}


def load_comparison(
    reference: str, *, seeds: Sequence[int] = (), overrides: Sequence[tuple[str, Any]] = ()
) -> Comparison:
    """Read a comparison and check every row of it, all but what only PEFT knows: that is `check_methods`.

    Args:
        reference: Path of a YAML file, or the name of a built-in comparison.
        seeds: In place of the file's.
        overrides: Dotted recipe fields for every cell, as text or as values; those of the adapter too.
    Returns:
        The comparison.
    Raises:
        ConfigError: Lists what is wrong with the file, with the shared recipe or with a row.
    """
    given = read_named("Comparison", reference, builtin_comparisons(), "fields such as 'base:' and 'methods:'")
    wrong = [f"{key}: no such field; a comparison has {', '.join(_TOP)}." for key in given if key not in _TOP]
    base = _base(given.get("base"), wrong) | dict(overrides)
    grid = _rates(given.get("learning_rates"), "learning_rates", wrong) if "learning_rates" in given else ()
    rows = _rows(given.get("methods"), grid, wrong)
    labels = [row.label for row in rows]
    wrong += [f"methods: label {label!r} occurs twice." for label in sorted(set(labels)) if labels.count(label) > 1]
    chosen = tuple(seeds) or _seeds(given.get("seeds", [0]), wrong)
    if len(set(chosen)) < len(chosen):
        wrong.append(f"seeds: {list(chosen)} holds one twice.")
    ablations = _ablations(given.get("ablations") or [], labels, wrong)
    name = str(given.get("name") or Path(reference).stem)
    _refuse(reference, wrong)
    title, description = (str(given.get(key) or "").strip() for key in ("title", "description"))
    made = Comparison(name, title or f"Comparison {name}", description, chosen, base, tuple(rows), ablations)
    _check_rows(made, reference)
    return made


def check_methods(comparison: Comparison, reference: str) -> None:
    """Hold each row against its method's configuration; imports PEFT.

    Args:
        comparison: What `load_comparison` has read.
        reference: Its file or name, for messages.

    Raises:
        ConfigError: Lists the settings that a method does not have, or refuses.
    """
    from pica.experiments.methods import configuration

    def check(row: Row) -> None:
        configuration(comparison.recipe(row, comparison.seeds[0], row.learning_rates).adapter)

    _check_each(comparison, reference, check)


def dump_comparison(comparison: Comparison) -> str:
    """The comparison as YAML that `load_comparison` reads back to an equal one."""
    base: dict[str, Any] = {}
    for key, value in comparison.base.items():
        section, dot, name = key.partition(".")
        if dot:
            base.setdefault(section, {})[name] = value
        else:
            base[key] = value
    content = {
        "name": comparison.name,
        "title": comparison.title,
        "description": comparison.description,
        "seeds": list(comparison.seeds),
        "base": base,
        "methods": [
            {"label": row.label, "adapter": dict(row.adapter), "learning_rates": list(row.learning_rates)}
            for row in comparison.rows
        ],
        "ablations": [
            {"title": group.title, "question": group.question, "methods": list(group.labels)}
            for group in comparison.ablations
        ],
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110)


def _base(given: Any, wrong: list[str]) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        wrong.append(f"base: expected the sections of a recipe, found {given!r}.")
        return {}
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key in section_names() and isinstance(value, dict):
            values |= {f"{key}.{name}": inner for name, inner in value.items()}
        elif not (key in section_names() and value is None):
            values[str(key)] = value
    taken = ("trainer.seed", "trainer.learning_rate", "trainer.learning_rates", "output")
    wrong += [f"base: {key} is decided for each cell; use seeds and learning_rates." for key in taken if key in values]
    wrong += ["base: a comparison has rows instead of a baseline."] * any(key.startswith("baseline") for key in values)
    return values


def _rows(given: Any, grid: tuple[float, ...], wrong: list[str]) -> list[Row]:
    if not isinstance(given, list) or not given:
        wrong.append("methods: expected a list of at least one method.")
        return []
    rows = []
    for number, entry in enumerate(given, start=1):
        place = f"methods, entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("label"), str) or not entry["label"].strip():
            wrong.append(f"{place}: expected a mapping with a label, found {entry!r}.")
            continue
        place = f"methods, {entry['label']!r}"
        wrong += [
            f"{place}: no such field {key!r}; a method has {', '.join(_ROW)}." for key in entry if key not in _ROW
        ]
        adapter = entry.get("adapter") or {}
        if not isinstance(adapter, dict):
            wrong.append(f"{place}: adapter: expected fields below it, found {adapter!r}.")
            adapter = {}
        rates = _rates(entry["learning_rates"], place, wrong) if "learning_rates" in entry else grid
        if not rates and "learning_rates" not in entry:
            wrong.append(f"{place}: no learning_rates, and the comparison has none for all methods.")
        rows.append(Row(entry["label"].strip(), adapter, rates))
    return rows


def _rates(given: Any, place: str, wrong: list[str]) -> tuple[float, ...]:
    try:  # YAML reads 1e-3 as text
        rates = tuple(float(rate) for rate in given)
    except (TypeError, ValueError):
        wrong.append(f"{place}: learning_rates: expected a list of numbers, found {given!r}.")
        return ()
    if not rates or not all(0 < rate < math.inf for rate in rates):
        wrong.append(f"{place}: learning_rates: expected numbers above 0, found {given!r}.")
        return ()
    return tuple(sorted(set(rates)))


def _seeds(given: Any, wrong: list[str]) -> tuple[int, ...]:
    if not isinstance(given, list) or not given or not all(type(seed) is int and seed >= 0 for seed in given):
        wrong.append(f"seeds: expected a list of whole numbers, found {given!r}.")
        return ()
    return tuple(given)


def _ablations(given: Any, labels: Sequence[str], wrong: list[str]) -> tuple[Ablation, ...]:
    groups = []
    for number, entry in enumerate(given if isinstance(given, list) else [given], start=1):
        if not isinstance(entry, dict) or set(entry) - set(_ABLATION) or not isinstance(entry.get("methods"), list):
            wrong.append(f"ablations, entry {number}: expected title, question and a list of methods.")
            continue
        members = tuple(map(str, entry["methods"]))
        unknown = [label for label in members if label not in labels]
        wrong += [f"ablations, entry {number}: {label!r} is no method's label." for label in unknown]
        groups.append(Ablation(str(entry.get("title") or ""), str(entry.get("question") or ""), members))
    return tuple(groups)


def _check_rows(made: Comparison, reference: str) -> None:
    """Every row's recipe; what the rows share is said once."""
    try:
        made.recipe(Row("", {}, (1.0,)), made.seeds[0], (1.0,))
    except ConfigError as error:  # what is wrong with every row
        _refuse(reference, _lines(error))
    _check_each(made, reference, lambda row: made.recipe(row, made.seeds[0], row.learning_rates))


def _check_each(made: Comparison, reference: str, check: Callable[[Row], object]) -> None:
    wrong = []
    for row in made.rows:
        try:
            check(row)
        except ConfigError as error:
            wrong += [f"{row.label}: {line}" for line in _lines(error)]
    _refuse(reference, wrong)


def _lines(error: ConfigError) -> list[str]:
    """The problems that a recipe's error lists."""
    first, *rest = str(error).removeprefix("The recipe: ").splitlines()
    listed = [first, *rest] if first.startswith("- ") else rest or [first]
    return [line.removeprefix("- ") for line in listed]


def _refuse(reference: str, wrong: Sequence[str]) -> None:
    if len(wrong) == 1:
        raise ConfigError(f"Comparison {reference!r}: {wrong[0]}")
    if wrong:
        raise ConfigError(
            f"Comparison {reference!r} has {len(wrong)} problems:\n" + "\n".join(f"- {text}" for text in wrong)
        )
