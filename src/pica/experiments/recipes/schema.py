"""Recipes and comparisons as JSON schemas, by which editors complete and check them while they are written."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pydantic import TypeAdapter

from pica.experiments.recipes.parsing import field_help
from pica.experiments.recipes.recipe import Recipe

Schema = dict[str, Any]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_RATES: Schema = {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}, "minItems": 1}
_TEXT: Schema = {"type": "string"}


def recipe_schema() -> Schema:
    """The JSON schema (draft 2020-12) of a recipe's file."""
    return {"$schema": _DIALECT, "title": "Recipe of pica train", **_dataclass(Recipe, "")}


def comparison_schema() -> Schema:
    """The JSON schema (draft 2020-12) of a comparison's file."""
    recipe = _dataclass(Recipe, "")
    adapter = recipe["properties"]["adapter"]
    row = _object({"label": _TEXT, "adapter": adapter, "learning_rates": _RATES}, required=["label"])
    ablation = _object({"title": _TEXT, "question": _TEXT, "methods": _list(_TEXT)}, required=["methods"])
    fields: Schema = {
        "name": {**_TEXT, "description": "What the comparison is called."},
        "title": {**_TEXT, "description": "Title of the report."},
        "description": {**_TEXT, "description": "Text below the title."},
        "seeds": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0},
            "description": "Each row is trained with all of them; the first chooses its learning rate.",
        },
        "learning_rates": {**_RATES, "description": "Rates to choose from, for rows that have none of their own."},
        "base": {**recipe, "description": "What all rows share: a recipe, without what the rows differ in."},
        "methods": {**_list(row), "minItems": 1, "description": "The rows."},
        "ablations": {**_list(ablation), "description": "Questions that some of the rows answer."},
    }
    return {"$schema": _DIALECT, "title": "Comparison of pica compare", **_object(fields, required=["methods"])}


def _object(properties: Schema, *, required: Sequence[str] = ()) -> Schema:
    made: Schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return made | ({"required": list(required)} if required else {})


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _dataclass(kind: Any, prefix: str) -> Schema:
    """A section, or the whole recipe, with the help and the default of each field."""
    texts, properties = field_help(), {}
    for found in dataclasses.fields(kind):
        annotation: Any = found.type
        name = f"{prefix}{found.name}"
        if dataclasses.is_dataclass(annotation):
            made = _dataclass(annotation, f"{found.name}.")
            made["type"] = ["object", "null"]  # a section whose fields are all commented out
        else:
            made = TypeAdapter(annotation).json_schema()
            if found.default is not dataclasses.MISSING:
                made = {**made, "default": found.default}
        properties[found.name] = {**made, "description": texts[name]}
    return _object(properties)
