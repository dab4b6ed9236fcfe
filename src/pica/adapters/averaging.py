"""Adapters of one basis, averaged, as federated training does after each round: the update is the mean of their updates."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pica.adapters.base_model import read_peft_config
from pica.adapters.hotswap import differing_settings
from pica.adapters.saving import CONFIG, WEIGHTS
from pica.errors import AdapterFileError, BasisMismatchError, ConfigError
from pica.files.folders import new_folder
from pica.tuners.base.bank import BANK_NAMES
from pica.tuners.base.state_dict import FINGERPRINT
from pica.tuners.base.verification import BASIS_MARK

Adapter = str | Path | Mapping[str, Tensor]


def average_adapters(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    output_dir: str | Path | None = None,
    *,
    overwrite: bool = False,
) -> dict[str, Tensor]:
    """The weighted mean of adapters of one base model and configuration; its update is the mean of theirs.

    That holds where all have the very same bases, which their fingerprints tell: start each training from one saved
    adapter. What is trained beside the matrices (`modules_to_save`, tokens' embeddings) is averaged too.

    Args:
        adapters: Folders of PiCa or SVFT adapters, or their state dicts, as PEFT's `get_peft_model_state_dict` gives them.
        weights: One for each, such as a client's number of examples; they are divided by their sum. All alike if None.
        output_dir: Where to write the mean as an adapter folder, with the configuration of the first folder. A folder that
            is there must be empty; with `overwrite`, it may hold an adapter.
        overwrite: Whether to replace an adapter in `output_dir`.
    Returns:
        The mean's state dict, for PEFT's `set_peft_model_state_dict`: names and shapes as those of each adapter, summed in
        float64 and in the widest dtype that one of them has.
    Raises:
        ConfigError: there are no adapters, the weights do not fit, two configurations or methods differ, or `output_dir`
            is given and no folder is among the adapters.
        AdapterFileError: one cannot be read, holds NaN or infinity, or has other tensors or shapes than the first.
        BasisMismatchError: one was trained with other bases than the first.
        OutputError: `output_dir` cannot be written, or holds something else.
    """
    shares = _shares(adapters, weights)
    names = [_name(adapter, number) for number, adapter in enumerate(adapters, 1)]
    folders = [Path(a).expanduser() for a in adapters if not isinstance(a, Mapping)]
    _check_configurations(folders)
    if output_dir is not None and not folders:
        raise ConfigError(
            "output_dir needs an adapter folder among the adapters, for its configuration; state dicts have none. Put the "
            "mean into a model with set_peft_model_state_dict, and save that."
        )
    first: dict[str, Tensor] = {}
    totals: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for adapter, share, name in zip(adapters, shares, names):
        state = dict(adapter) if isinstance(adapter, Mapping) else load_file(Path(adapter).expanduser() / WEIGHTS)
        _check_values(state, name)
        first = first or state
        _check_alike(first, state, names[0], name)
        for key in (key for key in state if _is_averaged(key, state[key])):
            part = state[key].detach().to(first[key].device, torch.float64) * share
            totals[key] = totals[key] + part if key in totals else part
            dtypes[key] = torch.promote_types(dtypes.get(key, state[key].dtype), state[key].dtype)
    mean = {key: _as(dtypes[key], totals[key]) if key in totals else first[key].detach().clone() for key in first}
    if output_dir is not None:
        _write(mean, folders[0], Path(output_dir), overwrite=overwrite)
    return mean


def _shares(adapters: Sequence[Adapter], weights: Sequence[float] | None) -> list[float]:
    if isinstance(adapters, (str, Path, Mapping)) or not adapters:
        raise ConfigError("average_adapters needs a list of adapters: folders, or state dicts.")
    found = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(found) != len(adapters):
        raise ConfigError(f"There are {len(adapters)} adapters and {len(found)} weights; give one for each.")
    if not all(math.isfinite(w) and w >= 0 for w in found) or not 0 < sum(found) < math.inf:
        raise ConfigError(f"weights={found} must be numbers of at least 0, not all of them 0.")
    return [weight / sum(found) for weight in found]


def _name(adapter: Adapter, number: int) -> str:
    return f"adapter {number} (a state dict)" if isinstance(adapter, Mapping) else repr(str(adapter))


def _check_configurations(folders: Sequence[Path]) -> None:
    configs = [read_peft_config(folder) for folder in folders]
    for folder, config in zip(folders[1:], configs[1:]):
        if differing := differing_settings(configs[0], config, f"in {str(folders[0])!r}", f"in {str(folder)!r}"):
            raise ConfigError(f"Adapters of different configurations have no mean: {differing}.")


def _check_values(state: Mapping[str, Tensor], name: str) -> None:
    if not any(_is_fingerprint(key) for key in state):
        raise AdapterFileError(
            f"{name} holds no basis fingerprint, so it is not the state of a PiCa or SVFT adapter; give what "
            "get_peft_model_state_dict returns."
        )
    for key, value in state.items():
        if value.is_meta or (value.is_floating_point() and not torch.isfinite(value).all()):
            what = "no values" if value.is_meta else "NaN or infinity"
            raise AdapterFileError(f"{key} of {name} holds {what}; leave that adapter out.")


def _check_alike(first: Mapping[str, Tensor], state: Mapping[str, Tensor], first_name: str, name: str) -> None:
    if strange := sorted(first.keys() ^ state.keys()):
        has, lacks = (first_name, name) if strange[0] in first else (name, first_name)
        raise AdapterFileError(
            f"{has} holds {strange[0]}, and {lacks} does not; average adapters of the same base model and configuration."
        )
    for key, value in state.items():
        wanted = first[key]
        if value.shape != wanted.shape or value.is_floating_point() != wanted.is_floating_point():
            raise AdapterFileError(
                f"{key} is {wanted.dtype} {tuple(wanted.shape)} in {first_name} and {value.dtype} {tuple(value.shape)} in "
                f"{name}; average adapters of the same base model and configuration."
            )
        if not _is_averaged(key, value) and not torch.equal(value.to(wanted), wanted):
            raise BasisMismatchError(
                f"{first_name} and {name} were trained with different bases ({key} differs), so that their matrices mean "
                "different things and have no mean. Start each training from one saved adapter, on the same base model."
            )


def _is_fingerprint(key: str) -> bool:
    return _is_banked(key) and key.endswith(f".{FINGERPRINT}")


def _is_banked(key: str) -> bool:
    return not BANK_NAMES.isdisjoint(key.split("."))


def _is_averaged(key: str, value: Tensor) -> bool:
    """Whether an entry is trained, and not what tells or makes the basis, or says which entries of a matrix there are."""
    return not _is_banked(key) or (value.is_floating_point() and not _is_fingerprint(key) and BASIS_MARK not in key)


def _as(dtype: torch.dtype, value: Tensor) -> Tensor:
    return (value if dtype.is_floating_point else value.round()).to(dtype)  # of a head's counters


def _write(mean: dict[str, Tensor], like: Path, target: Path, *, overwrite: bool) -> None:
    with new_folder(target, overwrite=overwrite) as beside:
        for name in (CONFIG, "README.md"):
            if (like / name).is_file():
                shutil.copyfile(like / name, beside / name)
        save_file({key: value.contiguous() for key, value in mean.items()}, beside / WEIGHTS, metadata={"format": "pt"})
