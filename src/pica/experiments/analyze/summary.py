"""What a role's layers, or all of them, say together: the numbers that tables, figures and the verdict are made of."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from pica.experiments.analyze.analysis import NEAR_ZERO, Analysis, Layer
from pica.experiments.results.analysis import RoleSummary


def summarise(analysis: Analysis) -> list[RoleSummary]:
    """One line a role."""
    return [_summary(role, layers) for role, layers in analysis.roles().items()]


def _summary(role: str, layers: list[Layer]) -> RoleSummary:
    changed = [layer for layer in layers if layer.changed]
    first = layers[0]
    head: dict[str, Any] = {
        "role": role,
        "layers": len(changed or layers),
        "out": first.out,
        "inn": first.inn,
        "base_effective_rank": _mean(layer.effective_rank for layer in layers),
        "base_stable_rank": _mean(layer.stable_rank for layer in layers),
    }
    if not changed:
        nothing: dict[str, Any] = dict.fromkeys(each.name for each in fields(RoleSummary))
        return RoleSummary(**nothing | head)
    updates = [layer.update for layer in changed if layer.update is not None]
    rank = max(u["rank"] for u in updates)
    energy = sum(u["energy"] for u in updates)
    optimum = sum(u["theorem1"]["optimum"] for u in updates)
    residual = sum(u["theorem1"]["residual"] for u in updates)
    return RoleSummary(
        **head,
        rank=rank,
        relative=math.sqrt(energy / sum(layer.norm**2 for layer in changed)),
        column=float(curve(changed, "column")[rank - 1]),
        chance=rank / first.inn,
        random=float(curve(changed, "random")[rank - 1]),
        row=float(curve(changed, "row")[rank - 1]),
        row_chance=rank / first.out,
        minor=float(curve(changed, "minor")[rank - 1]),
        best=float(curve(changed, "best")[rank - 1]),
        angle=_mean(u["angle_mean"]["in"] for u in updates),
        largest_angle=max(u["angle_max"]["in"] for u in updates),
        intruders=_mean(len(u["intruders"]["in"]) for u in updates),
        update_effective_rank=_mean(u["effective_rank"] for u in updates),
        update_stable_rank=_mean(u["stable_rank"] for u in updates),
        residual_over_optimum=residual / optimum if optimum > 1e-12 * energy else None,
        wedin_informative=_mean(float(bound < 1) for layer in changed for bound in wedin_bounds(layer)),
    )


def curve(layers: Iterable[Layer], kind: str) -> Tensor:
    """Measure where the layers' pooled update energy lies.

    Args:
        layers: Of equal width; unchanged ones are left out.
        kind: "column", "row", "random", "minor" (the column space from its end) or "best" (the update's own directions).
    Returns:
        Its share in the first 1, 2, ... of those directions, (k,).
    """
    total, sums = 0.0, torch.zeros(0, dtype=torch.float64)
    for layer in layers:
        if layer.update is None or not layer.changed:
            continue
        energy = layer.update["energy"]
        if kind == "best":
            shares = torch.tensor(layer.update["values"], dtype=torch.float64).square()
        else:
            shares = torch.tensor(layer.update["column" if kind == "minor" else kind], dtype=torch.float64) * energy
        shares = shares.flip(0) if kind == "minor" else shares
        if len(sums) < len(shares):
            sums = torch.cat([sums, sums.new_zeros(len(shares) - len(sums))])
        sums[: len(shares)] += shares
        total += energy
    return (sums.cumsum(0) / total).clamp(max=1.0)


def wedin_bounds(layer: Layer) -> list[float]:
    """Lemma 3.1 at r = 1, 2, ..., k: ||dW||_2 / (sigma_r(W0) - sigma_{r+1}(W*)), infinite without a gap."""
    assert layer.update is not None
    after = [*layer.update["tuned"][1:], 0.0]
    size = layer.update["values"][0]
    return [size / (before - past) if before > past else math.inf for before, past in zip(layer.base, after)]


def near_zero(analysis: Analysis) -> tuple[float, float]:
    """Share of the entries of E_P and E_Q below NEAR_ZERO: as measured, and as two unrelated orthogonal matrices give it."""
    # An entry of a random orthogonal (k, k) matrix is nearly normal with variance 1/k, hence near zero for large k.
    near = expected = count = 0.0
    for layer, update in iterate_updates(analysis.layers):
        for side, width in (("in", layer.inn), ("out", layer.out)):
            entries = update["entries"][side]
            near += entries["near_zero"]
            count += entries["count"]
            expected += entries["count"] * math.erf(NEAR_ZERO * math.sqrt(width / 2))
    return near / count, expected / count


def short_names(roles: Collection[str]) -> dict[str, str]:
    """Roles without what stands before their last index, where that keeps them apart."""
    ends = {role: role.rpartition("*.")[2] for role in roles}
    return {role: end if list(ends.values()).count(end) == 1 else role for role, end in ends.items()}


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def iterate_updates(layers: Iterable[Layer]) -> Iterator[tuple[Layer, dict[str, Any]]]:
    """The changed layers with their records."""
    for layer in layers:
        if layer.update is not None and layer.changed:
            yield layer, layer.update
