# pyright: strict
"""What `pica plan` worked out: the content of what it prints with --json."""

from dataclasses import dataclass
from typing import ClassVar

from pica.experiments.results.screening import Screen


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """Layers that share one matrix M (out_features, rank). `in_features` lists the widths that occur.

    Of layers whose matrix is on the side of their input (gradient directions), `out_features` is the width of that side.
    `layers` counts each expert of a stack, since each has a basis of its own.
    """

    name: str
    layers: int
    in_features: list[int]
    out_features: int
    rank: int
    parameters: int
    basis_bytes: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step: `activations` (gradients included, at the peak) and `total` bytes; None where not to be found."""

    batch: int
    length: int
    activations: int | None
    total: int | None


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes of one method's training, by part.

    Attributes:
        method: "PiCa" or "LoRA".
        rank: Its r.
        parameters: Number of trained ones.
        weights: The base model's parameters and buffers, quantised where they are.
        basis: Projectors, in the dtype that the layers compute in.
        adapter, optimizer: Trained parameters, and AdamW's two moments of them.
        steps: By batch and length.
    """

    method: str
    rank: int
    parameters: int
    weights: int
    basis: int
    adapter: int
    optimizer: int
    steps: list[Step]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The whole plan.

    Attributes:
        model: As it was named.
        kind: Class of the model.
        dtype: Of its weights, before they are quantised.
        quantization: How they are quantised, if they are.
        model_parameters: Of the base model.
        r: Rank of the adapter.
        groups: What shares a matrix.
        parameters, adapter_bytes: Trained, and the size of adapter_model.safetensors, to the byte.
        basis_bytes: In memory.
        cache_bytes: On disk, in the cache of solved bases (without its files' headers).
        basis_seconds: To solve all bases once on this machine; an extrapolation from three timed solves.
        memory: PiCa's first, then LoRA's.
        notes: What a reader should know.
        screen: Of bases, where that was asked for.
    """

    FORMAT: ClassVar[int] = 1

    model: str
    kind: str
    dtype: str
    quantization: str | None
    model_parameters: int
    r: int
    groups: list[GroupRow]
    parameters: int
    adapter_bytes: int
    basis_bytes: int
    cache_bytes: int
    basis_seconds: float
    memory: list[TrainingMemory]
    notes: list[str]
    screen: Screen | None = None
