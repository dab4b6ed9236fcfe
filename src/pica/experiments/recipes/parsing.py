"""From a YAML file and command-line overrides to a checked `Recipe`, with every problem reported at once.

jsonargparse knows the types and writes the help. It stops at the first mistake, so each value is put to it alone and the
mistakes are collected.
"""

import copy
import dataclasses
import re
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from pica.errors import ConfigError
from pica.experiments.recipes.checks import problems
from pica.experiments.recipes.recipe import Recipe
from pica.files.documents import parse_yaml, text_problem, yaml_problem
from pica.tasks.records import class_name

_SECTIONS = {field.name: field.type for field in dataclasses.fields(Recipe) if dataclasses.is_dataclass(field.type)}


def option_parser(program: str) -> ArgumentParser:
    """A parser with one option for each field of a recipe; used for its types and its help text."""
    # Help comes from the text under each field, so that it is written once.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=program, exit_on_error=False, default_env=False)
    parser.add_class_arguments(Recipe)
    return parser


@cache
def field_help() -> dict[str, str]:
    """The help of every field and every section, by its dotted name."""
    found = {action.dest: " ".join(str(action.help).split()) for action in option_parser("pica")._actions}
    found |= {name: field.metadata["help"] for name, field in recipe_fields().items() if "help" in field.metadata}
    return found | {name: str(section.__doc__).partition("\n")[0] for name, section in _SECTIONS.items()}


def section_names() -> tuple[str, ...]:
    """Names of a recipe's sections."""
    return tuple(_SECTIONS)


def builtin_recipes() -> dict[str, str]:
    """Name and text of each recipe inside the package."""
    folder = resources.files("pica") / "assets" / "recipes"
    found = {entry.name.removesuffix(".yaml"): entry for entry in folder.iterdir() if entry.name.endswith(".yaml")}
    return {name: found[name].read_text(encoding="utf-8") for name in sorted(found)}


def load_recipe(reference: str | None, overrides: Sequence[tuple[str, Any]] = ()) -> Recipe:
    """Read a recipe, apply overrides, and check everything.

    Args:
        reference: Path of a YAML file, or the name of a built-in recipe; None gives all defaults.
        overrides: (dotted field, value) pairs; text is read as on the command line. Later ones win.
    Returns:
        The recipe.
    Raises:
        ConfigError: Lists all problems: unknown fields, wrong types, values out of range, files that do not exist.
    """
    name, given = "the command line", {}
    if reference is not None:
        name, given = repr(reference), read_named("Recipe", reference, builtin_recipes(), "sections such as 'model:'")
    values, mistakes = _flatten(given)
    for key, value in overrides:
        if mistake := _unknown(key):
            mistakes.append(mistake)
        else:
            values[key] = value
    recipe, wrong = _typed(values)
    mistakes += wrong
    # Fields of the wrong type kept their defaults, so what is said here about the others holds all the same.
    blamed = {_subject(text) for text in wrong}
    mistakes += [text for text in problems(recipe) if _subject(text) not in blamed]
    if mistakes:
        source = f"Recipe {name}" if reference is not None else "The recipe"
        if len(mistakes) == 1:
            raise ConfigError(f"{source}: {mistakes[0]}")
        raise ConfigError(f"{source} has {len(mistakes)} problems:\n" + "\n".join(f"- {text}" for text in mistakes))
    return recipe


def recorded_recipe(path: Path) -> Recipe:
    """Read the recipe of an earlier run; nothing is asked of its places.

    Data and models may have moved since, and what is recorded (the classes, how the base was quantised) holds all the same.

    Returns:
        The recipe, as far as this version knows its fields.
    Raises:
        ConfigError: The file cannot be read.
    """
    values, _ = _flatten(read_named("Recipe", str(path), {}, "sections such as 'model:'"))
    return _typed(values)[0]


def read_field(key: str, value: Any) -> Any:
    """A field's value, given as text or as YAML has it; its default where it is none of its type."""
    section, _, name = key.rpartition(".")
    recipe, _ = _typed({key: value})
    return getattr(getattr(recipe, section) if section else recipe, name)


def change_recipe(recipe: Recipe, overrides: Sequence[tuple[str, Any]]) -> Recipe:
    """Change some fields of a checked recipe.

    Returns:
        A copy, checked again.
    Raises:
        ConfigError: As `load_recipe`.
    """
    mistakes = [mistake for key, _ in overrides if (mistake := _unknown(key))]
    changed, wrong = _typed({key: value for key, value in overrides if not _unknown(key)}, copy.deepcopy(recipe))
    blamed = {_subject(text) for text in wrong}
    mistakes += wrong + [text for text in problems(changed) if _subject(text) not in blamed]
    if mistakes:
        raise ConfigError(mistakes[0] if len(mistakes) == 1 else "\n".join(f"- {text}" for text in mistakes))
    return changed


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every field, which `load_recipe` reads back to an equal recipe."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True, width=110)


