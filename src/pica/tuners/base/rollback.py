"""An adapter goes onto a model as a whole or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from pica.errors import ConfigError
from pica.tuners.base.bank import MatrixBank
from pica.tuners.base.protocols import AdaptedLayer


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters that a model's layers use now."""
    return next((list(m.active_adapters) for m in model.modules() if isinstance(m, BaseTunerLayer)), [])


@contextmanager
def all_or_nothing(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Whatever ends the block early leaves `model` as it was: its modules, active adapters and `requires_grad` flags.

    PEFT adds what `modules_to_save` and `trainable_token_indices` name once the method's layers are in the model, and
    takes nothing back when that fails.

    Args:
        model: Base model, perhaps with adapters.
        adapter_name: The adapter that the block adds. Where one of that name is there already, nothing is taken back.
    """
    banks = [m for m in model.modules() if isinstance(m, MatrixBank)]
    if any(adapter_name in bank for bank in banks):
        yield
        return
    children = [(module, dict(module._modules)) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    carriers = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    active = [list(carrier.active_adapters) for carrier in carriers]
    try:
        yield
    except BaseException:
        for carrier, names in zip(carriers, active):
            carrier.set_adapter(names)
            if isinstance(carrier, AuxiliaryTrainingWrapper):
                carrier.delete_adapter(adapter_name, new_active_adapters=names)
            else:
                carrier.delete_adapter(adapter_name)
        for bank in banks:
            if adapter_name in bank:
                del bank[adapter_name]
            bank.refresh_unverified()
        for module, found in children:
            if module._modules.keys() != found.keys() or any(module._modules[n] is not m for n, m in found.items()):
                module._modules.clear()
                module._modules.update(found)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def replace_earlier(layers: Sequence[AdaptedLayer], bank: MatrixBank | None, adapter_name: str) -> None:
    """Take out what a model has of this name, which another tuner put on it, as PEFT's own methods begin anew there.

    `get_peft_model` a second time, as when a notebook's cell is run again, would else put the new one's layers and ranks
    on the old one's matrices.

    Raises:
        ConfigError: the earlier adapter is merged into the model.
    """
    layers = [layer for layer in layers if adapter_name in layer.group_of]
    if bank is None or not layers:
        return
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise ConfigError(
            f"The model has an adapter {adapter_name!r} of {layers[0].method.name} already, which is merged into it. "
            "Unmerge that (model.unmerge_adapter()), or take it out (base = model.unload()), before another of its name is "
            "added."
        )
    warnings.warn(
        f"{layers[0].method.name}: the model has an adapter {adapter_name!r} already, from an earlier get_peft_model or "
        "from_pretrained; a new one takes its place. To keep it, add the new one under a name of its own "
        "(model.add_adapter(name, config)).",
        stacklevel=2,
    )
    for layer in layers:
        layer.delete_adapter(adapter_name)
    if adapter_name in bank:
        del bank[adapter_name]
