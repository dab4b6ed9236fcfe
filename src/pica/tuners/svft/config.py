"""`SvftConfig`: what an SVFT adapter is, in PEFT's form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pica.tuners.base.config import BankedConfig
from pica.tuners.svft.pattern import PATTERNS


@dataclass
class SvftConfig(BankedConfig):
    """Configuration of SVFT: a frozen weight W = U S V^T (out, in) becomes U (S + T) V^T.

    U, S and V are frozen; T (n, n), n = min(out, in), is sparse, starts at zero and is all that is trained. With d
    off-diagonals it has n (2d + 1) - d (d + 1) entries. Fields not listed here are PEFT's own; each field's help text is
    in its metadata.

    Raises:
        ConfigError: a value is out of range; the message lists every such value.
    """

    method: ClassVar[str] = "SVFT"

    pattern: Literal["plain", "banded", "random", "top_k"] = field(
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
    share: str | int | dict[str, str] = field(
        default="none",
        metadata={
            "help": "Which layers share one T: 'none' (the paper: each has its own), 'role' (all layers whose path differs "
            "only in indices), a number k (each k consecutive layers of a role), or a mapping from regular expression to "
            "group name."
        },
    )

    @property
    def band(self) -> int:
        """Off-diagonals on each side that the number of entries follows from."""
        return self.off_diagonals or 0

    def size_text(self) -> str:
        return self.pattern if self.pattern == "plain" else f"{self.pattern}, off_diagonals={self.band}"

    def _own_problems(self) -> list[str]:
        found: list[str] = []
        if self.pattern not in PATTERNS:
            found.append(f"pattern={self.pattern!r} is unknown; use one of {', '.join(PATTERNS)}")
        elif self.off_diagonals is None and self.pattern != "plain":
            found.append(f"pattern={self.pattern!r} needs off_diagonals, for instance 16")
        elif self.off_diagonals and self.pattern == "plain":
            found.append(f"off_diagonals={self.off_diagonals} does not go with pattern='plain'; use 'banded'")
        if self.off_diagonals is not None and self.off_diagonals < 0:
            found.append(f"off_diagonals={self.off_diagonals} must be at least 0")
        return found
