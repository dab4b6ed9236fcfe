"""The versions of PyTorch, PEFT and transformers that this version of pica works with, and what of its needs is installed.

pyproject.toml declares the same ranges, which pip keeps; this is for environments where something else was installed
later. Outside of a range things go wrong in silence: the loaders of transformers before 5.6 hand out the base model for
an adapter's folder. A test holds the two together, and .ci/run tests both ends. Nothing here imports what it looks up.
"""

from __future__ import annotations

import functools
import re
import sys
from importlib import metadata

from pica._version import __version__
from pica.errors import VersionError

# The first version that works, and the first that is not known to.
HOSTS = {"torch": ("2.6", "2.15"), "peft": ("0.21.2", "0.22"), "transformers": ("5.6", "5.24")}


@functools.cache
def check_hosts() -> None:
    """Refuse to work with a version that was never tried.

    Raises:
        VersionError: one of `HOSTS` is installed in a version outside of its range.
    """
    wrong = {name: version for name in HOSTS if not fits(name, version := installed(name))}
    if wrong:
        found = " and ".join(f"{name} {version}" for name, version in wrong.items())
        ranges = [f"{name}{declared(name)}" for name in wrong]
        raise VersionError(
            f"{found} {'is' if len(wrong) == 1 else 'are'} installed, and pica {__version__} works with "
            f"{' and '.join(ranges)} only; install that with: pip install {' '.join(map(repr, ranges))}"
        )


@functools.cache
def check_extra(extra: str, purpose: str) -> None:
    """Refuse to go on without the packages that one of our extras brings.

    Args:
        extra: Its name in pyproject.toml.
        purpose: What needs it, the beginning of the sentence.

    Raises:
        VersionError: A package of the extra is missing, or older than the extra asks for.
    """
    try:
        required = metadata.requires("pica-peft") or []
    except metadata.PackageNotFoundError:  # run from its source, without having been installed
        return
    from packaging.requirements import Requirement

    lacking = []
    for requirement in map(Requirement, required):
        if requirement.marker is None or not requirement.marker.evaluate({"extra": extra}):
            continue
        version = installed(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            lacking.append(requirement.name if version is None else f"{requirement.name} {requirement.specifier}")
    if lacking:
        raise VersionError(f"{purpose} needs {', '.join(lacking)}; install with: pip install 'pica-peft[{extra}]'")


def installed(name: str) -> str | None:
    """The version of a package that is in use: of the module where it is imported; None where none is to be found."""
    version = getattr(sys.modules.get(name), "__version__", None)
    if version is None:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            return None
    return str(version)


def declared(name: str) -> str:
    """The range of one of `HOSTS`, as pip reads it."""
    lowest, below = HOSTS[name]
    return f">={lowest},<{below}"


def fits(name: str, version: str | None) -> bool:
    """Ask whether a version is in the range of one of `HOSTS`.

    A development version of 5.24 has what 5.24 will have, and counts as it; what a builder appends does not count.

    Args:
        name: The package.
        version: As it is installed; None where it is not.
    Returns:
        Also True for a version that is not there, or not a number, of which there is nothing to complain here.
    """
    numbers = re.match(r"\d+(\.\d+)*", version or "")
    if numbers is None:
        return True
    lowest, below = HOSTS[name]
    return _numbers(lowest) <= _numbers(numbers.group()) < _numbers(below)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
