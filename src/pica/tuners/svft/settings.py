"""The fields that only SVFT's configuration has, and what can be wrong with them. Imports no torch: recipes are quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

Pattern = Literal["plain", "banded", "random", "top_k"]


@dataclass
class SvftSettings:
    """SVFT's own fields; `SvftConfig` says what they are for. Each field's help text is in its metadata."""

    pattern: Pattern = field(
        default="plain",
        metadata={
            "help": "Which entries of T are trained: 'plain' (its diagonal), 'banded' (off_diagonals more on each side), "
            "'random' or 'top_k' (those whose singular vectors align most), the last two with as many entries as 'banded'."
        },
    )
    off_diagonals: int | None = field(
        default=None,
        metadata={
            "help": "Diagonals on each side of the main one, which decide the number of entries: 16 in the paper's language "
            "models, 2 in its classifiers. Required by every pattern but 'plain', which has none."
        },
    )
    pattern_seed: int = field(default=0, metadata={"help": "Seed of pattern='random'; no effect otherwise."})

    def own_problems(self) -> list[str]:
        """What is wrong with these fields."""
        found: list[str] = []
        if self.pattern not in get_args(Pattern):
            found.append(f"pattern={self.pattern!r} is unknown; use one of {', '.join(get_args(Pattern))}")
        elif self.off_diagonals is None and self.pattern != "plain":
            found.append(f"pattern={self.pattern!r} needs off_diagonals, for instance 16")
        elif self.off_diagonals and self.pattern == "plain":
            found.append(f"off_diagonals={self.off_diagonals} does not go with pattern='plain'; use 'banded'")
        if self.off_diagonals is not None and self.off_diagonals < 0:
            found.append(f"off_diagonals={self.off_diagonals} must be at least 0")
        return found
