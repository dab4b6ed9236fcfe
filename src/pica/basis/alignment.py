"""How a recomputed basis lies to the one that a fingerprint was taken of: the same, the same when turned, or another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pica.basis.fingerprint import NARROW_STEP, WIDE_STEP, LayerPrint, Mode, observe


@dataclass(frozen=True)
class Alignment:
    """How a recomputed basis lies to the one that a fingerprint was taken of.

    Attributes:
        rotation: (usable, usable) orthogonal matrix R such that R P is the trained basis; None where P already is.
        deviation: Estimated |P_trained - R P|_F / sqrt(usable): 0 for the same basis, about 1.4 for an unrelated one.
        worst: The same for the worst single direction.
        gain_error: Largest relative difference of the sampled gains.
        reason: Why the two cannot be the same, whatever the numbers say (another shape, ...); empty otherwise.
        usable: Directions that the trained basis had; the present one may have more.
    """

    rotation: Tensor | None
    deviation: float
    worst: float
    gain_error: float
    reason: str = ""
    usable: int = 0


# Directions count as one cluster where neighbouring gains differ by less than this, relatively.
CLUSTER_GAPS = (1e-6, 1e-5, 1e-4, 1e-3)
# A direction off by more than this is looked at again as part of a cluster.
SUSPECT = 5e-3
# Largest error of a rotation inside a cluster that counts as determined by the probes.
UNCERTAINTY = 2e-2


def align(
    trained: LayerPrint, mode: Mode, projector: Tensor, weight: Tensor, side: str, gains: Callable[[], Tensor]
) -> Alignment:
    """Hold a basis against the print of the trained one.

    Args:
        trained: What was kept of the trained basis.
        mode: How its values were kept.
        projector: Of the basis at hand, (rank, in) or (rank, out).
        weight: The weight W that this basis is of, (out, in).
        side: What the projector reads: "in" or "out".
        gains: Gives |W p_i| for each row, (rank,); asked for only where a rotation inside a cluster has to be found.
    Returns:
        How to turn the basis into the trained one, and how well that fits.
    """
    if (trained.out_features, trained.in_features) != tuple(weight.shape):
        shapes = f"{trained.out_features} x {trained.in_features}, here {weight.shape[0]} x {weight.shape[1]}"
        return Alignment(None, math.inf, math.inf, math.inf, f"trained on a weight of shape {shapes}")
    projector = projector[: trained.rank]
    if projector.shape[0] < trained.usable:
        have = f"{projector.shape[0]} directions where {trained.usable} were trained"
        return Alignment(None, math.inf, math.inf, math.inf, f"the weight has {have}")
    projector = projector[: trained.usable]
    if trained.usable == 0:
        return Alignment(None, 0.0, 0.0, 0.0)
    everything, gain, samples = observe(projector, weight, side, trained.choice.max() + 1)
    now = np.take_along_axis(everything, trained.choice, axis=1)
    signs = np.where((now * trained.values).sum(axis=1) < 0, -1.0, 1.0)
    rotation = np.diag(signs)
    if mode == "wide":
        rotation = _rotate_clusters(rotation, now, trained.values, gains)
    off = np.sqrt(((rotation @ now - trained.values) ** 2).mean(axis=1))  # (usable,)
    rounding = (NARROW_STEP if mode == "narrow" else WIDE_STEP) / math.sqrt(12)
    deviation = math.sqrt(max(0.0, float((off**2).mean()) - rounding**2))
    # Relative where a sample is above 1 (minor directions): float16 rounds it by more than any fixed difference.
    samples_off = np.abs(samples - trained.samples) / np.maximum(1.0, trained.samples)
    gain_error = max(abs(gain - trained.gain) / max(trained.gain, 1e-300), float(samples_off.max()))
    unchanged = np.array_equal(rotation, np.eye(len(signs)))
    turn = None if unchanged else torch.from_numpy(rotation)
    return Alignment(turn, deviation, float(off.max()), gain_error, usable=trained.usable)


def _rotate_clusters(
    rotation: np.ndarray, now: np.ndarray, then: np.ndarray, gains: Callable[[], Tensor]
) -> np.ndarray:
    """Replace the signs of badly fitting clusters of equal gains by the best rotation, where the probes determine one."""
    probes = now.shape[1]
    off = np.sqrt(((rotation @ now - then) ** 2).mean(axis=1))
    if off.max() <= SUSPECT:
        return rotation
    g = gains().double().cpu().numpy()[: len(now)]  # the weight may have more directions than the trained one had
    for gap in CLUSTER_GAPS:
        for first, last in _clusters(g, gap):
            rows = slice(first, last)
            size = last - first
            if size < 2 or size > probes or off[rows].max() <= SUSPECT:
                continue
            u, s, vt = np.linalg.svd(then[rows] @ now[rows].T)
            candidate = u @ vt
            fitted = np.sqrt(((candidate @ now[rows] - then[rows]) ** 2).mean(axis=1))
            # What the fit leaves open, over how strongly the probes see the weakest direction, bounds the rotation's error.
            uncertainty = max(fitted.max(), WIDE_STEP) / math.sqrt(max(s[-1], 1e-12))
            if fitted.max() < off[rows].max() and uncertainty < UNCERTAINTY:
                rotation[rows, :] = 0.0
                rotation[rows, rows] = candidate
                off[rows] = fitted
    return rotation


def _clusters(gains: np.ndarray, gap: float) -> list[tuple[int, int]]:
    """Ranges [first, last) of neighbours whose gains differ by less than `gap`, relatively."""
    close = np.abs(np.diff(gains)) <= gap * np.maximum(gains[:-1], gains[1:])
    edges = [0, *(int(i) + 1 for i in np.flatnonzero(~close)), len(gains)]
    return list(zip(edges[:-1], edges[1:]))
