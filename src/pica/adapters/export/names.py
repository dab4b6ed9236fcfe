"""Names of adapted layers: the shortest that mean exactly those layers, and which layers a model has beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pica.adapters.export.engines import SIBLINGS
from pica.tuners.base.frozen_weight import features_of
from pica.tuners.base.pointwise import is_pointwise
from pica.tuners.base.roles import role_of
from pica.tuners.base.targets import is_supported


@dataclass(frozen=True)
class LinearShape:
    """A linear layer of the base model: its path and sizes, and of a convolution the dimensions of its kernel."""

    path: str
    out_features: int
    in_features: int
    kernel_dims: int = 0


def base_modules(root: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of a base model's own modules, without what adapters put inside their layers."""
    found: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for path, module in root.named_modules():
        if not path or (inside and path.startswith(inside)):
            continue
        found[path] = module
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{path}.")
    return found


def linear_shapes(root: nn.Module) -> dict[str, LinearShape]:
    """The linear layers of a base model, adapted or not, by path."""
    shapes = {}
    for path, module in base_modules(root).items():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if is_supported(base):
            in_features, out_features = features_of(base)
            kernel_dims = len(base.kernel_size) if is_pointwise(base) else 0
            shapes[path] = LinearShape(path, out_features, in_features, kernel_dims)
    return shapes


def plain_names(adapted: Collection[str], modules: Iterable[str]) -> list[str]:
    """The shortest names for `target_modules` that match every adapted path and no other module.

    Args:
        adapted: Paths of the adapted layers.
        modules: Paths of all modules of the base model.
    Returns:
        Sorted names without repeats: "q_proj" where all layers of that name are adapted, more of the path where not.
    """
    total = Counter(end for path in modules for end in _ends(path))
    ours = Counter(end for path in adapted for end in _ends(path))
    names = set()
    for path in adapted:
        # the whole path comes last and can only fail where it also ends another module's path
        names.add(next((end for end in _ends(path) if ours[end] == total[end]), path))
    return sorted(names)


def missing_members(adapted: Collection[str], linears: dict[str, LinearShape], *, siblings: bool) -> list[LinearShape]:
    """Find the layers that an engine expects beside the adapted ones.

    Args:
        adapted: Paths of the adapted layers.
        linears: All linear layers of the model, by path.
        siblings: Whether the engine expects the other members of q/k/v and gate/up.
    Returns:
        The layers of the same role in blocks that the adapter leaves out and, with `siblings`, those others.
    """
    wanted: set[str] = set()
    for path in adapted if siblings else ():
        parent, _, name = path.rpartition(".")
        for group in SIBLINGS:
            if name in group:
                wanted.update(f"{parent}.{member}" if parent else member for member in group)
    wanted.update(adapted)
    roles = {role_of(path) for path in wanted if path in linears}
    return [shape for path, shape in linears.items() if path not in adapted and role_of(path) in roles]


def incomplete_roles(adapted: Collection[str], modules: Collection[str]) -> dict[str, int]:
    """{role: blocks without it}: roles that are adapted in some blocks of a stack, while the stack has more."""
    blocks = {prefix for path in modules for prefix in [_block(path)] if prefix}
    count = Counter(role_of(block) for block in blocks)  # blocks in each stack
    have: dict[str, set[str]] = {}
    for path in adapted:
        if block := _block(path):
            have.setdefault(role_of(path), set()).add(block)
    missing = {role: count[role_of(next(iter(there)))] - len(there) for role, there in have.items()}
    return {role: number for role, number in missing.items() if number}


def _block(path: str) -> str:
    """The path up to its first index, "model.layers.3"; empty where it has none."""
    parts = path.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: position + 1])
    return ""


def _ends(path: str) -> list[str]:
    """Ends of a path at its dots, the shortest first."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
