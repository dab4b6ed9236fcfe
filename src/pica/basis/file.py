"""A basis as a file of its own: made once for a base model, shared by every adapter on it.

A basis that was made from a model's activations cannot be recomputed from its weights. So it is written once, and an adapter
names it by the digest of its bytes. The file is `basis.safetensors` with the directions P of each layer, a few numbers by
which a layer's weight is known again, and what the basis was made from. docs/adapter-format.md specifies it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated as Float
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pica.basis.cache import note_use, shared_folder
from pica.basis.checkpoint import is_hub_name
from pica.basis.fingerprint import splitmix64
from pica.errors import ConfigError, OutputError
from pica.files.folders import atomic_folder
from pica.text import first_line

logger = logging.getLogger(__name__)

NAME = "basis.safetensors"
FORMAT = 1
SAMPLES = 64
"""Entries of a layer's weight that are kept."""
_KEY = "pica_basis"
_ROWS, _GAINS, _SAMPLE = "rows:", "gains:", "weight:"
_ABOVE = 3  # folders above an adapter's own that may hold its run's basis
_ORTHOGONAL = 1e-3  # largest deviation of P P^T from the identity
# A sample of the weight may deviate by this much, relative to its norm. Rounding to bfloat16 gives 0.2%, int8 1%, NF4 9%;
# another model's weight 140%.
SAME, CLOSE, QUANTISED = 1e-2, 0.1, 0.6


@dataclass(frozen=True)
class About:
    """What a basis is, and what it was made from.

    Attributes:
        projection: One of `pica.basis.fingerprint.PROJECTION_CODES`.
        rank: Directions that were asked for; a layer may have fewer.
        base: The base model's name, for messages.
        revision: Its branch, tag or commit.
        calibration: Of which text: `source`, `digest` of its tokens, `tokens`, `sequences`, `seed`; empty where of none.
        seed: Of random directions, and of a wide layer's sketch.
        pica_version: Which version wrote it.
        same_rows: Layers whose rows are those of another one, which reads the same input.
        input_side: Layers whose directions are of their output, since the matrix that is trained reads their input.
    """

    projection: str
    rank: int
    base: str | None = None
    revision: str | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    pica_version: str = ""
    same_rows: Mapping[str, str] = field(default_factory=dict)
    input_side: Sequence[str] = ()


@dataclass(frozen=True)
class LayerRows:
    """One layer's part of a basis file.

    Attributes:
        rows: P, (k, in), orthonormal, float32; of a layer on the input's side U^T, (k, out).
        gains: |W p_i|, or |W^T u_i|, (k,), float32.
        sample: As `weight_sample` gives it.
    """

    rows: Float[Tensor, "k width"]
    gains: Float[Tensor, "k"]
    sample: Float[Tensor, "entries"]


def weight_sample(weight: Float[Tensor, "out in"]) -> Float[Tensor, "entries"]:
    """`SAMPLES` entries of a weight (out, in), spread over all of it, float32: the same places in every library."""
    places = splitmix64(np.arange(SAMPLES, dtype=np.uint64)) % np.uint64(weight.numel())
    rows, columns = (torch.from_numpy(v.astype(np.int64)) for v in np.divmod(places, np.uint64(weight.shape[1])))
    return weight.detach()[rows.to(weight.device), columns.to(weight.device)].to("cpu", torch.float32)


