"""Field names of data files that differ from the ones a task knows."""

from collections.abc import Mapping, Set

from pica.errors import ConfigError


def renamed(fields: Mapping[str, tuple[str, ...]], columns: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Put the user's own column names in place of the usual ones.

    Args:
        fields: Field of the task to the names it usually has.
        columns: Field of the task to its name in the user's file.
    Returns:
        Field of the task to the names that are accepted for it.
    Raises:
        ConfigError: `columns` names a field that the task does not have.
    """
    if unknown := sorted(set(columns) - set(fields)):
        raise ConfigError(
            f"data.columns: {', '.join(map(repr, unknown))} is no field of this task; it has {', '.join(fields)}."
        )
    return {name: (columns[name],) if name in columns else usual for name, usual in fields.items()}


def header_names(fields: Mapping[str, tuple[str, ...]]) -> Set[str]:
    """Names by which a table's header is known: all accepted ones but the numbers that columns without a header have."""
    return {name for accepted in fields.values() for name in accepted if not name.isdecimal()}


def has_header(fields: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether tables need a header, since no field may be a column's number."""
    return not any(name.isdecimal() for accepted in fields.values() for name in accepted)
