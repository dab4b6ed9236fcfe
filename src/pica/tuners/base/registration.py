"""How a method that PEFT does not know gets in from outside.

PEFT's `register_peft_method` accepts only members of its closed enum `PeftType`, and the rest of PEFT, transformers and
diffusers use `.value` and `.name` of them. So one member is added to the enum, the way `enum` itself would have made it,
and the ordinary registration does the rest.
"""

from __future__ import annotations

import functools
from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method, save_and_load

from pica.tuners.base.bank import find_banks


def ensure_peft_type(name: str) -> PeftType:
    """The member `name` of `PeftType`, made if it is not there. Its value equals its name, as PEFT's lookups need."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = name
        member._value_ = name
        member._sort_order_ = len(PeftType._member_names_)  # pyright: ignore[reportAttributeAccessIssue] - set by enum
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
        type.__setattr__(PeftType, name, member)
    return PeftType[name]


def register_method(name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Register a method once; a second call (module reload, a PEFT that has the method itself) changes nothing."""
    if ensure_peft_type(name) not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=model_cls)


def hide_banks_from_base_state() -> None:
    """Keep `get_base_model_state_dict` and its counterpart from taking shared matrices for weights of the base model.

    PEFT tells the two apart by the kind of layer that a tensor is in, and has no hook for a container outside of layers.
    """
    name = "_get_adapter_state_dict_key_prefixes"
    original = getattr(save_and_load, name, None)
    if original is None or hasattr(original, "knows_banks"):
        return

    @functools.wraps(original)
    def prefixes(model: Any) -> set[str]:
        return original(model) | {bank_name for bank_name, _ in find_banks(model.base_model.model)}

    prefixes.knows_banks = True  # pyright: ignore[reportAttributeAccessIssue] - a mark, for reloads of this module
    setattr(save_and_load, name, prefixes)
