"""What an adapter asks of one layer's basis, as a value."""

from __future__ import annotations

from dataclasses import dataclass

from pica.basis.spectral import WantedSide


@dataclass(frozen=True)
class BasisRequest:
    """What is wanted of one weight; the arguments of `solve_basis` as a value.

    `checkpoint` and `tensor` name the weight where it is not the layer's own: see `pica.basis.checkpoint`. `file` and its
    `digest` name a basis file that holds the directions (see `pica.basis.file`), under the name `tensor`. With `input_side`
    all of it is of the weight's transpose: directions of the layer's output, (rank, out).
    """

    name: str
    rank: int
    projection: str = "principal"
    side: WantedSide = "auto"
    seed: int = 0
    checkpoint: str | None = None
    tensor: str = ""
    file: str | None = None
    digest: str = ""
    input_side: bool = False
