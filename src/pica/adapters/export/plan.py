"""What a LoRA of an adapter will be, known before anything is written; or why an engine cannot have one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftConfig
from torch import nn

from pica.adapters.export.engines import Engine
from pica.adapters.export.expert_factors import parameter_paths, stack_paths
from pica.adapters.export.factors import GroupRow, SharedSpectrum, choose_rank
from pica.adapters.export.names import (
    LinearShape,
    base_modules,
    incomplete_roles,
    linear_shapes,
    missing_members,
    plain_names,
)
from pica.errors import ConfigError, ExportError
from pica.tuners.base.layer import SharedLayer
from pica.tuners.pica.experts import PicaExpert

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ExportPlan:
    """What an export will write, known before anything is written.

    Attributes:
        adapter: Name of the adapter in its model.
        rank: Uniform rank of the LoRA, zero columns included.
        dtype: Precision of the file.
        rows: The known error of each group; `exact` where all are zero.
        filled: Layers that get a zero adapter, for the engine's sake.
        target_modules, target_parameters: As written to adapter_config.json.
        notes: What the user should know, one sentence each.
        engine: The engine that it is for.
    """

    adapter: str
    rank: int
    dtype: torch.dtype
    rows: tuple[GroupRow, ...]
    filled: tuple[LinearShape, ...]
    target_modules: tuple[str, ...]
    notes: tuple[str, ...]
    engine: Engine | None
    target_parameters: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        return all(row.kept == row.rank for row in self.rows)


def check_exportable(
    root: nn.Module, config: PeftConfig, layers: Mapping[str, SharedLayer], engine: Engine | None
) -> None:
    """Refuse what a LoRA, or a LoRA of this engine, cannot express."""
    ways_out = "Merge the adapter into its base model instead (pica merge)."
    if any(layer.merged for layer in layers.values()):
        raise ExportError("The model has merged adapters; call unmerge_adapter() before the export.")
    bias = getattr(config, "bias", "none")
    if bias != "none":
        raise ExportError(f"The adapter trained biases too (bias={bias!r}), which engines ignore or refuse. {ways_out}")
    if getattr(config, "trainable_token_indices", None):
        raise ExportError(f"The adapter trained token embeddings too, which a LoRA cannot hold. {ways_out}")
    if engine and engine.name != "peft" and (stacks := stack_paths(layers)):
        raise ExportError(f"{engine.name} cannot load a LoRA on experts' parameters such as {stacks[0]}. {ways_out}")
    embeddings = [path for path, layer in layers.items() if isinstance(layer.get_base_layer(), nn.Embedding)]
    if engine and engine.name != "peft" and embeddings:
        raise ExportError(f"{engine.name} cannot load a LoRA on an embedding such as {embeddings[0]}. {ways_out}")
    saved = getattr(config, "modules_to_save", None) or []
    if engine and engine.modules_to_save is not None and (odd := [m for m in saved if m not in engine.modules_to_save]):
        raise ExportError(
            f"The adapter trained {', '.join(odd)} in full, and {engine.name} cannot load that. {ways_out}"
        )
    if engine and engine.modules is not None:
        names = sorted({path.rpartition(".")[2] for path in layers} - set(engine.modules))
        if names:
            raise ExportError(
                f"{engine.name} adapts no layers named {', '.join(names)}; it knows {', '.join(engine.modules)}."
            )
    if engine and engine.name == "llama.cpp" and any(path.rpartition(".")[2] == "lm_head" for path in layers):
        tied = getattr(getattr(root, "config", None), "tie_word_embeddings", False)
        if tied:
            raise ExportError(f"llama.cpp cannot adapt an lm_head that is tied to the embeddings. {ways_out}")


def plan_export(
    root: nn.Module,
    name: str,
    layers: Mapping[str, SharedLayer],
    spectra: Mapping[str, SharedSpectrum],
    engine: Engine | None,
    rank: int | None,
    energy: float | None,
    dtype: torch.dtype | str | None,
    fill: bool,
) -> ExportPlan:
    """Choose rank, precision and names, by the engine's rules; the arguments are those of `export_lora`."""
    unique = list({id(s): s for s in spectra.values()}.values())
    chosen = choose_rank(unique, rank, energy)
    notes = []
    if engine is not None:
        chosen = engine.legal_rank(chosen)
        if engine.fast_rank is not None and chosen > engine.fast_rank:
            notes.append(
                f"{engine.name} is fast up to rank {engine.fast_rank}; rank {chosen} leaves that path, and "
                f"rank={engine.fast_rank} would stay on it."
            )
    filled: list[LinearShape] = []
    siblings = fill or bool(engine and engine.complete_groups)
    if siblings or (engine and engine.every_layer):
        filled = missing_members(set(layers), linear_shapes(root), siblings=siblings)
    modules = base_modules(root)
    all_paths = [p for p, layer in layers.items() if not isinstance(layer, PicaExpert)]
    all_paths += [shape.path for shape in filled]
    if engine and engine.every_layer and (gaps := incomplete_roles(all_paths, modules)):
        role, number = next(iter(gaps.items()))
        raise ExportError(
            f"{engine.name} drops a module type that is missing in any block without a word, and {role} does not exist in "
            f"{number} of the model's blocks. Leave it out of target_modules, or merge the adapter (pica merge)."
        )
    names = plain_names(all_paths, modules)
    if engine and engine.plain_names and (long := [n for n in names if "." in n]):
        raise ExportError(
            f"{engine.name} takes bare module names only, and {long[0].rpartition('.')[2]!r} also names modules that the "
            f"adapter leaves alone, so it would need {long[0]!r}. Merge the adapter instead (pica merge)."
        )
    return ExportPlan(
        adapter=name,
        rank=chosen,
        dtype=_choose_dtype(dtype, layers, engine),
        rows=tuple(s.row(chosen) for s in unique),
        filled=tuple(filled),
        target_modules=tuple(names),
        target_parameters=tuple(plain_names(stack_paths(layers), parameter_paths(root))),
        notes=tuple(notes),
        engine=engine,
    )


def _choose_dtype(
    dtype: torch.dtype | str | None, layers: Mapping[str, SharedLayer], engine: Engine | None
) -> torch.dtype:
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"dtype={dtype!r} is unknown; use one of {', '.join(DTYPES)}.")
        dtype = DTYPES[dtype]
    half = (torch.float16, torch.bfloat16)
    if dtype is None:
        dtype = next(iter(layers.values())).frozen.device_and_dtype()[1]
        if dtype not in half:
            dtype = torch.bfloat16 if engine and engine.half_only else torch.float32
    if dtype not in DTYPES.values():
        raise ConfigError(f"dtype={dtype} is no precision of a LoRA; use one of {', '.join(DTYPES)}.")
    if engine and engine.half_only and dtype not in half:
        raise ConfigError(
            f"{engine.name} computes adapters in float16 or bfloat16; dtype={dtype} would be rounded there."
        )
    return dtype
