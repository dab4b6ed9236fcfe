"""Who shares a matrix with whom: roles, and the groups that a `share` setting makes of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pica.errors import ConfigError
from pica.tuners.base.matching import matches, problem_of_pattern

Share = str | int | Mapping[str, str]
Bucket = tuple[str, int, bool]
"""What the layers of a group have in common: a label, the width of their matrix, and whether that is on the input's side."""


@dataclass(frozen=True)
class Member:
    """One adapted layer, as grouping sees it.

    Attributes:
        path: Module path in the base model, e.g. "model.layers.0.self_attn.q_proj".
        out_features, in_features: The layer's width and input width.
        rank: Directions that the layer is to use (already limited by its shape).
        input_side: Whether its matrix is on the side of its input: M^T (rank, in) reads it.
    """

    path: str
    out_features: int
    in_features: int
    rank: int
    input_side: bool = False

    @property
    def width(self) -> int:
        """Rows of its matrix."""
        return self.in_features if self.input_side else self.out_features


@dataclass(frozen=True)
class Group:
    """Layers that share one trainable matrix M, (width, rank).

    Attributes:
        key: Name of M in the model and in the adapter file; holds no dot (`torch.nn.ParameterDict` forbids it).
        role: What its layers have in common, for people.
        width: Of all its layers, on the side where the matrix is: their outputs as a rule.
        rank: Columns of M: the largest rank among its layers; a layer with fewer directions uses the first columns.
        members: Its layers, in the model's order.
    """

    key: str
    role: str
    width: int
    rank: int
    members: tuple[Member, ...]

    @property
    def parameters(self) -> int:
        return self.width * self.rank


def role_of(path: str) -> str:
    """The path with each integer component replaced by `*`: equal for layers that play the same role."""
    return ".".join("*" if part.isdigit() else part for part in path.split("."))


def check_share(share: object) -> str | None:
    """What is wrong with a `share` setting, or None."""
    if isinstance(share, bool) or not isinstance(share, (str, int, Mapping)):
        return (
            f"share={share!r} must be 'role', 'none', a whole number of layers, or a mapping from regex to group name"
        )
    if isinstance(share, str) and share not in ("role", "none"):
        return f"share={share!r} is unknown; use 'role', 'none', a whole number of layers, or a mapping"
    if isinstance(share, int) and share < 1:
        return f"share={share} must be at least 1 layer"
    if isinstance(share, Mapping):
        for pattern, name in share.items():
            if not isinstance(pattern, str):
                return f"share: {pattern!r} must be a regular expression in quotes"
            if not isinstance(name, str) or not name:
                return f"share: the group of {pattern!r} must be a non-empty name, got {name!r}"
            if problem := problem_of_pattern(pattern, "share"):
                return problem
    return None


def plan_groups(members: Sequence[Member], share: Share) -> list[Group]:
    """Partition layers into groups that share one matrix. Layers of different widths never do.

    Args:
        members: The layers, in the model's order.
        share: "role": same role and width. "none": each layer for itself. k: each k consecutive layers of a role. A
            mapping: the first regular expression that matches a path (as PEFT matches `rank_pattern`: its end, from a dot
            on) names the group; layers that none matches are grouped by role.
    Returns:
        The groups, by their first layers.
    Raises:
        ConfigError: An expression of a mapping matches no layer.
    """
    buckets: dict[Bucket, list[Member]] = {}
    used: set[str] = set()
    seen: dict[Bucket, int] = {}
    for member in members:
        label = role_of(member.path)
        if share == "none":
            label = member.path
        elif isinstance(share, int):
            bucket = (label, member.width, member.input_side)
            position = seen.get(bucket, 0)
            seen[bucket] = position + 1
            label = f"{label}@{position // share}"
        elif isinstance(share, Mapping):
            for pattern, name in share.items():
                if matches(pattern, member.path, what="share"):
                    label = name
                    used.add(pattern)
                    break
        buckets.setdefault((label, member.width, member.input_side), []).append(member)
    if isinstance(share, Mapping) and (idle := [p for p in share if p not in used]):
        raise ConfigError(f"share: {', '.join(map(repr, idle))} matches no adapted layer; correct or remove it.")
    keys = _unique_keys(list(buckets))
    return [
        Group(keys[bucket], bucket[0], bucket[1], max(m.rank for m in layers), tuple(layers))
        for bucket, layers in buckets.items()
    ]


def _unique_keys(buckets: Sequence[Bucket]) -> dict[Bucket, str]:
    """A file-safe key for each (label, width), e.g. model-layers-N-self_attn-q_proj-576."""
    keys: dict[Bucket, str] = {}
    taken: set[str] = set()
    for bucket in buckets:
        label, width, _ = bucket
        base = re.sub(r"[^0-9A-Za-z_-]", "-", label.replace("*", "N")) + f"-{width}"
        key, copy = base, 2
        while key in taken:  # only where paths themselves contain dashes or stars
            key, copy = f"{base}-{copy}", copy + 1
        taken.add(key)
        keys[bucket] = key
    return keys
