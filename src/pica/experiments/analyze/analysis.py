"""Holding the paper's claims against a pair of models: one weight at a time, from safetensors files.

Memory: one weight of each model is in memory at a time, in float64, with its decompositions. `MEMORY_COPIES` times the
largest weight in float64 bounds what the analysis allocates, besides the records of the layers, and for an adapter what
`TunedAdapter` holds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pica import theory
from pica.errors import ConfigError, OutputError
from pica.experiments.analyze.weights import (
    Target,
    Tuned,
    TunedAdapter,
    TunedFolder,
    WeightFolder,
    fetch,
    linear_weights,
    open_folder,
)
from pica.experiments.reporting import Reporter
from pica.experiments.results.analysis import Settings
from pica.experiments.train.origins import differing_files, model_digest
from pica.files import output as files
from pica.theory.subspaces import as_matrix
from pica.tuners.base.roles import role_of

MEMORY_COPIES = 24
"""Float64 copies of the largest weight that bound the memory of an analysis; `tests/experiments` holds it to that.

Measured: 12 for a weight of 32 MiB, 20 for one of 8 MiB, where what the allocator keeps for later weighs more.
"""

PROGRESS = "progress.jsonl"
HISTOGRAM_BINS = 200  # of entries of E in [-1, 1]; what lies beyond counts in the last ones
NEAR_ZERO = 0.05  # an entry of E counts as near zero below this


@dataclass
class Layer:
    """What was measured on one weight. Curves and spectra hold one value a direction; shares are of ||dW||_F^2.

    Attributes:
        path, role, index: Module path; the path without indices; its first index (None where it has none).
        out, inn: Shape.
        base: Singular values of W0.
        effective_rank, stable_rank: Of W0.
        update: What needs the fine-tuned weight: see `_update_record`; None in an analysis of a base model alone.
    """

    path: str
    role: str
    index: int | None
    out: int
    inn: int
    norm: float
    base: list[float]
    effective_rank: float
    stable_rank: float
    update: dict[str, Any] | None = None

    @property
    def changed(self) -> bool:
        return self.update is not None and self.update["energy"] > 0


@dataclass
class Analysis:
    """All layers of a pair of models.

    Attributes:
        confined: Where the method that made the update kept it, whatever the task; "" if nowhere, or not known.
    """

    settings: Settings
    layers: list[Layer]
    notes: list[str] = field(default_factory=list)
    confined: str = ""

    @property
    def paired(self) -> bool:
        return self.settings.tuned is not None

    def roles(self) -> dict[str, list[Layer]]:
        """Layers by role, in the model's order."""
        found: dict[str, list[Layer]] = {}
        for layer in self.layers:
            found.setdefault(layer.role, []).append(layer)
        return found


def analyse(settings: Settings, folder: Path, *, reporter: Reporter, replace: bool = False) -> Analysis:
    """Measure every linear layer; keep what is measured in `folder`, so that an interrupted analysis goes on.

    Args:
        settings: What to analyse.
        folder: Existing or new; takes PROGRESS until the results are written.
        reporter: Is told the progress.
        replace: Begin anew where `folder` holds the progress of another analysis, instead of refusing.
    Returns:
        What was measured.
    Raises:
        ConfigError: A model is not to be had, or no layer is left to analyse.
        AdapterFileError: The adapter does not belong to the base model, or is damaged.
        OutputError: `folder` cannot be written, or holds the progress of another analysis.
    """
    check(settings)
    base = open_folder(settings.base)
    chosen = [t for t in linear_weights(base) if re.search(settings.only or "", t.path)]
    if not chosen:
        what = f" that --only {settings.only!r} matches" if settings.only else ""
        raise ConfigError(f"Model {settings.base!r} has no linear layer{what}.")
    tuned = _open_tuned(base, settings.tuned) if settings.tuned is not None else None
    targets = [t for t in chosen if tuned is None or tuned.has(t)]
    if not targets:
        raise ConfigError(
            f"{settings.tuned!r} has none of the linear layers of {settings.base!r}: another architecture?"
        )
    notes = [] if tuned is None else list(tuned.notes)
    if len(targets) < len(chosen):
        notes.append(f"{len(chosen) - len(targets)} of {len(chosen)} linear layers are not in {settings.tuned!r}.")
    header = _header(settings)
    done = _read_progress(folder, header, replace=replace)
    label = "Analysing layers"
    with _progress_file(folder, header, done) as keep, reporter.bar(label, len(targets)) as advance:
        layers = []
        for target in targets:
            if target.path not in done:
                measured = _measure(base, tuned, target, settings)
                keep(measured)
                done[target.path] = measured
            layers.append(done[target.path])
            advance(note=target.path)
    unchanged = sum(layer.update is not None and not layer.changed for layer in layers)
    if unchanged == len(layers) and tuned is not None:
        raise ConfigError(
            f"{settings.tuned!r} equals {settings.base!r} in every linear layer; there is no update to analyse."
        )
    if unchanged:
        notes.append(f"{unchanged} of {len(layers)} layers are unchanged; they count in no average.")
    return Analysis(settings, layers, notes, tuned.confined if tuned is not None else "")


