"""Does a written LoRA folder do what the adapter does? Asked of plain PEFT, on the same base model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from pica.adapters.base_model import flags_kept, share_tensors
from pica.adapters.export.expert_factors import expected_updates, lora_update
from pica.adapters.export.factors import SharedSpectrum
from pica.adapters.pipelines import denoiser_inputs
from pica.basis import full_precision
from pica.errors import ExportError
from pica.tuners.base.bank import BANK_NAMES
from pica.tuners.base.layer import SharedLayer
from pica.tuners.pica.experts import AdaptedExperts, PicaExpert

# Half-precision models up to this size are compared in float32, on a copy: rounding in a deep model would otherwise hide
# what is measured, and processors without half-precision arithmetic are slow at it.
_WIDEN_BYTES = 6 * 2**30
_PROBES = 8  # random vectors that stand for all inputs of a layer
_SAMPLES, _TOKENS = 2, 16


@dataclass(frozen=True)
class CheckResult:
    """What the check measured on a random batch.

    Attributes:
        logits: Largest |difference| between the outputs of the adapted model and of the reloaded LoRA.
        effect: Largest |difference| between the outputs of the adapted model and of the base model, to compare with.
        scale: Largest |output| of the adapted model.
        layers: Largest relative error of a layer's update.
        dtype: Precision of the models that were compared.
    """

    logits: float
    effect: float
    scale: float
    layers: float
    dtype: torch.dtype


def check_folder(
    root: nn.Module,
    adapter: str,
    folder: Path,
    spectra: Mapping[str, SharedSpectrum],
    filled: set[str],
    rank: int,
    dtype: torch.dtype,
    inputs: Mapping[str, Tensor] | None,
) -> CheckResult:
    """Load `folder` with plain PEFT on the base of `root`, compare each layer's update and the model's output.

    `root` (a base model with adapted layers) is not touched: everything happens on copies, which share its tensors
    where they are not widened.

    Args:
        root: The base model with the layers that were exported.
        adapter: Its name there.
        folder: The export.
        spectra: {path: shared matrix} of the exported layers.
        filled: Paths that got a zero adapter.
        rank: Rank of the export; layers with more directions are truncated, and may miss what they are known to miss.
        dtype: Precision of the file; PEFT may load it in a finer one.
        inputs: Keyword arguments of the model's forward pass; by default random ones that fit its configuration.
    Returns:
        What was compared, and by how much it differs.
    Raises:
        ExportError: The reloaded adapter has other layers, another update or another output than it should.
    """
    with flags_kept(root), torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, about what is checked here
        adapted = _copy_to_compare(root).eval()
        batch = _batch(adapted, inputs)
        layers = {p: m for p, m in adapted.named_modules() if isinstance(m, SharedLayer)}
        stacks = expected_updates(adapted, adapter, spectra, rank)
        _activate(adapted, adapter)
        expected = output_of(adapted, batch)
        plain = plain_copy(adapted)
        base = output_of(plain, batch)
        reloaded = _reload(plain, folder)
        plain_spectra = {p: s for p, s in spectra.items() if p in layers}  # experts are in `stacks`
        worst = _compare_layers(reloaded, layers, adapter, plain_spectra, filled, rank, torch.finfo(dtype).eps)
        worst = max(worst, _compare_stacks(reloaded, stacks, torch.finfo(dtype).eps))
        found = output_of(reloaded, batch)
    scale = float(expected.abs().max())
    result = CheckResult(_gap(found, expected), _gap(expected, base), scale, worst, expected.dtype)
    exact = all(s.rank <= rank for s in spectra.values())
    eps = max(torch.finfo(dtype).eps, torch.finfo(expected.dtype).eps)
    rounding = (256 if eps < 1e-5 else 16) * eps * result.scale  # depth amplifies it: 12 eps in SmolLM2
    # The layers were compared above; this catches what lies outside them, such as modules_to_save that did not load.
    if not torch.isfinite(found).all() or (exact and result.logits > max(rounding, 0.5 * result.effect)):
        raise ExportError(
            f"The exported LoRA does not give the adapted model's output: they differ by {result.logits:.3g} where the "
            f"adapter itself changes the output by {result.effect:.3g}. Nothing was written; please report this."
        )
    return result


def _reload(plain: nn.Module, folder: Path) -> PeftModel:
    """Load the folder with plain PEFT.

    Returns:
        The reloaded model.
    Raises:
        ExportError: PEFT takes names of layers for those of experts, as it does where transformers keeps the experts of a
            family as one parameter that once were layers.
        ValueError: Whatever else PEFT refuses.
    """
    try:
        reloaded = PeftModel.from_pretrained(plain, str(folder)).eval()
        if _parameters_of(reloaded.peft_config["default"]) == _parameters_of(PeftConfig.from_pretrained(str(folder))):
            return reloaded
        why = "it adapts experts instead"
    except ValueError as error:
        if "fused into" not in str(error):
            raise
        why = str(error).rstrip(".")
    family = getattr(getattr(plain, "config", None), "model_type", "such")
    raise ExportError(
        f"PEFT reads a LoRA on gate_proj, up_proj or down_proj of a {family} model as one on its experts ({why}). "
        "Leave these layers out of target_modules, merge the adapter (pica merge), or export without the check "
        "(check=False, --no-check) for an engine that reads them as they are."
    )


def _parameters_of(config: PeftConfig) -> set[str]:
    return set(getattr(config, "target_parameters", None) or ())


def _compare_stacks(reloaded: PeftModel, stacks: Mapping[str, tuple[Tensor, float]], eps: float) -> float:
    """Largest relative error of the update of a stack of experts; raises where one is larger than it may be."""
    worst, found = 0.0, set()
    for path, module in reloaded.get_base_model().named_modules():
        if not isinstance(module, ParamWrapper):
            continue
        name, update = lora_update(module)
        key = f"{path.replace('.base_layer', '')}.{name}"
        wanted, allowed = stacks.get(key, (torch.zeros_like(update), 0.0))
        found.add(key)
        gap = float((update.to(wanted) - wanted).norm() / wanted.norm().clamp(min=torch.finfo(wanted.dtype).tiny))
        if not gap <= allowed * (1 + 1e-6) + 16 * eps:
            raise ExportError(
                f"{key}: the exported update differs from the adapter's by {gap:.2g} of its size, where {allowed:.2g} is "
                "allowed. Nothing was written; please report this."
            )
        worst = max(worst, gap)
    if found != set(stacks):
        odd = sorted(found ^ set(stacks))
        raise ExportError(f"PEFT does not adapt {odd[0]} as it should. Nothing was written; please report this.")
    return worst


def _compare_layers(
    reloaded: PeftModel,
    layers: Mapping[str, SharedLayer],
    adapter: str,
    spectra: Mapping[str, SharedSpectrum],
    filled: set[str],
    rank: int,
    eps: float,
) -> float:
    """Largest relative error of a layer's update on random inputs; raises where one is larger than it may be."""
    lora = {
        p: m
        for p, m in reloaded.get_base_model().named_modules()
        if type(m) is not ParamWrapper and isinstance(m, LoraLayer)
    }
    if set(lora) != {*spectra, *filled}:
        odd = sorted(set(lora) ^ {*spectra, *filled})
        raise ExportError(
            f"The exported folder does not reload as it should: PEFT adapts {len(lora)} layers of the expected "
            f"{len(spectra) + len(filled)}, the first that differs is {odd[0]}. Nothing was written; please report this."
        )
    worst = 0.0
    for path, module in lora.items():
        a, b = _factors(module)
        dtype = torch.promote_types(a.dtype, torch.float32)
        generator = torch.Generator().manual_seed(0)
        probes = torch.randn(a.shape[1], _PROBES, generator=generator).to(device=a.device, dtype=dtype)
        with full_precision(a.device):
            found = module.scaling["default"] * (b.to(dtype) @ (a.to(dtype) @ probes))  # (out, probes)
            wanted, allowed = torch.zeros_like(found), 0.0
            if path in spectra:
                layer, spectrum = layers[path], spectra[path]
                left, rows = layer.method.frames(adapter)
                core = layer.method.core(adapter).to(rows)
                if layer.method.transposed(adapter):
                    wanted = rows.T @ (core.T @ probes.to(rows))
                else:
                    wanted = core @ (rows @ probes.to(rows))
                wanted = (wanted if left is None else left @ wanted).to(found)
                # a few random inputs see the known error only within a factor
                allowed = 3 * spectrum.row(rank).relative + 16 * eps
        norm = float(wanted.norm())
        relative = float((found - wanted).norm()) / norm if norm else float(found.abs().max())
        if not relative <= allowed:
            raise ExportError(
                f"{path}: the exported update differs from the adapter's by {relative:.2g} of its size, where "
                f"{allowed:.2g} is allowed. Nothing was written; please report this."
            )
        worst = max(worst, relative)
    return worst


