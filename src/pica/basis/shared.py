"""Bases that runs have made from data, kept in the cache for the next run with the same model, text and settings."""

from __future__ import annotations

import logging
import shutil

from pica.basis.cache import cache_limit, make_room, note_use, shared_folder
from pica.basis.file import BasisFile, open_basis
from pica.errors import ConfigError
from pica.files.folders import atomic_file
from pica.text import first_line

logger = logging.getLogger(__name__)


def kept(key: str) -> BasisFile | None:
    """Find a basis that was made before.

    Args:
        key: A digest of the model, text and settings that it was made from.

    Returns:
        The basis, or None.

    Raises:
        ConfigError: As `cache_limit`, before anything is made that could not be kept.
    """
    cache_limit()
    folder = shared_folder()
    for path in sorted(folder.glob(f"{key[:32]}-*.safetensors")) if folder is not None else ():
        note_use(path)
        try:
            return open_basis(path)
        except (ConfigError, OSError) as error:
            logger.warning("%s in the cache cannot be used (%s); the basis is made again", path, first_line(error))
    return None


def keep(key: str, basis: BasisFile) -> None:
    """Put a copy of a basis into the cache, where `kept` finds it; a cache that cannot be written to is noted.

    Args:
        key: As `kept`.
        basis: One that is larger than the cache may be is not kept.
    """
    folder, limit = shared_folder(), cache_limit()
    if folder is None or (size := basis.path.stat().st_size) > limit:
        return
    path = folder / f"{key[:32]}-{basis.digest[:32]}.safetensors"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_file(path) as partial:
            shutil.copyfile(basis.path, partial)
        make_room(folder.parent, size, limit)
    except OSError as error:
        logger.warning("Basis %s cannot be kept in the cache (%s)", basis.path, error)