def check(settings: Settings) -> None:
    """Raise `ConfigError` on a value out of range."""
    if settings.rank < 1:
        raise ConfigError(f"--rank {settings.rank} must be at least 1.")
    if settings.top < 1:
        raise ConfigError(f"--intruder-top {settings.top} must be at least 1.")
    if not 0 < settings.threshold <= 1:
        raise ConfigError(f"--intruder-threshold {settings.threshold} must lie above 0 and be at most 1.")
    try:
        re.compile(settings.only or "")
    except re.error as error:
        raise ConfigError(f"--only {settings.only!r} is no regular expression ({error}).") from None


def _open_tuned(base: WeightFolder, tuned: str) -> Tuned:
    folder = fetch(tuned)
    if (folder / "adapter_config.json").is_file():
        return TunedAdapter(base, folder)
    return TunedFolder(base, WeightFolder(folder))


def _measure(base: WeightFolder, tuned: Tuned | None, target: Target, settings: Settings) -> Layer:
    weight = _float64(base.load(target.name), target)
    before = theory.spectrum(weight)
    indices = [int(part) for part in target.path.split(".") if part.isdigit()]
    layer = Layer(
        path=target.path,
        role=role_of(target.path),
        index=indices[0] if indices else None,
        out=weight.shape[0],
        inn=weight.shape[1],
        norm=float(before.values.norm()),
        base=_rounded(before.values),
        effective_rank=theory.effective_rank(before.values),
        stable_rank=theory.stable_rank(before.values),
    )
    if tuned is not None:
        layer.update = _update_record(weight, before, _float64(tuned.load(target), target), settings)
    return layer


def _float64(stored: Tensor, target: Target) -> Tensor:
    if not stored.is_floating_point() or stored.dtype.itemsize < 2:
        raise ConfigError(
            f"{target.path} is stored as {str(stored.dtype).removeprefix('torch.')}: analyse the unquantised model."
        )
    matrix = as_matrix(stored, target.path)
    return matrix.T.contiguous() if target.transposed else matrix


def _update_record(weight: Tensor, before: theory.Spectrum, tuned: Tensor, settings: Settings) -> dict[str, Any]:
    """Everything that compares W0 with W*: plain numbers and lists."""
    # energy: ||dW||_F^2. values, tuned: singular values of dW and W*. column, row: share of the update's energy in each
    # right (left) singular direction of W0. random: the same for as many seeded random directions. angle_*: principal
    # angles in degrees between the top-r input (output) directions. wedin, theorem1: the dataclasses. intruders: places.
    # entries: of E_P ("in") and E_Q ("out").
    delta = tuned - weight
    energy = float(delta.square().sum())
    if energy == 0:
        return {"energy": 0.0}
    rank = min(settings.rank, len(before.values))
    column = theory.direction_energies(delta, before.inputs) / energy
    row = theory.direction_energies(delta.T, before.outputs) / energy
    random = theory.direction_energies(delta, _random(len(before.values), delta.shape[1], settings.seed)) / energy
    values = torch.linalg.svdvals(delta)
    after = theory.spectrum(tuned)
    turned = theory.perturbations(before, after)
    angles = {
        side: torch.rad2deg(theory.principal_angles(one[:rank], other[:rank]))
        for side, one, other in (("in", before.inputs, after.inputs), ("out", before.outputs, after.outputs))
    }
    bound = theory.wedin(before, after, delta, rank, update_values=values)
    error = theory.projection_error(before, after, delta, rank, update_values=values, turned=turned)
    options = {"threshold": settings.threshold, "top": settings.top}
    return {
        "energy": energy,
        "rank": rank,
        "tuned": _rounded(after.values),
        "values": _rounded(values),
        "column": _rounded(column),
        "row": _rounded(row),
        "random": _rounded(random),
        "effective_rank": theory.effective_rank(values),
        "stable_rank": theory.stable_rank(values),
        "tuned_effective_rank": theory.effective_rank(after.values),
        "angle_max": {side: float(a.max()) for side, a in angles.items()},
        "angle_mean": {side: float(a.mean()) for side, a in angles.items()},
        "intruders": {
            "in": theory.intruder_dimensions(before.inputs, after.inputs, **options).tolist(),
            "out": theory.intruder_dimensions(before.outputs, after.outputs, **options).tolist(),
        },
        "wedin": {**asdict(bound), "bound": _finite(bound.bound), "vacuous": bound.vacuous},
        "theorem1": {
            **asdict(error),
            "bound": error.bound,
            "epsilon_bound": error.epsilon_bound,
            "vacuous": error.vacuous,
        },
        "entries": {"in": _entries(turned.inputs), "out": _entries(turned.outputs)},
    }


