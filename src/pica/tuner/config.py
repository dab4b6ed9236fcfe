"""`PicaConfig`: what a PiCa adapter is, in PEFT's form."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from peft import PeftConfig, TaskType

import pica._version
from pica.basis import PROJECTIONS
from pica.basis.fingerprint import FORMAT_VERSION
from pica.errors import ConfigError
from pica.tuner.config_file import CONFIG, check_weights_file, pattern_problems, read_config_file, type_problems
from pica.tuner.registration import ensure_peft_type
from pica.tuner.roles import check_share


@dataclass
class PicaConfig(PeftConfig):
    """Configuration of PiCa: a frozen weight W (out, in) becomes W + M P.

    P (r, in) holds the top-r right singular directions of W, belongs to the layer and stays frozen; M (out, r) starts at
    zero, is all that is trained, and is shared by the layers of a group. Trainable parameters: the sum of r * out over
    groups. Fields not listed here are PEFT's own; each field's help text is in its metadata.

    Raises:
        ConfigError: a value is out of range; the message lists every such value.
    """

    r: int = field(
        default=32,
        metadata={
            "help": "Rank: directions of each layer's input space that the update may use. Parameters grow with it "
            "linearly; 32 is about a third of a rank-1 LoRA's size on many models, 256 matches full fine-tuning in the "
            "paper. A layer with fewer usable directions uses those it has."
        },
    )
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
    projection: Literal["principal", "minor", "random"] = field(
        default="principal",
        metadata={
            "help": "Which directions: 'principal' (the paper), or for ablations 'minor' (the last singular directions) "
            "and 'random' (seeded orthonormal directions)."
        },
    )
    projection_seed: int = field(default=0, metadata={"help": "Seed of projection='random'; no effect otherwise."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "Ranks that differ from r: a mapping from layer name or regular expression to rank, e.g. "
            "{'down_proj': 64}. Layers of a group with a smaller rank use the first columns of its matrix."
        },
    )
    save_basis: bool = field(
        default=False,
        metadata={
            "help": "Store the basis with the adapter. The file grows from megabytes to the size of a LoRA of rank r; "
            "loading then needs no decomposition."
        },
    )
    init_weights: bool = field(
        default=True,
        metadata={
            "help": "Start M at zero, so training starts at the base model. False draws random values, for tests."
        },
    )
    bias: Literal["none", "all", "pica_only"] = field(
        default="none", metadata={"help": "Biases to train too: 'none', 'all', or those of the adapted layers."}
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

    def __post_init__(self) -> None:
        if problems := type_problems(self) or self._problems():
            raise ConfigError("PicaConfig: " + "; ".join(problems) + ".")
        super().__post_init__()
        self.peft_type = ensure_peft_type("PICA")
        self.pica_version = self.pica_version or pica._version.__version__
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)

    @classmethod
    def from_json_file(cls, path_json_file: str | PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The fields of a configuration file.

        Raises:
            AdapterFileError: it is not readable, or holds fields that are not known.
        """
        return read_config_file(path_json_file, {f.name for f in dataclasses.fields(cls)})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> PicaConfig:
        """The configuration in an adapter folder or hub repository.

        Of a local folder the weights' file is checked too (present, whole), so that a damaged adapter is refused before
        a model is touched.

        Raises:
            AdapterFileError: the folder's files are missing, damaged or cut short, or hold fields that are not known.
            ConfigError: a value has a wrong type or is out of range; the message names the file.
        """
        folder = Path(pretrained_model_name_or_path) / (subfolder or "")
        local = (folder / CONFIG).is_file()
        try:
            config = super().from_pretrained(str(pretrained_model_name_or_path), subfolder=subfolder, **kwargs)
        except ConfigError as error:
            where = repr(str(folder / CONFIG)) if local else f"{CONFIG} of {str(pretrained_model_name_or_path)!r}"
            raise ConfigError(f"{where}: {error}") from error
        assert isinstance(config, PicaConfig)
        if local:
            # PEFT sets `inference_mode` when it saves an adapter; without it this may be a configuration on its own
            check_weights_file(folder, saved_adapter=config.inference_mode)
        return config

    def to_dict(self) -> dict:
        """The fields as plain values; sets become sorted lists, so that the same adapter gives the same file."""
        plain = {**super().to_dict(), "basis_format": FORMAT_VERSION}
        return {k: sorted(v) if isinstance(v, set) else v for k, v in plain.items()}

    def _problems(self) -> list[str]:
        found: list[str] = []
        ranks = {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in (self.rank_pattern or {}).items()}}
        for what, rank in ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                found.append(f"{what}={rank!r} must be a whole number of at least 1")
        if self.projection not in PROJECTIONS:
            found.append(f"projection={self.projection!r} is unknown; use one of {', '.join(PROJECTIONS)}")
        if problem := check_share(self.share):
            found.append(problem)
        if self.bias not in ("none", "all", "pica_only"):
            found.append(f"bias={self.bias!r} is unknown; use 'none', 'all' or 'pica_only'")
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
