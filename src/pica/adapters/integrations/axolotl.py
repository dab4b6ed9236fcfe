"""axolotl's plug-in: `adapter: pica` or `adapter: svft` in its YAML file.

This module is imported by axolotl alone, and imports it.
"""

from __future__ import annotations

import logging
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin  # pyright: ignore[reportMissingImports]
from peft import PeftModel, TaskType, get_peft_model
from pydantic import BaseModel, Field

import pica
from pica.errors import ConfigError

logger = logging.getLogger(__name__)

METHODS = {"pica": pica.PicaConfig, "svft": pica.SvftConfig}
# Of axolotl's own settings those that mean the same here, and the fields that they are.
TAKEN = {
    "lora_r": "r",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "lora_exclude_modules": "exclude_modules",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
    "peft_trainable_token_indices": "trainable_token_indices",
    "lora_rank_pattern": "rank_pattern",
}
# Those that only a LoRA has: refused where they are set to more than their default.
LORA_ONLY = {
    "lora_dropout": 0,
    "peft_use_dora": False,
    "peft_use_rslora": False,
    "peft_init_lora_weights": True,
    "lora_alpha_pattern": None,
    "loraplus_lr_ratio": None,
    "peft_layer_replication": None,
    "lora_mlp_kernel": None,
    "lora_qkv_kernel": None,
    "lora_o_kernel": None,
    "relora": None,
}


class PicaArgs(BaseModel):
    """What the plug-in adds to axolotl's settings."""

    pica: dict[str, Any] | None = Field(
        default=None, description="Fields of PicaConfig or SvftConfig beyond axolotl's lora_r and lora_target_modules."
    )


class PicaPlugin(BasePlugin):
    """The class to name in `plugins:`, as pica.adapters.integrations.axolotl.PicaPlugin."""

    def get_input_args(self) -> str:
        """Where axolotl finds the settings that this adds."""
        return f"{__name__}.{PicaArgs.__name__}"

    def get_adapter_capabilities(self) -> list[Any]:
        """The names that `adapter:` may have."""
        return [AdapterCapabilities(name=name) for name in METHODS]

    def load_adapter(
        self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False
    ) -> tuple[Any, Any] | None:
        """Put the adapter on the model, or load the one of `lora_model_dir`.

        Args:
            model: The base model.
            cfg: axolotl's settings.
            inference: Whether a loaded adapter stays frozen.
            config_only: Make the configuration alone.
        Returns:
            The model and the configuration, None for the model with `config_only`; None for another adapter than ours.
        Raises:
            ConfigError: a setting has no meaning for this adapter.
        """
        if cfg.adapter not in METHODS:
            return None
        config = adapter_config(cfg, type(model).__name__)
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
        else:
            model = get_peft_model(model, config)
        model.print_trainable_parameters()
        return model, config


def adapter_config(cfg: Any, model_class: str) -> Any:
    """The adapter's configuration in PEFT's form.

    Args:
        cfg: axolotl's settings.
        model_class: Name of the base model's class, which says its task.
    Returns:
        A `PicaConfig` or `SvftConfig`.
    Raises:
        ConfigError: a setting has no meaning for this adapter, or a wrong value.
    """
    odd = [name for name, default in LORA_ONLY.items() if getattr(cfg, name, None) not in (None, default)]
    if odd:
        raise ConfigError(f"adapter: {cfg.adapter} has no {', '.join(odd)}; remove that from the settings.")
    if getattr(cfg, "lora_alpha", None):
        logger.warning("adapter: %s has no scale: lora_alpha is left out.", cfg.adapter)
    fields = {field: value for name, field in TAKEN.items() if (value := getattr(cfg, name, None))}
    if getattr(cfg, "lora_target_linear", None):
        fields["target_modules"] = "all-linear"
    if "SequenceClassification" in model_class:
        fields["task_type"] = TaskType.SEQ_CLS
    elif "TokenClassification" in model_class:
        fields["task_type"] = TaskType.TOKEN_CLS
    else:
        fields["task_type"] = TaskType.CAUSAL_LM
    fields |= dict(getattr(cfg, "pica", None) or {})
    try:
        return METHODS[cfg.adapter](**fields)
    except TypeError as error:
        raise ConfigError(f"adapter: {cfg.adapter} cannot be set up so: {error}.") from error
