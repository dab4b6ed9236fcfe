"""`PicaConfig`: what a PiCa adapter is, in PEFT's form."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from peft import PeftConfig

import pica._version
from pica.basis import PROJECTIONS
from pica.basis.fingerprint import FORMAT_VERSION
from pica.errors import ConfigError
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
        super().__post_init__()
        self.peft_type = ensure_peft_type("PICA")
        self.pica_version = self.pica_version or pica._version.__version__
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if problems := self._problems():
            raise ConfigError("PicaConfig: " + "; ".join(problems) + ".")

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
        if isinstance(self.projection_seed, bool) or not isinstance(self.projection_seed, int):
            found.append(f"projection_seed={self.projection_seed!r} must be a whole number")
        if problem := check_share(self.share):
            found.append(problem)
        if self.bias not in ("none", "all", "pica_only"):
            found.append(f"bias={self.bias!r} is unknown; use 'none', 'all' or 'pica_only'")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(pattern := getattr(self, name), str):
                try:
                    re.compile(pattern)
                except re.error as error:
                    found.append(f"{name}={pattern!r} is not a regular expression ({error})")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            found.append("layers_to_transform does not go with a regular expression in target_modules; put it in there")
        if self.layers_pattern and self.layers_to_transform is None:
            found.append("layers_pattern needs layers_to_transform")
        return found
