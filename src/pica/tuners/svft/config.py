"""`SvftConfig`: what an SVFT adapter is, in PEFT's form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pica.tuners.base.config import BankedConfig
from pica.tuners.svft.settings import SvftSettings


@dataclass
class SvftConfig(SvftSettings, BankedConfig):
    """Configuration of SVFT: a frozen weight W = U S V^T (out, in) becomes U (S + T) V^T.

    U, S and V are frozen; T (n, n), n = min(out, in), is sparse, starts at zero and is all that is trained. With d
    off-diagonals it has n (2d + 1) - d (d + 1) entries. Fields not listed here are PEFT's own; each field's help text is
    in its metadata.

    Raises:
        ConfigError: a value is out of range; the message lists every such value.
    """

    method: ClassVar[str] = "SVFT"

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
