"""The fields that only PiCa's configuration has, and what can be wrong with them. Imports no torch: recipes are quick."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

Projection = Literal["principal", "minor", "random", "activation", "weighted", "gradient"]


@dataclass
class PicaSettings:
    """PiCa's own fields; `PicaConfig` says what they are for. Each field's help text is in its metadata."""

    r: int = field(
        default=32,
        metadata={
            "help": "Rank: directions of each layer's input space that the update may use. Parameters grow with it "
            "linearly; 32 is about a third of a rank-1 LoRA's size on many models, 256 matches full fine-tuning in the "
            "paper. A layer with fewer usable directions uses those it has."
        },
    )
    projection: Projection = field(
        default="principal",
        metadata={
            "help": "Which directions: 'principal' (the paper), or for ablations 'minor' (the last singular directions) "
            "and 'random' (seeded orthonormal directions). Directions that look at data are made once for a base model "
            "(pica.make_basis, pica basis) and named in basis_from: 'activation' (in which the layer's inputs have most of "
            "their energy), 'weighted' (those of the weight, on these inputs) and 'gradient' (those of the first gradient, "
            "turned alike over the layers that share; see input_side)."
        },
    )
    input_side: list[str] | None = field(
        default=None,
        metadata={
            "help": "Of projection='gradient': layers whose trained matrix is on the side of their input, as ends of paths "
            "or regular expressions: y += U N x with N (r, in) shared and U (out, r) frozen, instead of M P x. By default "
            "those that read the residual stream (query, key, value, up and gate); filled in by itself."
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
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Stacks of experts' weights to adapt, as ends of parameter paths, e.g. ['experts.down_proj']. Each "
            "expert has its own basis; all experts of all blocks share one matrix."
        },
    )
    save_basis: bool = field(
        default=False,
        metadata={
            "help": "Store the basis with the adapter. The file grows from megabytes to the size of a LoRA of rank r; "
            "loading then needs no decomposition."
        },
    )
    basis_from: str | None = field(
        default=None,
        metadata={
            "help": "Where the bases come from, if not from the base model's own weights: a folder, or a name on the hub "
            "('name' or 'name@revision'). A basis that was made by itself (pica.make_basis, pica basis) is read as it is. "
            "Of an unquantised checkpoint of the same model, which is for a quantised base model, the weights are, one at a "
            "time; on that checkpoint itself, unquantised, it changes nothing, nor for the stacks of target_parameters, "
            "which nothing quantises."
        },
    )
    basis_digest: str | None = field(
        default=None,
        metadata={
            "help": "SHA-256 of the basis file that was used; filled in by itself. Another file is refused, wherever it is."
        },
    )

    def own_problems(self) -> list[str]:
        """What is wrong with these fields."""
        found: list[str] = []
        ranks = {"r": self.r, **{f"rank_pattern[{k!r}]": v for k, v in (self.rank_pattern or {}).items()}}
        for what, rank in ranks.items():
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                found.append(f"{what}={rank!r} must be a whole number of at least 1")
        if self.basis_from is not None and (not isinstance(self.basis_from, str) or not self.basis_from.strip()):
            found.append(f"basis_from={self.basis_from!r} must be a folder or the name of a model on the hub")
        for what, names in (("target_parameters", self.target_parameters), ("input_side", self.input_side)):
            if names is None:
                continue
            if not (isinstance(names, (list, set, tuple)) and all(isinstance(name, str) for name in names)):
                found.append(f"{what}={names!r} must be a list of names")
            elif what == "input_side" and self.projection != "gradient":
                found.append("input_side goes with projection='gradient'; leave it out")
        digest = self.basis_digest
        if digest is not None and not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
            found.append(f"basis_digest={digest!r} must be a SHA-256 in hexadecimal, or null")
        known = get_args(Projection)
        if self.projection not in known:
            found.append(f"projection={self.projection!r} is unknown; use one of {', '.join(known)}")
        return found
