# pyright: strict
"""Results as JSON documents: one way to write any of them, to read it back, and to say what is in it.

A result is a dataclass. In its document a field that has a default is left out where it has that value, so that what was
not measured is not there; NaN and the infinities, which JSON has not, are null. A file of results has its format's version
beside the fields, under "format"; files from before there were versions have none. What earlier versions wrote otherwise
than today, a dataclass puts right in a validator of its own.
"""

import math
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, TypeVar, cast

from pydantic import BeforeValidator, TypeAdapter, ValidationError, WithJsonSchema, model_validator
from pydantic.json_schema import GenerateJsonSchema

from pica.files.documents import DocumentError, read_json
from pica.files.output import plain, write_json

Document = dict[str, Any]
"""What stands in a JSON file, or in a part of one."""

Number = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    WithJsonSchema({"type": ["number", "null"]}),
]
"""A float that may be NaN where it is not defined, and is null in a document then."""

_FORMAT = "format"
T = TypeVar("T")


class Result(Protocol):
    """A dataclass that has a file of its own."""

    FORMAT: ClassVar[int]
    """Version of its document; to be raised where an earlier reader would misunderstand a new document."""


R = TypeVar("R", bound=Result)


def to_document(value: object) -> Any:
    """A result, or a part of one, as JSON values."""
    return plain(_adapter(type(value)).dump_python(value, exclude_defaults=True, by_alias=True))


def from_document(kind: type[T], document: object) -> T:
    """The result, or part of one, that `to_document` has made a document of.

    Args:
        kind: What it is; a dataclass.
        document: JSON values. Keys that the dataclass does not have are passed over.
    Returns:
        The result.
    Raises:
        DocumentError: A field is missing, or holds what it cannot hold.
    """
    try:
        return _adapter(kind).validate_python(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise DocumentError(f"it lacks {place!r}") from None
        raise DocumentError(f"{place}: {first['msg']}" if place else first["msg"]) from None


def write_result(path: Path, result: Result) -> None:
    """Write a result's file, whole or not at all.

    Args:
        path: The file.
        result: What is written.
    Raises:
        OutputError: Writing failed.
    """
    write_json(path, result_document(result))


def result_document(result: Result) -> Document:
    """What `write_result` writes."""
    return {_FORMAT: result.FORMAT, **to_document(result)}


def read_result(kind: type[R], path: Path) -> R:
    """Read a file that `write_result`, or an earlier version of this package, has written.

    Args:
        kind: What it holds.
        path: The file.
    Returns:
        Its content.
    Raises:
        OSError: It cannot be read.
        DocumentError: It is no such file, is damaged, or comes from a later version.
    """
    document = read_json(path)
    try:
        return parse_result(kind, document)
    except DocumentError as error:
        raise DocumentError(f"{path}: {error}") from None


def parse_result(kind: type[R], document: object) -> R:
    """As `read_result`, for what stands in the file.

    Args:
        kind: What it is.
        document: JSON values.
    Returns:
        The result.
    Raises:
        DocumentError: As `read_result`.
    """
    if not isinstance(document, dict):
        raise DocumentError(f"it holds {type(document).__name__} where an object of fields should be")
    given = cast(Document, document)
    version = given.get(_FORMAT, kind.FORMAT)
    if not isinstance(version, int) or version > kind.FORMAT:
        raise DocumentError(f"its format is {version!r}, and this version of pica reads {kind.FORMAT}; upgrade pica")
    return from_document(kind, given)


def schema(kind: type[Result]) -> Document:
    """The JSON schema (draft 2020-12) of a result's file."""
    made = _adapter(kind).json_schema(schema_generator=_Schema)
    version = {"const": kind.FORMAT, "description": "Version of this format."}
    made["properties"] = {_FORMAT: version, **made["properties"]}
    made["required"] = [_FORMAT, *made["required"]]
    return {"$schema": GenerateJsonSchema.schema_dialect, **made}


class _Schema(GenerateJsonSchema):
    """Without the titles that pydantic makes up from the fields' names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


@cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(kind)


class Completed:
    """A dataclass that earlier versions wrote without some of the fields that it has today."""

    EARLIER: ClassVar[Document] = {}
    """What stands for such fields where they are missing."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, document: Any) -> Any:
        return cls.completed(cast(Document, document)) if isinstance(document, dict) else document

    @classmethod
    def completed(cls, document: Document) -> Document:
        """The document with all fields."""
        return {**cls.EARLIER, **document}


def flattened(document: Document, name: str) -> Document:
    """A document whose mapping `name` stands beside its other fields, not in a field of its own."""
    return {key: value for key, value in document.items() if key != name} | dict(document.get(name, {}))


def gathered(document: Document, name: str, fields: frozenset[str]) -> Document:
    """The reverse of `flattened`: numbers under keys that are none of `fields` are put into the mapping `name`."""
    inner = {key: value for key, value in document.items() if key not in fields and _is_number(value)}
    return {key: value for key, value in document.items() if key not in inner} | {name: inner}


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
