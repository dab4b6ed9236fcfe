"""Results of a run's finished phases, kept in a file until the run is complete."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pica.errors import OutputError
from pica.experiments import distributed
from pica.files import output as files


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
                raise OutputError(f"{str(path)!r} is damaged; start the run again with --overwrite.") from None

    def __contains__(self, name: str) -> bool:
        return name in self._results

    def __getitem__(self, name: str) -> Any:
        return self._results[name]

    def items(self) -> list[tuple[str, Any]]:
        """All that is noted, by its name, in the order of noting."""
        return list(self._results.items())

    def done(self, name: str, make: Callable[[], Any]) -> Any:
        """Note the result of a phase, which the first process makes, and return it in all of them.

        It is the same before and after a resume: as JSON holds it, None for what is no number.
        """
        self._results[name] = files.plain(distributed.in_first(make))
        if distributed.leads():
            files.write_json(self._path, self._results)
        return self._results[name]

    def forget(self, name: str) -> None:
        """Have a phase done anew when the run goes on. For the first process, at the end of the others."""
        self._results.pop(name, None)
        files.write_json(self._path, self._results)