def read_named(what: str, reference: str, builtin: Mapping[str, str], wanted: str) -> dict[str, Any]:
    """Read a YAML file, or a built-in one.

    Args:
        what: What it is, for messages: "Recipe".
        reference: A file's path, or a name in `builtin`.
        builtin: {name: text}.
        wanted: What its fields look like, for messages.
    Returns:
        Its top-level mapping.
    Raises:
        ConfigError: It is neither, cannot be read, or holds no mapping.
    """
    path = Path(reference).expanduser()
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{what} {reference!r} cannot be read: {error}.") from None
    elif reference in builtin:
        text = builtin[reference]
    else:
        near = get_close_matches(reference, builtin, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"{what} {reference!r} is neither a file nor built in. {hint}Built in: {', '.join(builtin)}.")
    try:
        given = parse_yaml(text)
    except yaml.YAMLError as error:
        where, problem = yaml_problem(error)
        raise ConfigError(f"{what} {reference!r}{where}: not valid YAML, {problem}.") from None
    if given is None:
        raise ConfigError(f"{what} {reference!r} is empty.")
    if not isinstance(given, dict):
        raise ConfigError(f"{what} {reference!r}: expected {wanted}, found {type(given).__name__}.")
    return given


def _flatten(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Dotted fields with their raw values, and the fields that no recipe has."""
    values: dict[str, Any] = {}
    mistakes: list[str] = []
    for key, value in given.items():
        if key in _SECTIONS:
            if value is None:  # a section whose fields are all commented out
                continue
            if not isinstance(value, dict):
                mistakes.append(f"{key}: expected fields below it, found {value!r}.")
                continue
            pairs = [(f"{key}.{name}", inner) for name, inner in value.items()]
        else:
            pairs = [(str(key), value)]
        for dotted, inner in pairs:
            if mistake := _unknown(dotted):
                mistakes.append(mistake)
            else:
                values[dotted] = inner
    return values, mistakes


def recipe_fields() -> dict[str, dataclasses.Field]:
    """All fields of a recipe that hold a value, by their dotted name."""
    fields = {}
    for top in dataclasses.fields(Recipe):
        section = _SECTIONS.get(top.name)
        if section is None:
            fields[top.name] = top
        else:
            fields |= {f"{top.name}.{inner.name}": inner for inner in dataclasses.fields(section)}  # pyright: ignore[reportArgumentType]
    return fields


def _unknown(key: str) -> str | None:
    known = recipe_fields()
    if key in known:
        return None
    if key in _SECTIONS:
        return f"{key}: is a section; set one of its fields, for instance {key}.{next(iter(_inner(key)))}."
    section, _, name = key.rpartition(".")
    initials = {"".join(word[0] for word in inner.split("_")): inner for inner in reversed(_inner(section))}
    near = get_close_matches(key, known, n=1, cutoff=0.75)
    near = [f"{section}.{initials[name]}"] if name in initials else near
    hint = f"; did you mean {near[0]}?" if near else f"; its fields are {', '.join(_inner(section))}."
    return f"{key}: no such field{hint}"


def _inner(section: str) -> list[str]:
    """Field names of a section; those of the top level for "" and for what is no section."""
    if section not in _SECTIONS:
        return [field.name for field in dataclasses.fields(Recipe)]
    return [key.partition(".")[2] for key in recipe_fields() if key.startswith(f"{section}.")]


@cache
def _reader(annotation: Any) -> ArgumentParser:
    """A parser of one value of a type. That of a whole recipe takes a hundred times as long for each value."""
    parser = ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_argument("--value", type=annotation)
    return parser


def _typed(values: Mapping[str, Any], recipe: Recipe | None = None) -> tuple[Recipe, list[str]]:
    """A recipe (or the given one) with those values that have the right type, and a sentence for each of the others."""
    fields = recipe_fields()
    recipe, mistakes = recipe or Recipe(), []
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        optional = type(None) in get_args(fields[key].type)
        if value is None and not optional:
            mistakes.append(f"{key}: has no value; give one or remove the line.")
            continue
        if trouble := text_problem(value):
            mistakes.append(f"{key}: {trouble}.")
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = _as_names(value) if name in ("labels", "columns") else value
                parsed = _reader(fields[key].type).parse_object({"value": value})
        except (ArgumentError, TypeError, ValueError, RecursionError):
            mistakes.append(f"{key} = {value!r}: must be {type_in_words(fields[key].type)}.")
            continue
        setattr(getattr(recipe, section) if section else recipe, name, parsed["value"])
    return recipe, mistakes


def _as_names(value: Any) -> Any:
    """Classes or columns, given as YAML or as text of it, with the numbers and truth values among them as their names."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            return value  # its type is wrong, and said to be
    if isinstance(value, list):
        return [class_name(each) if isinstance(each, (bool, int, float)) else each for each in value]
    if isinstance(value, dict):
        return {key: _as_names(each) if isinstance(each, dict) else _as_names([each])[0] for key, each in value.items()}
    return value


def _subject(mistake: str) -> str:
    """The field that a sentence about a mistake begins with."""
    return re.split(r"[\s:=]", mistake, maxsplit=1)[0]


_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def type_in_words(annotation: Any) -> str:
    """A field's type, as a person would say it."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    if annotation in words:
        return words[annotation]
    text, arguments = str(annotation), get_args(annotation)
    if text.startswith("typing.Literal"):
        return "one of " + ", ".join(map(str, arguments))
    if get_origin(annotation) is list:
        return f"a list of {_PLURALS[arguments[0]]}"
    if annotation == dict[str, Any]:
        return "a mapping"
    if get_origin(annotation) is dict:
        kept = type_in_words(arguments[1])
        return f"a mapping of {type_in_words(arguments[0])} to {f'({kept})' if ' or ' in kept else kept}"
    return " or ".join(type_in_words(argument) for argument in arguments)
