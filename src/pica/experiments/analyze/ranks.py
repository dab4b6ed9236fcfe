"""Ranks suggested by measurements, one a role, in the form that a recipe's `rank_pattern` takes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
import yaml

from pica.errors import ConfigError
from pica.experiments.analyze.analysis import Analysis
from pica.experiments.analyze.summary import curve
from pica.experiments.results.analysis import Suggestion
from pica.theory import rank_for_share


def suggest(analysis: Analysis, share: float) -> Suggestion:
    """Suggest the smallest rank of each role that holds `share`, pooled over its layers.

    Returns:
        The ranks, and what they come from.
    Raises:
        ConfigError: `share` is out of range.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"--suggest-rank {share} must lie above 0 and be at most 1, for instance 0.9.")
    ranks: dict[str, int | None] = {}
    limits = {}
    for role, layers in analysis.roles().items():
        limits[role] = max(len(layer.base) for layer in layers)
        if not analysis.paired:
            squares = torch.zeros(limits[role], dtype=torch.float64)
            for layer in layers:
                squares[: len(layer.base)] += torch.tensor(layer.base, dtype=torch.float64).square()
            ranks[role] = max(1, min(limits[role], rank_for_share(squares, share)))
        elif any(layer.changed for layer in layers):
            captured = curve(layers, "column")
            steps = torch.cat([captured[:1], captured.diff()])
            found = rank_for_share(steps, share * (1 - 1e-6), total=1.0)  # shares are stored with six digits
            ranks[role] = found if found <= len(captured) else None
    return Suggestion(share=share, source="update" if analysis.paired else "spectrum", ranks=ranks, limits=limits)


def patterns(roles: Mapping[str, Collection[str]], paths: Collection[str]) -> dict[str, str]:
    """Name roles in an adapter's `rank_pattern`.

    Args:
        roles: Layer paths by role.
        paths: All linear layers of the model.
    Returns:
        For each role the shortest regular expression that PEFT matches with its layers and no others.
    """
    found = {}
    for role, members in roles.items():
        parts = role.split(".")
        for start in range(len(parts) - 1, -1, -1):
            pattern = r"\.".join(r"\d+" if part == "*" else re.escape(part) for part in parts[start:])
            hit = {path for path in paths if re.match(rf"(.*\.)?({pattern})$", path)}  # as PEFT matches
            if hit <= set(members) or start == 0:
                found[role] = pattern
                break
    return found


def recipe_text(analysis: Analysis, suggestion: Suggestion, paths: Collection[str]) -> str:
    """The `adapter` section of a recipe with these ranks, as YAML; roles without a rank get all their directions."""
    roles = {role: [layer.path for layer in layers] for role, layers in analysis.roles().items()}
    names = patterns(roles, paths)
    ranks = {names[role]: rank or suggestion.limits[role] for role, rank in suggestion.ranks.items()}
    what = (
        f"the update of {analysis.settings.tuned}"
        if suggestion.source == "update"
        else "the squared singular values of the base weights alone (no task was looked at)"
    )
    target = "|".join(sorted(names[role] for role in suggestion.ranks))
    section = {
        "adapter": {
            "method": "pica",
            "r": max(ranks.values()),
            "target_modules": rf"(.*\.)?({target})",
            "rank_pattern": ranks,
        }
    }
    head = f"# Smallest ranks whose column space holds {suggestion.share:.0%} of {what}.\n"
    head += f"# Base model: {analysis.settings.base}\n"
    if short := [names[role] for role, rank in suggestion.ranks.items() if rank is None]:
        head += f"# Not even all directions hold that share in: {', '.join(short)}. They get all they have.\n"
    return head + yaml.safe_dump(section, sort_keys=False, width=1000)
