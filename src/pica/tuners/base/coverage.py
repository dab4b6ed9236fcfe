"""What an adapter covers: which entry of target_modules hit how many layers, of which shapes, in which group."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from pica.errors import ConfigError
from pica.tuners.base.layer import SharedLayer
from pica.tuners.base.matching import matches


@dataclass(frozen=True)
class CoverageRow:
    """One group of layers that share a matrix.

    Attributes:
        pattern: The entry of target_modules that chose them.
        group: Key of the shared matrix.
        layers: Number of layers.
        shapes: Their weight shapes (out, in), without repeats.
        rank: Columns of the shared matrix (SVFT: of the square T).
        trainable: Its number of parameters.
    """

    pattern: str
    group: str
    layers: int
    shapes: tuple[tuple[int, int], ...]
    rank: int
    trainable: int


@dataclass(frozen=True)
class Coverage:
    """Table of a model's PiCa or SVFT adapter; `str()` prints it."""

    adapter: str
    rows: tuple[CoverageRow, ...]

    @property
    def layers(self) -> int:
        return sum(row.layers for row in self.rows)

    @property
    def trainable(self) -> int:
        """Parameters of the shared matrices (biases and modules_to_save not counted)."""
        return sum(row.trainable for row in self.rows)

    def __str__(self) -> str:
        header = ("pattern", "group", "layers", "weights (out x in)", "rank", "trainable")
        body = [
            (
                r.pattern,
                r.group,
                str(r.layers),
                ", ".join(f"{o}x{i}" for o, i in r.shapes),
                str(r.rank),
                f"{r.trainable:,}",
            )
            for r in self.rows
        ]
        body.append(("total", f"{len(self.rows)} groups", str(self.layers), "", "", f"{self.trainable:,}"))
        widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
        numeric = {2, 4, 5}
        lines = []
        for line in [header, tuple("-" * w for w in widths), *body]:
            cells = [c.rjust(w) if i in numeric else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def coverage(model: nn.Module, adapter_name: str | None = None) -> Coverage:
    """Tell which layers an adapter adapts, and how.

    Args:
        model: A PeftModel, or a base model with injected adapters, of PiCa or SVFT.
        adapter_name: Which adapter; by default the active one.
    Returns:
        A table, which prints itself.
    Raises:
        ConfigError: The model has no such adapter.
    """
    layers = [m for m in model.modules() if isinstance(m, SharedLayer)]
    names = sorted({n for m in layers for n in m.group_of})
    if adapter_name is None:
        active = [n for m in layers for n in m.active_adapters if n in names]
        adapter_name = active[0] if active else next(iter(names), None)
    if adapter_name is None or adapter_name not in names:
        there = f"it has {', '.join(names)}" if names else "it has none"
        raise ConfigError(f"The model has no PiCa or SVFT adapter {adapter_name or ''!r}: {there}.")
    configs = getattr(model, "peft_config", {})
    targets = getattr(configs.get(adapter_name), "target_modules", None) if isinstance(configs, dict) else None
    grouped: dict[str, list[SharedLayer]] = {}
    for layer in layers:
        if adapter_name in layer.group_of:
            grouped.setdefault(layer.group_of[adapter_name], []).append(layer)
    rows = []
    for group, members in grouped.items():
        matrix = members[0].matrix(adapter_name)
        patterns = sorted({_pattern_of(m.path, targets) for m in members})
        shapes = tuple(dict.fromkeys((m.out_features, m.in_features) for m in members))
        rows.append(
            CoverageRow(
                ", ".join(patterns),
                group,
                len(members),
                shapes,
                members[0].method.group_rank(adapter_name),
                matrix.numel(),
            )
        )
    return Coverage(adapter_name, tuple(rows))


def _pattern_of(path: str, targets: object) -> str:
    if isinstance(targets, str):
        return targets if matches(targets, path, what="target_modules") else path
    if isinstance(targets, (set, list, tuple)):
        hits = [t for t in targets if path == t or path.endswith(f".{t}")]
        if hits:
            return max(hits, key=len)
    return next((part for part in reversed(path.split(".")) if not part.isdigit()), path)  # of experts, their stack
