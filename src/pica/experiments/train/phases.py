"""Results of a run's finished phases, kept in a file until the run is complete."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pica.errors import OutputError
from pica.experiments import distributed
from pica.experiments.results.documents import from_document, to_document
from pica.files import output as files
from pica.files.documents import DocumentError

T = TypeVar("T")


class Phases:
    """Results by the name of their phase."""

    def __init__(self, path: Path, *, read: bool) -> None:
        """Args: path: the file; read: whether to take what is in it.

        Raises:
            OutputError: It is damaged.
        """
        self._path, self._results = path, dict[str, Any]()
        if read and path.is_file():
            try:
                self._results = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                raise self._damaged() from None

    def __contains__(self, name: str) -> bool:
        return name in self._results

    def names(self) -> list[str]:
        """Of all phases that are noted, in the order of noting."""
        return list(self._results)

    def read(self, name: str, kind: type[T]) -> T:
        """Read the noted result of a phase.

        Returns:
            The result, of this kind.
        Raises:
            OutputError: What is noted is none of this kind.
        """
        try:
            return from_document(kind, self._results[name])
        except DocumentError as error:
            raise self._damaged(f" ({name}: {error})") from None

    def done(self, name: str, make: Callable[[], T], kind: type[T]) -> T:
        """Note the result of a phase, which the first process makes, and return it in all of them."""
        # It is the same before and after a resume: as JSON holds it, None for what is no number.
        self._results[name] = distributed.in_first(lambda: to_document(make()))
        if distributed.leads():
            files.write_json(self._path, self._results)
        return self.read(name, kind)

    def forget(self, name: str) -> None:
        """Have a phase done anew when the run goes on. For the first process, at the end of the others."""
        self._results.pop(name, None)
        files.write_json(self._path, self._results)

    def _damaged(self, how: str = "") -> OutputError:
        return OutputError(f"{str(self._path)!r} is damaged{how}; start the run again with --overwrite.")