def _entries(matrix: Tensor) -> dict[str, Any]:
    """Distribution of the entries of E: off the diagonal as a histogram on [-1, 1], and the diagonal itself."""
    k = len(matrix)
    off = matrix[~torch.eye(k, dtype=torch.bool, device=matrix.device)]
    clipped = off.clamp(-1, 1)
    near = int((off.abs() < NEAR_ZERO).sum()) + int((torch.diagonal(matrix).abs() < NEAR_ZERO).sum())
    return {
        "histogram": torch.histc(clipped, HISTOGRAM_BINS, -1, 1).to(torch.int64).tolist(),
        "near_zero": near,
        "count": k * k,
        "diagonal": _rounded(torch.diagonal(matrix) + 1),  # <u_i, u*_i>: 1 where the direction has not turned
        "squares": float(off.square().sum()),
    }


@lru_cache(maxsize=1)
def _random(rank: int, width: int, seed: int) -> Tensor:
    return theory.random_directions(rank, width, seed=seed)


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{v:.6g}") for v in values.tolist()]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _read_progress(folder: Path, header: Mapping[str, Any], *, replace: bool) -> dict[str, Layer]:
    """Layers that an interrupted analysis with the same settings and models has measured."""
    path = folder / PROGRESS
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        before, *rows = (json.loads(line) for line in lines if line.endswith("}"))  # the last may be cut off
        changed = _changes(before, header)
    except (ValueError, TypeError, KeyError, AttributeError):
        rows, changed = [], ["the file of its progress, which is damaged or of another version"]
    if changed and replace:
        return {}
    if changed:
        raise OutputError(
            f"{str(folder)!r} holds an unfinished analysis that cannot go on, since this differs: {'; '.join(changed)}. "
            "Choose another folder with --output, or begin anew with --overwrite."
        )
    return {row["path"]: Layer(**row) for row in rows}


def _header(settings: Settings) -> dict[str, Any]:
    """What an analysis begins with: a model that was trained on meanwhile is another one."""
    models = {name: getattr(settings, name) for name in ("base", "tuned")}
    digests = {name: model_digest(place) for name, place in models.items() if place is not None}
    return {"settings": asdict(settings), "models": digests}


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    settings, models = before["settings"], before["models"]
    found = [
        f"{name} ({settings.get(name)!r} then, {value!r} now)"
        for name, value in now["settings"].items()
        if settings.get(name) != value and not (name in ("base", "tuned") and models.get(name))
    ]
    for name, digests in now["models"].items():
        found += [f"{file} of the {name} model" for file in differing_files(models.get(name, {}), digests)]
    return found


class _progress_file:
    """Appends measured layers, each flushed, so that what was measured survives."""

    def __init__(self, folder: Path, header: Mapping[str, Any], done: Mapping[str, Layer]) -> None:
        self._folder, self._header, self._done = folder, header, dict(done)

    def __enter__(self):
        # written anew: a line that was cut off goes
        files.write_jsonl(self._folder / PROGRESS, [self._header, *(asdict(layer) for layer in self._done.values())])
        with files.translated_write_errors(self._folder):
            self._file = open(self._folder / PROGRESS, "a", encoding="utf-8")

        def keep(layer: Layer) -> None:
            with files.translated_write_errors(self._folder):
                self._file.write(files.json_text(asdict(layer)) + "\n")
                self._file.flush()

        return keep

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what could not be written has been told by `keep`
            self._file.close()
