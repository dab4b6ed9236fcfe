# pyright: strict
"""A screen of bases, as `pica plan` and `pica analyze` have it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TextRead:
    """Which text was read.

    Attributes:
        source: Its place.
        digest: Of all that was read; None where some of it was left out.
        tokens, sequences: How much.
        seed: Of the order of texts.
    """

    source: str
    digest: str | None = None
    tokens: int
    sequences: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class ScreenRow:
    """Layers of one role, or all.

    Attributes:
        role: "all" for all of them.
        layers: How many.
        chance: What random directions hold on average: r / in; of layers of several widths the mean that their energies
            weigh.
        shares: Of the layers' gradients' energy, pooled, by projection.
    """

    role: str
    layers: int
    chance: float
    shares: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Screen:
    """Cap, the share of the first gradient's energy that directions hold, by role and in all.

    Attributes:
        r: Directions a layer.
        gradient: Which text it is of.
        calibration: Which one `activation` and `weighted` directions are of; None where there are none.
        rows: One a role, the last of all layers.
        notes: What a reader should know.
    """

    r: int
    gradient: TextRead
    calibration: TextRead | None
    rows: Sequence[ScreenRow]
    notes: list[str]