def write_basis(folder: Path, layers: Mapping[str, LayerRows], about: About, *, overwrite: bool = False) -> BasisFile:
    """Write a basis as a folder of its own, whole or not at all.

    Args:
        folder: New, or empty; one with a basis in it where `overwrite` says so.
        layers: By path in the base model.
        about: What it is; `same_rows` is found here.
        overwrite: Whether to replace a basis.

    Returns:
        The file, open for reading.

    Raises:
        OutputError: The folder is not to be had, or cannot be written.
    """
    check_free(folder, overwrite=overwrite)
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    first: dict[int, str] = {}
    for path, layer in layers.items():
        owner = first.setdefault(layer.rows.data_ptr(), path)
        if owner == path or layer.rows.numel() == 0:
            tensors[_ROWS + path] = layer.rows.contiguous().cpu()
        else:
            same[path] = owner
        # clones: of tied weights these may be the same tensors, which safetensors does not store twice
        tensors[_GAINS + path], tensors[_SAMPLE + path] = layer.gains.cpu().clone(), layer.sample.cpu().clone()
    content = {"format": FORMAT, **asdict(about), "same_rows": same}
    with atomic_folder(folder, replace=overwrite) as partial:
        save_file(tensors, partial / NAME, {_KEY: json.dumps(content, sort_keys=True)})
        (partial / "README.md").write_text(_card(about, len(layers)), encoding="utf-8")
    return open_basis(folder)


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Raise `OutputError` where a basis may not be written."""
    if folder.is_file() or folder.is_symlink():
        raise OutputError(f"{str(folder)!r} is a file or a link; choose a folder with --output.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{str(folder)!r} is not empty; choose another folder, or pass --overwrite.")
    if not (folder / NAME).is_file():
        raise OutputError(f"{str(folder)!r} holds something else than a basis, so it is not replaced.")


class BasisFile:
    """A basis file, whose tensors are read when they are asked for.

    Attributes:
        path: The file.
        about: What it is.
        digest: SHA-256 of its bytes, in hexadecimal.
    """

    def __init__(self, path: Path) -> None:
        """Read the header, and all bytes once for the digest.

        Raises:
            ConfigError: It is no basis file, damaged, or of a later format.
        """
        self.path = path
        self.digest = _digest_of(path)
        with self._opened() as opened:
            content = _content(path, (opened.metadata() or {}).get(_KEY))
            self._names = set(opened.keys())
        self.about = About(**{name: content[name] for name in About.__dataclass_fields__ if name in content})
        self.layers = sorted(name.removeprefix(_GAINS) for name in self._names if name.startswith(_GAINS))

    def rows(self, layer: str, rank: int, width: int) -> Tensor:
        """The first directions of a layer, P or U^T.

        Args:
            layer: Its path.
            rank: How many; of a layer with fewer, those.
            width: How many inputs it has, or outputs, if its directions are of these.

        Returns:
            (k, width), float32, orthonormal.

        Raises:
            ConfigError: There are none for this layer, they have another width, or are not orthonormal.
        """
        owner = self.about.same_rows.get(layer, layer)
        rows = self._part(_ROWS + owner, layer, rank)
        if rows.ndim != 2 or rows.shape[1] != width:
            raise ConfigError(
                f"{self} is of another model: {layer} is {width} wide, and its directions there {rows.shape[-1]}."
            )
        wide = rows.double()
        off = (wide @ wide.T - torch.eye(len(rows), dtype=torch.float64)).abs()
        if rows.dtype != torch.float32 or not (len(rows) == 0 or float(off.max()) <= _ORTHOGONAL):
            raise ConfigError(f"{self} is damaged: the directions of {layer} are not orthonormal. Make it again.")
        return rows

    def gains(self, layer: str, rank: int) -> Tensor:
        """|W p_i| of the first `rank` directions, (k,), float32."""
        return self._part(_GAINS + layer, layer, rank)

    def check_weight(self, layer: str, weight: Tensor, *, quantised: bool) -> None:
        """Hold the weight (out, in) that a layer has here against the one that the basis was made for.

        Raises:
            ConfigError: It is another one.
        """
        then = self._part(_SAMPLE + layer, layer, SAMPLES).double()
        now = weight_sample(weight).double()
        off = float(torch.linalg.vector_norm(now - then) / torch.linalg.vector_norm(then).clamp(min=1e-30))
        if not off <= (QUANTISED if quantised else CLOSE):
            made_for = f" ({self.about.base})" if self.about.base else ""
            raise ConfigError(
                f"{self} was made for another base model{made_for}: the weight of {layer} differs by {off:.0%} of its norm. "
                "Load that base model, or make a basis for this one with `pica basis`."
            )
        if off > SAME and not quantised:
            logger.warning("%s: the weight of %s differs by %.1f%% of its norm", self, layer, 100 * off)

    def __str__(self) -> str:
        return f"Basis {str(self.path)!r} ({short(self.digest)})"

    def _part(self, name: str, layer: str, count: int) -> Tensor:
        if name not in self._names:
            known = ", ".join(self.layers[:2])
            raise ConfigError(
                f"{self} has no directions for {layer}: it was made for other layers ({known}, ...). Adapt those, or make "
                "a basis for these with `pica basis --target-modules`."
            )
        with self._opened() as opened:
            part = opened.get_slice(name)
            return opened.get_tensor(name) if part.get_shape()[0] <= count else part[:count]

    def _opened(self) -> Any:
        try:
            return safe_open(self.path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"Basis {str(self.path)!r} cannot be read ({first_line(error)}); make it again."
            ) from error


def short(digest: str) -> str:
    """A digest for people."""
    return f"sha256 {digest[:12]}"


def open_basis(place: Path) -> BasisFile:
    """Open the basis in a folder, or a file.

    Args:
        place: Which; it is there.

    Returns:
        The file; what has not changed since this process last asked is not read again.

    Raises:
        ConfigError: as `BasisFile`.
    """
    path = place / NAME if place.is_dir() else place
    status = path.stat()
    return _opened_basis(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=8)  # a model's layers ask for theirs one after another
def _opened_basis(path: Path, changed: int, size: int) -> BasisFile:
    return BasisFile(path)


def holds_basis(place: str | None) -> bool:
    """Whether a local place is a basis: a folder with one in it, or the file."""
    if place is None:
        return False
    path = Path(place).expanduser()
    return (path / NAME).is_file() or (path.is_file() and path.suffix == ".safetensors")


def find_basis(source: str | None, digest: str | None, beside: str | None) -> BasisFile:
    """The basis that an adapter names: in its own folder, where its configuration says, in the cache, or on the hub.

    Args:
        source: A folder, a file, or a name on the hub, perhaps with "@" and a revision.
        digest: SHA-256 of the file; None takes what is found.
        beside: The adapter's own folder, or its name on the hub.

    Returns:
        The file with that digest.

    Raises:
        ConfigError: It is in none of these places, or what is there is another one.
    """
    others: list[str] = []
    for place in _places(source, digest, beside):
        note_use(place)
        found = open_basis(place)
        if digest is None or found.digest == digest:
            return found
        others.append(f"{str(found.path)!r} is another one ({short(found.digest)})")
    wanted = f"The basis ({short(digest)})" if digest else "A basis"
    looked = ", ".join(dict.fromkeys(repr(p) for p in (beside, source) if p)) or "no place was named"
    more = f"; {'; '.join(others)}" if others else ""
    raise ConfigError(
        f"{wanted} is not to be found: looked in {looked} and the cache{more}. Put {NAME} beside the adapter, or set "
        "basis_from in its configuration to where it is."
    )


def _places(source: str | None, digest: str | None, beside: str | None) -> Iterator[Path]:
    for place in (beside, source):
        if place is not None and holds_basis(place):
            yield Path(place).expanduser()
    if beside is not None and digest is not None:  # a run keeps its basis beside its adapters
        for folder in list(Path(beside).absolute().parents)[:_ABOVE]:
            if holds_basis(str(folder / "basis")):
                yield folder / "basis"
    if digest is not None and (folder := shared_folder()) is not None:
        yield from (path for path in folder.glob(f"*{digest[:32]}.safetensors") if path.is_file())
    for place in (beside, source):
        if place is not None and is_hub_name(place) and (fetched := _from_hub(place)) is not None:
            yield fetched


def _from_hub(name: str) -> Path | None:
    from huggingface_hub import hf_hub_download

    repository, _, revision = name.partition("@")
    try:
        return Path(hf_hub_download(repository, NAME, revision=revision or None))
    except Exception as error:  # the hub client's errors have no common base
        logger.info("No %s from %r on the hub: %s", NAME, name, first_line(error))
        return None


def _digest_of(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"Basis {str(path)!r} cannot be read ({error.strerror}).") from error


def _content(path: Path, text: str | None) -> dict[str, Any]:
    """The description in a file's header, checked."""
    try:
        content = json.loads(text or "")
        version = content["format"]
    except (ValueError, TypeError, KeyError):
        raise ConfigError(f"{str(path)!r} is a safetensors file, but no basis that `pica basis` wrote.") from None
    if version != FORMAT:
        raise ConfigError(f"Basis {str(path)!r} has format {version}, this pica reads {FORMAT}; upgrade pica.")
    kinds = {"projection": str, "rank": int, "calibration": dict, "same_rows": dict}
    if wrong := [name for name, kind in kinds.items() if not isinstance(content.get(name), kind)]:
        raise ConfigError(f"Basis {str(path)!r} is damaged: its header's {wrong[0]} makes no sense.")
    return content


def _card(about: About, layers: int) -> str:
    of = f" of {about.base}" if about.base else ""
    lines = [
        f"# A PiCa basis{of}",
        "",
        f"`{NAME}` holds the `{about.projection}` directions, {about.rank} a layer, of {layers} layers. Adapters name it:",
        "",
        "```python",
        f'PicaConfig(r={about.rank}, projection="{about.projection}", basis_from="this folder")',
        "```",
    ]
    if about.calibration:
        facts = ", ".join(f"{name} {value}" for name, value in about.calibration.items())
        lines += ["", f"Made from: {facts}."]
    return "\n".join(lines) + "\n"
