"""`export_lora`: an adapter as a plain PEFT LoRA folder, which every serving engine reads and no pica is needed for."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import Tensor, nn

from pica.adapters.base_model import flags_kept, load_base_model, read_peft_config, share_tensors
from pica.adapters.export.check import CheckResult, check_folder
from pica.adapters.export.engines import Engine, EngineName, find_engine
from pica.adapters.export.expert_factors import adapted_experts, stack_tensors
from pica.adapters.export.factors import SharedSpectrum, layer_factors, shared_spectra
from pica.adapters.export.folder import PREFIX, LoraFolder, write_lora_folder
from pica.adapters.export.names import base_modules
from pica.adapters.export.plan import ExportPlan, check_exportable, plan_export
from pica.adapters.fitting import copy_tokenizer, fit_embeddings, whole_tensors
from pica.adapters.pipelines import TEXT_ENCODER, adapter_folders, denoiser_name, text_encoder_tensors
from pica.errors import ConfigError, ExportError
from pica.files.folders import check_replaceable, new_folder
from pica.tuners.base.bank import find_banks, verify_loaded
from pica.tuners.base.layer import SharedLayer
from pica.tuners.pica.experts import PicaExpert

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraExport:
    """What `export_lora` wrote.

    Attributes:
        folder: The LoRA folder.
        plan: Rank, precision and known errors.
        layers: Number of layers with a LoRA, zero adapters included.
        bytes: Size of the tensors' file.
        check: What reloading it with plain PEFT measured; None where `check` was off.
        command: How the engine serves it; empty without one.
    """

    folder: Path
    plan: ExportPlan
    layers: int
    bytes: int
    check: CheckResult | None
    command: str

    @property
    def max_logit_difference(self) -> float | None:
        """Largest |difference| between the adapted model's output and the reloaded LoRA's; None where not checked."""
        return self.check.logits if self.check else None


def export_lora(
    adapter: nn.Module | str | Path,
    output_dir: str | Path,
    base_model: nn.Module | str | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype | str | None = None,
    engine: EngineName | str | None = None,
    fill_siblings: bool = False,
    base_model_name: str | None = None,
    revision: str | None = None,
    check: bool = True,
    check_inputs: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
    adapter_name: str | None = None,
    trust_remote_code: bool = False,
    on_plan: Callable[[ExportPlan], None] | None = None,
) -> LoraExport:
    """Write a PiCa adapter as a LoRA: A = P, B = M, alpha = r, exactly; or smaller, with a known error.

    SVFT likewise: A = V^T, B = U T, exact at rank min(out, in) only, more than engines serve, so give `rank` or `energy`.

    The folder (adapter_config.json, adapter_model.safetensors, README.md) follows the rules of all known engines:
    one rank, scale baked in, no patterns, plain names. It appears whole or not at all, and only after it was reloaded
    with plain PEFT and compared. The model that is passed in is not changed.

    Args:
        adapter: A model with a PiCa adapter (a `PeftModel`, or a base model with an injected adapter), or a saved folder.
        output_dir: Folder to make.
        base_model: For a saved folder: its base model, or where to load it from; by default what the adapter records.
        rank: Truncate every layer to its best LoRA of this rank, rounded up to the engine's next legal one.
        energy: Truncate to the smallest rank that keeps this share of every group's squared norm, e.g. 0.99.
        dtype: float32, float16 or bfloat16 (or their names). Default: the base model's; an engine that computes adapters
            in half precision gets bfloat16 for a float32 base.
        engine: "vllm", "sglang", "lorax", "llama.cpp", "diffusers" or "peft": follow its rules (see `engines`).
        fill_siblings: Write zero adapters for the members of q/k/v and gate/up that the adapter leaves out, and for
            blocks it leaves out. Engines that need it get it without asking.
        base_model_name: What to record as the base model; by default what the adapter records.
        revision: Which revision of it to record, and to load where it is loaded by name.
        check: Reload the folder with plain PEFT and compare each layer and the model's output.
        check_inputs: Keyword arguments of the forward pass to compare on; by default random tokens or pixels.
        overwrite: Replace an adapter that is in `output_dir`.
        adapter_name: Which adapter of the model; by default the active one.
        trust_remote_code: Run the Python code that comes with a base model that is loaded by name, if it has some.
        on_plan: Called with the plan, known errors included, before anything is written.
    Returns:
        The folder, the plan, what the check found, and the engine's command.
    Raises:
        AdapterFileError: The adapter cannot be read, or holds values that cannot be exported.
        ConfigError: An argument is wrong.
        RankError: The engine has no rank that is large enough.
        ExportError: The adapter has parts that a LoRA of this engine cannot express, or the result fails the check.
        OutputError: `output_dir` cannot be written.
    """
    rules = find_engine(engine)
    target = Path(output_dir)
    size = {"rank": rank, "energy": energy, "dtype": dtype}
    others = _other_parts(adapter, rules, base_model, size, revision, check)
    check_replaceable(target.expanduser(), overwrite=overwrite)
    with flags_kept(base_model):
        root, config, name = _find_adapter(
            adapter, base_model, adapter_name, revision, trust_remote_code=trust_remote_code
        )
    for bank in (b for _, b in find_banks(root) if b.unverified):
        verify_loaded(bank)  # weights that transformers loaded are held against their fingerprint on first use
    layers: dict[str, SharedLayer] = {
        p: m
        for p, m in base_modules(root).items()
        if isinstance(m, SharedLayer) and not isinstance(m, PicaExpert) and name in m.group_of
    }
    layers.update(adapted_experts(root, name))
    check_exportable(root, config, layers, rules)
    spectra = shared_spectra(layers, name)
    plan = plan_export(root, name, layers, spectra, rules, rank, energy, dtype, fill_siblings)
    for note in plan.notes:
        logger.warning("%s", note)
    if on_plan is not None:
        on_plan(plan)
    place = None if isinstance(adapter, nn.Module) else Path(adapter).expanduser()
    resized = {} if place is None else whole_tensors(root, place)
    if rules and rules.modules_to_save is not None and resized:
        raise ExportError(
            f"The adapter brings {next(iter(resized))}, resized for new tokens, and {rules.name} cannot load that. Merge "
            "the adapter into its base model instead (pica merge)."
        )
    recorded = base_model_name or config.base_model_name_or_path or getattr(root, "name_or_path", None) or None
    tensors = {
        **_tensors(layers, name, spectra, plan),
        **stack_tensors(root, name, spectra, plan.rank, plan.dtype),
        **_extra_tensors(root, name, plan.dtype),
        **{key: value.detach().cpu().to(plan.dtype).clone() for key, value in resized.items()},
    }
    if rules and rules.name == "diffusers":
        others = {f"{denoiser_name(type(root).__name__)}.{k}": v for k, v in tensors.items()} | others
    contents = LoraFolder(
        method=next(iter(layers.values())).method.name,
        tensors=tensors,
        config=_lora_config(config, plan, layers, recorded, revision),
        title=target.name,
        rows=plan.rows,
        exact=plan.exact,
        base=recorded or "BASE_MODEL",
        command=_command(plan, recorded, target),
        pipeline_tensors=others or None,
        gguf_base=getattr(root, "config", None) if rules and rules.name == "llama.cpp" else None,
    )
    with new_folder(target, overwrite=overwrite) as work:
        size = write_lora_folder(contents, work)
        if place is not None:
            copy_tokenizer(place, work)  # its new tokens belong to the adapter
        filled = {shape.path for shape in plan.filled}
        result = check_folder(root, name, work, spectra, filled, plan.rank, plan.dtype, check_inputs) if check else None
    return LoraExport(target, plan, len(layers) + len(filled), size, result, contents.command)


def _find_adapter(
    adapter: nn.Module | str | Path,
    base_model: nn.Module | str | None,
    name: str | None,
    revision: str | None,
    *,
    trust_remote_code: bool,
) -> tuple[nn.Module, PeftConfig, str]:
    """(base model with adapted layers, the adapter's configuration, its name)."""
    if not isinstance(adapter, nn.Module):
        folder = Path(adapter).expanduser()
        config = read_peft_config(folder)
        base = base_model
        if not isinstance(base, nn.Module):
            base = load_base_model(base, config, revision=revision, folder=folder, trust_remote_code=trust_remote_code)
        # on a copy of the module tree, so that a model that was passed in stays as it is
        base = share_tensors(base)
        fit_embeddings(base, folder, config)
        adapter = PeftModel.from_pretrained(base, str(folder))
        return adapter.get_base_model(), config, "default"
    if base_model is not None:
        raise ConfigError("base_model goes with a saved adapter; this model has its base model inside.")
    root = adapter.get_base_model() if isinstance(adapter, PeftModel) else adapter
    layers = [m for m in root.modules() if isinstance(m, SharedLayer)]
    known = sorted({n for m in layers for n in m.group_of})
    active = sorted({n for m in layers for n in m.active_adapters if n in known})
    if name is None and len(active) == 1:
        name = active[0]
    if name is None or name not in known:
        there = f"it has {', '.join(known)}" if known else "it has none"
        asked = f"adapter {name!r}" if name else "one active adapter (pass adapter_name)"
        raise ConfigError(f"An export needs {asked} of method PiCa or SVFT in the model; {there}.")
    configs: Any = getattr(adapter, "peft_config", {})
    return root, configs[name], name


def _tensors(
    layers: Mapping[str, SharedLayer], name: str, spectra: Mapping[str, SharedSpectrum], plan: ExportPlan
) -> dict[str, Tensor]:
    """{path: ...} of every LoRA tensor under PEFT's names. Nothing is shared, as safetensors demands."""
    tensors = {}
    for path, layer in layers.items():
        if isinstance(layer, PicaExpert):
            continue
        a, b = layer_factors(layer, name, spectra[path], plan.rank, plan.dtype)
        if isinstance(layer.get_base_layer(), nn.Embedding):
            tensors[f"{path}.lora_embedding_A"], tensors[f"{path}.lora_embedding_B"] = a, b
            continue
        ones = (1,) * layer.frozen.kernel_dims  # of a convolution both factors are convolutions too
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = (
            a.view(*a.shape, *ones),
            b.view(*b.shape, *ones),
        )
    for shape in plan.filled:
        ones = (1,) * shape.kernel_dims
        tensors[f"{shape.path}.lora_A.weight"] = torch.zeros(plan.rank, shape.in_features, *ones, dtype=plan.dtype)
        tensors[f"{shape.path}.lora_B.weight"] = torch.zeros(shape.out_features, plan.rank, *ones, dtype=plan.dtype)
    return tensors


def _extra_tensors(root: nn.Module, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Fully trained modules (`modules_to_save`) of the adapter, under the names that PEFT saves them with."""
    extra = {}
    for path, module in root.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrapper: Any = module  # PEFT declares the method without the state dict that every subclass takes
            for key, value in wrapper.adapter_state_dict(name, wrapper.state_dict()).items():
                value = value.detach().cpu()
                extra[f"{path}.{key}"] = (value.to(dtype) if value.is_floating_point() else value).clone()
    return extra


def _lora_config(
    config: PeftConfig, plan: ExportPlan, layers: Mapping[str, SharedLayer], base: str | None, revision: str | None
) -> dict[str, Any]:
    """adapter_config.json: the fields that engines read, and no newer ones, which older readers would stumble over."""
    task = getattr(config.task_type, "value", config.task_type)
    linear = [layer for layer in layers.values() if not isinstance(layer.get_base_layer(), nn.Embedding)]
    return {
        "alpha_pattern": {},
        "auto_mapping": config.auto_mapping,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": bool(linear) and all(layer.frozen.transposed for layer in linear),
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": plan.rank,
        "lora_dropout": 0.0,
        "modules_to_save": sorted(getattr(config, "modules_to_save", None) or []) or None,
        "peft_type": "LORA",
        "r": plan.rank,
        "rank_pattern": {},
        "revision": revision or config.revision,
        "target_modules": list(plan.target_modules),
        **({"target_parameters": list(plan.target_parameters)} if plan.target_parameters else {}),
        "task_type": task,
        "use_dora": False,
        "use_rslora": False,
    }


def _command(plan: ExportPlan, base: str | None, target: Path) -> str:
    if plan.engine is None:
        return ""
    name = target.name or "adapter"
    return plan.engine.command(base=base or "BASE_MODEL", folder=str(target), name=name, rank=plan.rank)


def _other_parts(
    adapter: nn.Module | str | Path,
    engine: Engine | None,
    base_model: nn.Module | str | None,
    size: Mapping[str, Any],
    revision: str | None,
    check: bool,
) -> dict[str, Tensor]:
    """What else of a pipeline a saved adapter holds: its text encoder's LoRA, under the names that diffusers reads."""
    place = None if isinstance(adapter, nn.Module) else adapter_folders(Path(adapter).expanduser()).get(TEXT_ENCODER)
    if place is None:
        return {}
    if engine is None or engine.name != "diffusers":
        logger.warning("The adapter of the text encoder is left out: only engine diffusers takes it (--for diffusers).")
        return {}
    config = read_peft_config(place)
    pipeline = None if isinstance(base_model, nn.Module) else base_model
    encoder = load_base_model(pipeline, config, revision=revision, folder=place)
    with tempfile.TemporaryDirectory() as work:
        made = export_lora(place, Path(work) / "lora", encoder, revision=revision, check=check, **size)
        tensors = load_file(made.folder / "adapter_model.safetensors")
    plain = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return text_encoder_tensors(plain, type(encoder).__name__, nested=hasattr(encoder, "text_model"))
