"""`BankedConfig`: the fields and the file handling that the configurations of all methods here have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from peft import PeftConfig, TaskType

import pica._version
from pica.basis.fingerprint import FORMAT_VERSION
from pica.errors import ConfigError
from pica.tuners.base.config_file import (
    CONFIG,
    check_weights_file,
    known_fields,
    pattern_problems,
    read_config_file,
    type_problems,
)
from pica.tuners.base.registration import ensure_peft_type
from pica.tuners.base.roles import check_share

SelfConfig = TypeVar("SelfConfig", bound="BankedConfig")

# Mappings of which the first expression that matches counts. PEFT sorts the keys of everything that it writes as JSON.
_ORDERED = ("share", "rank_pattern")


@dataclass
class BankedConfig(PeftConfig):
    """Which layers, who shares, what is trained beside them. Each field's help text is in its metadata.

    Raises:
        ConfigError: a value is out of range; the message lists every such value.
    """

    method: ClassVar[str] = ""  # its name in PEFT's enum
    found_in: ClassVar[str | None] = None  # the adapter's folder, or its name on the hub, of a configuration read there

    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Layers to adapt: a list of names (ends of module paths), one regular expression for whole paths, or "
            "'all-linear'. Default: by architecture. An entry that matches no layer is an error."
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Layers to leave out, given like target_modules."}
    )
    share: str | int | dict[str, str] = field(
        default="role",
        metadata={
            "help": "Which layers share one matrix: 'role' (the paper: all layers whose path differs only in indices), "
            "'none', a number k (each k consecutive layers of a role), or a mapping from regular expression to group name."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "Start M at zero, so training starts at the base model. False draws random values, for tests."
        },
    )
    bias: str = field(
        default="none",
        metadata={
            "help": "Biases to train too: 'none', 'all', or those of the adapted layers ('pica_only', 'svft_only')."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules to train in full and store with the adapter, e.g. a classification head."},
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt; all when not set."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks that layers_to_transform counts in."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token embeddings to train and store beside the adapter, as in PEFT's LoRA."}
    )
    basis_format: int | None = field(
        default=None,
        metadata={"help": "Format of the basis fingerprint in the adapter file; filled in when an adapter is saved."},
    )
    pica_version: str | None = field(
        default=None, metadata={"help": "Version of pica that wrote the adapter; filled in by itself."}
    )

    def __new__(cls, *args: Any, **fields: Any) -> Any:
        # PEFT hands on all that a file holds, its type included; of what a class does not know it only warns
        if "peft_type" in fields:
            known_fields(CONFIG, fields, {f.name for f in dataclasses.fields(cls)})
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in _ORDERED:
            if pairs := _as_mapping(getattr(self, name, None)):
                setattr(self, name, pairs)
        if problems := type_problems(self) or [*self.own_problems(), *self._problems()]:
            raise ConfigError(f"{type(self).__name__}: " + "; ".join(problems) + ".")
        super().__post_init__()
        self.peft_type = ensure_peft_type(self.method)
        self.pica_version = self.pica_version or pica._version.__version__
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    @classmethod
    def from_json_file(cls, path_json_file: str | PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """Read a configuration file.

        Returns:
            Its fields.
        Raises:
            AdapterFileError: It is not readable, or holds fields that are not known.
        """
        return read_config_file(path_json_file, {f.name for f in dataclasses.fields(cls)})

    @classmethod
    def from_pretrained(
        cls: type[SelfConfig],
        pretrained_model_name_or_path: str | PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> SelfConfig:
        """Read the configuration in an adapter folder or hub repository.

        Of a local folder the weights' file is checked too (present, whole), so that a damaged adapter is refused before
        a model is touched.

        Returns:
            The configuration.
        Raises:
            AdapterFileError: The folder's files are missing, damaged or cut short, or hold fields that are not known.
            ConfigError: A value has a wrong type or is out of range; the message names the file.
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        local = (folder / CONFIG).is_file()
        try:
            config: Any = super().from_pretrained(str(pretrained_model_name_or_path), subfolder=subfolder, **kwargs)
        except ConfigError as error:
            where = repr(str(folder / CONFIG)) if local else f"{CONFIG} of {str(pretrained_model_name_or_path)!r}"
            raise ConfigError(f"{where}: {error}") from error
        assert isinstance(config, cls)
        # a class's attribute, so that it is no field; set on the one that was read
        config.found_in = str(folder) if local else str(pretrained_model_name_or_path)  # pyright: ignore[reportAttributeAccessIssue]
        if local:
            # PEFT sets `inference_mode` when it saves an adapter; without it this may be a configuration on its own
            check_weights_file(
                folder,
                saved_adapter=config.inference_mode,
                modules=config.modules_to_save or (),
                token_rows=bool(config.trainable_token_indices),
            )
        return config

    def to_dict(self) -> dict:
        """The fields as plain values; sets become sorted lists, so that the same adapter gives the same file."""
        # A mapping whose order counts and is not that of its sorted keys becomes a list of pairs, which keeps it.
        plain = {**super().to_dict(), "basis_format": FORMAT_VERSION}
        for name in _ORDERED:
            value = plain.get(name)
            if isinstance(value, Mapping) and list(value) != sorted(value):
                plain[name] = [[key, value[key]] for key in value]
        return {k: sorted(v) if isinstance(v, set) else v for k, v in plain.items()}

    def size_text(self) -> str:
        """What decides the number of parameters, in a few words."""
        return ""

    def own_problems(self) -> list[str]:
        """What is wrong with the fields that only this method has."""
        return []

    def _problems(self) -> list[str]:
        found: list[str] = []
        if problem := check_share(self.share):
            found.append(problem)
        only = f"{self.method.lower()}_only"
        if self.bias not in ("none", "all", only):
            found.append(f"bias={self.bias!r} is unknown; use 'none', 'all' or {only!r}")
        if self.task_type is not None and self.task_type not in list(TaskType):
            found.append(
                f"Invalid task type: {self.task_type!r}. Must be one of the following task types: {', '.join(TaskType)}"
            )
        found += pattern_problems(self)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            found.append("layers_to_transform does not go with a regular expression in target_modules; put it in there")
        if self.layers_pattern and self.layers_to_transform is None:
            found.append("layers_pattern needs layers_to_transform")
        return found


def _as_mapping(value: object) -> dict[str, Any] | None:
    """A list of (text, value) pairs, as `to_dict` writes it, as a mapping; None for anything else."""
    if not isinstance(value, (list, tuple)):
        return None
    pairs = [p for p in value if isinstance(p, (list, tuple)) and len(p) == 2 and isinstance(p[0], str)]
    found = {key: entry for key, entry in pairs}
    return found if len(found) == len(value) else None