def _factors(module: LoraLayer) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) of a LoRA layer."""
    if "default" in module.lora_embedding_A:
        return module.lora_embedding_A["default"], module.lora_embedding_B["default"]
    a, b = (cast(Tensor, factors["default"].weight) for factors in (module.lora_A, module.lora_B))
    return a.flatten(1), b.flatten(1)


def _copy_to_compare(root: nn.Module) -> nn.Module:
    """A copy of the model: in float32 where it is a half-precision one of moderate size, else sharing its tensors."""
    dtypes = {p.dtype for p in root.parameters()}
    size = sum(p.numel() for p in root.parameters())
    quantised = any(m.frozen.quantised for m in root.modules() if isinstance(m, SharedLayer))
    if not dtypes & {torch.float16, torch.bfloat16} or quantised or 4 * size > _WIDEN_BYTES:
        return share_tensors(root)
    return copy.deepcopy(root).float()


def _batch(model: nn.Module, inputs: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The inputs to compare on, in the model's precision."""
    first = next(model.parameters())
    batch = dict(inputs) if inputs is not None else example_inputs(model, first.device)
    return {k: v.to(first.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()}


def _activate(model: nn.Module, adapter: str) -> None:
    """Make `adapter` the one that every layer of `model` applies."""
    for module in model.modules():
        if isinstance(module, SharedLayer):
            module.enable_adapters(True)
            module.set_adapter([adapter])
        elif isinstance(module, AuxiliaryTrainingWrapper):
            has_it = adapter in module._adapters
            module.enable_adapters(has_it)
            if has_it:
                module.set_adapter(adapter)


def plain_copy(root: nn.Module) -> nn.Module:
    """The base model of `root` without any trace of adapters, sharing its tensors."""
    plain = share_tensors(root)
    ours = (SharedLayer, AdaptedExperts, AuxiliaryTrainingWrapper)
    wrapped = [(n, m) for n, m in plain.named_modules() if isinstance(m, ours) and not isinstance(m, PicaExpert)]
    for path, module in wrapped:
        parent_path, _, name = path.rpartition(".")
        inner = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module.base_layer
        setattr(plain.get_submodule(parent_path), name, inner)
    for name in BANK_NAMES:
        plain._modules.pop(name, None)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if attribute in vars(plain):
            delattr(plain, attribute)
    return plain


def example_inputs(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Make inputs for a transformers model that reads tokens or images, or for a diffusers denoiser.

    Args:
        model: Whose configuration says what it reads.
        device: Where to.
    Returns:
        Random keyword arguments of its forward pass, the same each time.
    Raises:
        ExportError: The model's configuration does not say what it reads.
    """
    if (denoising := denoiser_inputs(model)) is not None:
        return denoising
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    generator = torch.Generator().manual_seed(0)
    if name == "input_ids" and config is not None:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        tokens = torch.randint(0, text.vocab_size, (_SAMPLES, _TOKENS), generator=generator)
        mask = torch.ones_like(tokens)
        batch = {"input_ids": tokens, "attention_mask": mask}
        if getattr(config, "is_encoder_decoder", False):
            batch["decoder_input_ids"] = tokens.flip(1)
        return {k: v.to(device) for k, v in batch.items()}
    size = getattr(config, "image_size", None)
    if name == "pixel_values" and isinstance(size, (int, list, tuple)):
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.randn(_SAMPLES, getattr(config, "num_channels", 3), height, width, generator=generator)
        return {"pixel_values": pixels.to(device=device, dtype=next(model.parameters()).dtype)}
    raise ExportError(
        f"No example input is known for {type(model).__name__}, so the export cannot be checked; pass check_inputs "
        "(keyword arguments of its forward pass), or check=False (--no-check)."
    )


def output_of(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The model's logits, or the first tensor that it returns, in at least float32."""
    result: Any = model(**batch)
    logits = getattr(result, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    values = [result] if isinstance(result, Tensor) else list(result.values() if hasattr(result, "values") else result)
    return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())


def _gap(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())
