"""The folder that a result is made in: the one that it is for, or one beside while that holds another result."""

import os
import shutil
from pathlib import Path

from pica.errors import OutputError
from pica.files.folders import flush_all, put_in_place, translated_write_errors


class Place:
    """Where a run or an analysis is written, so that what is finished is only replaced by what is finished, in one step.

    That is the output folder itself as long as nothing finished is in it, else a hidden folder beside it. To be used inside
    `pica.files.claims.claimed`.

    Attributes:
        target: The output folder.
        folder: What to write into.
    """

    def __init__(self, target: Path, finished: str) -> None:
        """Find the folder, after putting right what a kill between the last steps may have left.

        Args:
            target: The output folder.
            finished: Name of the file that is written last, and so marks what is complete.
        Raises:
            OutputError: It cannot be put right.
        """
        self.target, self._finished = target, finished
        self._real = Path(os.path.realpath(target.expanduser()))
        self._beside = self._real.parent / f".{self._real.name}.unfinished"
        if (self._beside / finished).is_file():
            new, old = (folder / finished for folder in (self._beside, self._real))
            if old.is_file() and old.stat().st_mtime_ns > new.stat().st_mtime_ns:  # they have changed places already
                shutil.rmtree(self._beside, ignore_errors=True)
            else:
                self.done()
        replaces = (self._real / finished).is_file()
        self.folder = self._beside if replaces or self._begun() else target

    @property
    def complete(self) -> bool:
        """Whether the output folder holds something finished, and nothing has been begun to replace it."""
        return (self._real / self._finished).is_file() and not self._begun()

    def check(self, *, overwrite: bool) -> None:
        """Raise `OutputError` where what is there cannot be replaced, or what was begun must not be thrown away."""
        if self.folder != self._beside:
            return
        if self._begun() and not overwrite:
            raise OutputError(
                f"{str(self.target)!r} is to be replaced by what was begun with --overwrite and then interrupted; go on "
                "with that, or begin again with --overwrite."
            )
        if os.path.ismount(self._real):
            raise OutputError(
                f"{str(self.target)!r} is a mounted file system, so that the result in it cannot be replaced in one step; "
                "choose another folder with --output."
            )

    def done(self) -> None:
        """Give the output folder's name to what is complete; what had it is removed.

        Raises:
            OutputError: That failed; both are there as they were.
        """
        if self._beside.is_dir():
            with translated_write_errors(self.target):
                flush_all(self._beside)
                put_in_place(self._beside, self._real)

    def _begun(self) -> bool:
        return self._beside.is_dir() and any(self._beside.iterdir())
