"""`PicaConfig`: what a PiCa adapter is, in PEFT's form."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pica.basis.file import holds_basis
from pica.tuners.base.config import BankedConfig
from pica.tuners.pica.settings import PicaSettings


@dataclass
class PicaConfig(PicaSettings, BankedConfig):
    """Configuration of PiCa: a frozen weight W (out, in) becomes W + M P.

    P (r, in) holds the top-r right singular directions of W, belongs to the layer and stays frozen; M (out, r) starts at
    zero, is all that is trained, and is shared by the layers of a group. Trainable parameters: the sum of r * out over
    groups. Other fields are PEFT's own; each field's help text is also in its metadata.

    Args:
        r: Rank, at least 1: directions of each layer's input that the update may use. Default 32.
        target_modules: Layers to adapt, as ends of their paths or one expression; by default those usual for the model.
        share: Which layers share a matrix: "role" (the paper), "none", a number k (each k consecutive layers of a role),
            or a mapping from expression to group name.
        projection: "principal" (the paper), "minor" or "random", the last two for ablations.
        projection_seed: Seed of projection="random".
        rank_pattern: Ranks that differ from r, by layer name or expression.
        target_parameters: Stacks of experts' weights to adapt, as ends of parameter paths.
        init_weights: Start at zero; False starts at random numbers, for tests.
        save_basis: Store P too. The file grows to the size of a LoRA of rank r, and loading solves nothing.
        basis_from: Folder or hub name of the unquantised checkpoint that P is taken from, for a quantised base.

    Raises:
        ConfigError: a value is out of range; the message lists every such value.
    """

    method: ClassVar[str] = "PICA"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.basis_from is not None and (
            Path(self.basis_from).expanduser().is_dir() or holds_basis(self.basis_from)
        ):
            self.basis_from = str(Path(self.basis_from).expanduser().resolve())  # found from anywhere

    def size_text(self) -> str:
        return f"r={self.r}"
