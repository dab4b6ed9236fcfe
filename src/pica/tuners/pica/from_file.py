"""Bases that a configuration names as a file: which file, what its layers are called, and each layer's directions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pica.basis import CALIBRATED, Basis, BasisRequest
from pica.basis.checkpoint import renaming
from pica.basis.file import BasisFile, find_basis, holds_basis, open_basis
from pica.errors import ConfigError
from pica.tuners.base.layer import SharedLayer

if TYPE_CHECKING:
    from pica.tuners.pica.config import PicaConfig

FROM_FILE = "file"  # the solver of a basis that was not solved here


def named_basis(config: PicaConfig, *, needed: bool) -> BasisFile | None:
    """The basis that a configuration names; None where it names none, and its bases come from weights.

    The configuration then also names it by its digest.

    Args:
        config: Of the adapter that is being added.
        needed: Whether the adapter cannot do without; one that brings its basis can.

    Returns:
        The file, open for reading.

    Raises:
        ConfigError: It is not to be found, is another one, or does not have what the adapter asks for.
    """
    calibrated = config.projection in CALIBRATED
    if not (calibrated or config.basis_digest or holds_basis(config.basis_from)):
        return None
    if not (config.basis_from or config.basis_digest):
        if not needed:
            return None
        raise ConfigError(
            f"projection={config.projection!r} looks at data, so that the base model's weights do not give it: make a basis "
            f"with `pica basis MODEL -o DIR --projection {config.projection}` (pica.make_basis), and name its folder in "
            "basis_from."
        )
    try:
        found = find_basis(config.basis_from, config.basis_digest, config.found_in)
    except ConfigError:
        if needed:
            raise
        return None
    if found.about.projection != config.projection:
        raise ConfigError(
            f"{found} holds {found.about.projection!r} directions, and the adapter has projection={config.projection!r}; "
            "set the one or name another basis."
        )
    if (most := max([config.r, *config.rank_pattern.values()])) > found.about.rank:
        raise ConfigError(
            f"{found} has {found.about.rank} directions a layer, and the adapter asks for {most}; set r lower, or make a "
            f"basis with `pica basis --r {most}`."
        )
    config.basis_digest = found.digest
    return found


def names_in(basis: BasisFile, paths: Sequence[str]) -> dict[str, str]:
    """What each layer is called in the basis: a model with a head has another prefix than its body alone."""
    name_of = renaming(paths, basis.layers)
    return {path: name_of(path) for path in paths}


def basis_from_file(layer: SharedLayer, request: BasisRequest) -> Basis:
    """The directions of one layer, held against its weight where that is here.

    Args:
        layer: The layer.
        request: What was asked for, of which file.

    Returns:
        On side "in": what W makes of these directions says nothing of the input's other ones.

    Raises:
        ConfigError: The file has none for this layer, or was made for another weight.
    """
    assert request.file is not None
    file = open_basis(Path(request.file))
    if not layer.frozen.is_deferred():
        file.check_weight(request.tensor, layer.frozen.read(), quantised=layer.frozen.quantised)
    rows = file.rows(request.tensor, request.rank, layer.out_features if request.input_side else layer.in_features)
    gains = file.gains(request.tensor, request.rank)
    return Basis(rows, "in", gains, request.projection, FROM_FILE)
