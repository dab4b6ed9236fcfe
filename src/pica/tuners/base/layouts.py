"""How adapters lie on a model's layers, found once for each adapter, so that a batch of many need not look at each layer.

Adapters that were made alike (of one rank, on the same layers, sharing alike) have one layout between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NamedTuple, TypeVar

V = TypeVar("V")


class Place(NamedTuple):
    """An adapter in one layer: the key of its basis, the group of its matrix, and how many directions it has there."""

    key: str
    group: str
    rank: int


class Layout:
    """{path of a layer: Place} of some adapters; two with the same places are one object."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self.place = places.get


class Layouts:
    """The layouts of a bank's adapters. A copy of the bank, or a saved one, begins with none."""

    def __init__(self) -> None:
        self._of: dict[str, Layout] = {}
        self._known: dict[tuple, Layout] = {}

    def of(self, name: str, layers: Mapping[str, Any]) -> Layout:
        """The layout of adapter `name` on `layers`, {path: layer}, all layers that have it."""
        if name not in self._of:
            places = {path: layer.method.place_of(name) for path, layer in layers.items() if name in layer.group_of}
            self._of[name] = self._known.setdefault(tuple(places.items()), Layout(places))
        return self._of[name]

    def forget(self, name: str) -> None:
        """Something about adapter `name` has changed in some layer."""
        self._of.pop(name, None)

    def clear(self) -> None:
        """Something has changed that may concern any adapter."""
        self._of.clear()
        self._known.clear()

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return Layouts, ()


class Observed(dict[str, V]):
    """A dict that tells which of its keys changes; copied and pickled without telling."""

    _changed: Callable[[str], Any] | None = None

    @classmethod
    def by(cls, changed: Callable[[str], Any]) -> Observed[V]:
        """An empty one, whose changes are told to `changed`."""
        made = cls()
        made._changed = changed
        return made

    def __setitem__(self, key: str, value: V) -> None:
        super().__setitem__(key, value)
        if self._changed is not None:
            self._changed(key)

    def __delitem__(self, key: str) -> None:
        super().__delitem__(key)
        if self._changed is not None:
            self._changed(key)

    def pop(self, key: str, *default: Any) -> Any:
        if key not in self:
            return super().pop(key, *default)
        value = self[key]
        del self[key]
        return value

    # by way of those
    popitem = MutableMapping.popitem
    clear = MutableMapping.clear
    update = MutableMapping.update
    setdefault = MutableMapping.setdefault

    def __reduce__(self) -> tuple[Any, ...]:
        return Observed, (dict(self),), {"_changed": self._changed}
