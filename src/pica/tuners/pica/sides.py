"""On which side of a layer its trained matrix is: its output's, as in the paper, or with gradient directions its input's.

Layers that read the residual stream are given vectors that mean the same in every block, so with directions of the gradient
they share N in y += U N x; layers that write into it share M in y += M P x, as what they give means the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from pica.errors import ConfigError
from pica.tuners.base.matching import matches

if TYPE_CHECKING:
    from pica.tuners.pica.config import PicaConfig

WRITERS = frozenset({"o", "o_proj", "out", "out_proj", "out_lin", "output", "to_out", "wo", "c_proj", "dense", "proj"})
"""Components of the names of layers that write into the residual stream although they are as wide on both sides."""


def readers(shapes: Mapping[str, tuple[int, int]]) -> set[str]:
    """Layers that read the residual stream, by their shapes, and where these leave it open by their names.

    The stream is as wide as most of the layers are on one side or the other; of several such widths it is the smallest.

    Args:
        shapes: (out, in) by path.

    Returns:
        Their paths.
    """
    widths = Counter(width for shape in shapes.values() for width in set(shape))
    stream = min(widths, key=lambda width: (-widths[width], width), default=0)

    def reads(path: str, out_features: int, in_features: int) -> bool:
        if in_features != stream:
            return False
        return out_features != stream or not WRITERS.intersection(path.split(".")[-2:])

    return {path for path, shape in shapes.items() if reads(path, *shape)}


def input_side_of(config: PicaConfig, shapes: Mapping[str, tuple[int, int]], made: set[str] | None = None) -> set[str]:
    """Layers whose trained matrix is on the side of their input.

    Args:
        config: Of the adapter.
        shapes: (out, in) of the layers, by path.
        made: What its basis file says, where there is one.

    Returns:
        Their paths; none but with gradient directions.

    Raises:
        ConfigError: `input_side` names other layers than the file, or none.
    """
    if config.projection != "gradient":
        return set()
    if config.input_side is None:
        return readers(shapes) if made is None else made
    found = {name: {path for path in shapes if matches(name, path, what="input_side")} for name in config.input_side}
    if idle := [name for name, hits in found.items() if not hits]:
        raise ConfigError(f"input_side: {', '.join(map(repr, idle))} matches no adapted layer; correct or remove it.")
    asked = set[str]().union(*found.values())
    if made is not None and asked != made:
        raise ConfigError(
            f"input_side={sorted(config.input_side)!r} and the basis differ on {min(asked ^ made)}; leave input_side out, "
            "or make a basis with these."
        )
    return asked


def short_names(chosen: Collection[str], paths: Collection[str]) -> list[str]:
    """Ends of the chosen layers' paths, as short as tells them from the others."""
    others = [path.split(".") for path in paths if path not in chosen]

    def name_of(path: str) -> str:
        parts = path.split(".")
        for count in range(1, len(parts)):
            if not any(other[-count:] == parts[-count:] for other in others):
                return ".".join(parts[-count:])
        return path

    return sorted({name_of(path) for path in chosen})
