"""Put another adapter's weights in the place of a loaded one, without new modules or a recompilation."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel

from pica.adapters.base_model import read_peft_config
from pica.errors import ConfigError
from pica.tuners.base.config import BankedConfig
from pica.tuners.base.layer import SharedLayer

# What decides which layers, groups and bases there are; everything else may differ.
_STRUCTURE = (
    *("peft_type", "share", "target_modules", "exclude_modules"),
    *("r", "rank_pattern", "projection", "projection_seed"),  # PiCa
    *("pattern", "off_diagonals", "pattern_seed"),  # SVFT
    *("layers_to_transform", "layers_pattern", "target_parameters", "bias"),
    *("modules_to_save", "trainable_token_indices"),  # whose weights are the adapter's too
)


def hotswap_adapter(model: PeftModel, adapter_dir: str | Path, adapter_name: str = "default") -> None:
    """Load a saved adapter into the place of adapter `adapter_name`, in place.

    The parameters stay the same objects, so a compiled model is not compiled again. The new adapter's basis is held
    against its fingerprint, as in any load.

    Args:
        model: A PeftModel with a PiCa or SVFT adapter of that name, not merged.
        adapter_dir: Folder of an adapter with the same structure: ranks, sharing, projection and targets.
        adapter_name: The adapter in the model that gives way.
    Raises:
        ConfigError: There is no such adapter, it is merged, or the structures differ.
        AdapterFileError: The folder's adapter cannot be read; the model is as it was.
        BasisMismatchError: It was trained on another base model; the model is as it was.
    """
    current = model.peft_config.get(adapter_name)
    if not isinstance(current, BankedConfig):
        raise ConfigError(
            f"The model has no PiCa or SVFT adapter {adapter_name!r}; it has {', '.join(model.peft_config)}."
        )
    if any(m.merged for m in model.modules() if isinstance(m, SharedLayer)):
        raise ConfigError("Adapters are merged into the model; call model.unmerge_adapter() before swapping one.")
    config = read_peft_config(Path(adapter_dir).expanduser())
    if differing := differing_settings(current, config, "here", "there"):
        raise ConfigError(
            f"{str(adapter_dir)!r} cannot take the place of {adapter_name!r}: {differing}. Load it beside it."
        )
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    model.load_adapter(str(Path(adapter_dir).expanduser()), adapter_name, is_trainable=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = flags[name]


def differing_settings(one: BankedConfig, other: BankedConfig, place: str, other_place: str) -> str:
    """Settings that make two adapters' matrices different ones, each with its two values and where they are; or ""."""
    differing = [n for n in _STRUCTURE if _plain(getattr(one, n, None)) != _plain(getattr(other, n, None))]
    return ", ".join(
        f"{n}: {getattr(one, n, None)!r} {place}, {getattr(other, n, None)!r} {other_place}" for n in differing
    )


def _plain(value: object) -> object:
    """A list of names without its order; token indices and patterns with theirs, since it tells what is whose."""
    if isinstance(value, dict):
        return list(value.items())
    return set(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
