"""What an adapter would cost on a model of any size, from its configuration alone: nothing is loaded or allocated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedConfig

from pica.basis import max_rank
from pica.errors import ConfigError, PicaError
from pica.experiments.models import DTYPES, load_config, quantisation
from pica.experiments.plan.layout import adapt, build
from pica.experiments.plan.packing import resting_bytes
from pica.experiments.plan.sizes import (
    ADAPTER,
    adapted_layers,
    cache_bytes,
    file_bytes,
    group_rows,
    matrices_of,
)
from pica.experiments.plan.timing import basis_seconds
from pica.experiments.plan.tracing import StepTracer, TraceError, positions
from pica.experiments.recipes.recipe import ModelSection
from pica.experiments.results.plan import Estimate, Step, TrainingMemory
from pica.tuners.pica.config import PicaConfig

MOMENTS = 2  # AdamW's, each in the parameter's own dtype


@dataclass(frozen=True)
class Question:
    """What to plan.

    Attributes:
        model: Folder with config.json, hub name, or "embedded".
        r: Rank; with `budget` the largest one that fits is looked for instead.
        budget: Trained parameters at most, or bytes of the adapter's file where `budget_in_bytes`.
        target_modules: As PicaConfig's; None: the model family's default.
        target_parameters: As PicaConfig's: stacks of experts' weights.
        share: As PicaConfig's.
        lora_rank: Of the LoRA that is shown beside the one with as many parameters.
        batches, lengths: Of the training steps; all combinations. Lengths None: 512 tokens, or what positions there are.
        dtype: Of the frozen weights: float32, bfloat16, float16, or auto for the configuration's.
        quantization: nf4, fp4 or int8, as a recipe's `model.quantization`; None: not quantised.
        checkpointing: Whether activations are computed again in the backward pass.
        revision: Branch, tag or commit of a model on the hub.
        trust_remote_code: Run the Python code that comes with the model, if it has some.
    """

    model: str
    r: int = 32
    budget: int | None = None
    budget_in_bytes: bool = False
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    share: Any = "role"
    lora_rank: int = 16
    batches: Sequence[int] = (1, 8)
    lengths: Sequence[int] | None = None
    dtype: str = "auto"
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    checkpointing: bool = False
    revision: str | None = None
    trust_remote_code: bool = False


def estimate(question: Question, *, progress: Callable[[str], None] = lambda text: None) -> Estimate:
    """Work out a plan.

    Args:
        question: What to plan.
        progress: Is told what is being done.
    Returns:
        What the adapter and its training take.
    Raises:
        ConfigError: The model's configuration is not to be had or of no kind that can be built, a value is out of
            range, or no rank fits the budget.
        PicaError: PiCa refuses the targets.
    """
    _check(question)
    config = load_config(
        ModelSection(path=question.model, revision=question.revision, trust_remote_code=question.trust_remote_code)
    )
    if question.lengths is None:
        question = dataclasses.replace(question, lengths=[min(512, positions(config) or 512)])
    for length in question.lengths or ():
        if length > (positions(config) or length):
            raise ConfigError(f"--length {length} is more than the {positions(config)} positions that the model has.")
    dtype = _dtype(config, question.dtype)
    notes: list[str] = []
    if getattr(config, "quantization_config", None) is not None:
        counted = question.quantization or _name(dtype)
        notes.append(f"The model's own quantisation is left aside: weights are counted in {counted}.")
        delattr(config, "quantization_config")
    progress("Laying out the model")
    packing = None
    if question.quantization is not None:
        packing = quantisation(ModelSection(quantization=question.quantization, dtype=cast(Any, question.dtype)))
    lay_out = partial(build, config, dtype, packing, trust_remote_code=question.trust_remote_code)
    base = lay_out()
    kind, base_parameters, weights = type(base).__name__, _elements(base.parameters()), resting_bytes(base)
    r = question.r
    if question.budget is not None:
        r = _rank_within(question, adapt(lay_out(), _pica(question, 1), notes))
    adapted = adapt(base, _pica(question, r), notes)
    layers = adapted_layers(adapted)
    groups = group_rows(adapted, layers)
    parameters = sum(group.parameters for group in groups)
    basis_bytes = sum(group.basis_bytes for group in groups)
    progress("Timing the solver")
    seconds = sum(basis_seconds(layer.out_features, layer.in_features) for layer in layers)
    shapes = {group.name: (group.out_features, group.rank) for group in groups}
    m_dtype = next(iter(matrices_of(adapted).values())).dtype
    adapter_bytes = file_bytes(shapes, [layer.method.rank_of[ADAPTER] for layer in layers], m_dtype)
    memory = [_memory("PiCa", r, adapted, question, weights, basis_bytes, notes, progress)]
    widths = sum(layer.in_features + layer.out_features for layer in layers)
    for rank in dict.fromkeys((max(1, round(parameters / widths)), question.lora_rank)):
        lora = LoraConfig(r=rank, **_targets(adapted))
        try:
            model = adapt(lay_out(), lora, notes)
        except PicaError as error:
            notes.append(f"There is no LoRA beside it: {error}")
            break
        memory.append(_memory("LoRA", rank, model, question, weights, 0, notes, progress))
    return Estimate(
        model=question.model,
        kind=kind,
        dtype=_name(dtype),
        quantization=question.quantization,
        model_parameters=base_parameters,
        r=r,
        groups=groups,
        parameters=parameters,
        adapter_bytes=adapter_bytes,
        basis_bytes=basis_bytes,
        cache_bytes=cache_bytes(layers, dtype),
        basis_seconds=seconds,
        memory=memory,
        notes=list(dict.fromkeys(notes)),
    )


# ---- the model ---------------------------------------------------------------------------------------------------------


def _pica(question: Question, r: int) -> PicaConfig:
    return PicaConfig(
        r=r, target_modules=question.target_modules, target_parameters=question.target_parameters, share=question.share
    )


def _targets(adapted: PeftModel) -> dict[str, Any]:
    """What another method has to be told to adapt the same."""
    config: Any = adapted.peft_config[ADAPTER]
    names = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
    return {"target_modules": names, "target_parameters": config.target_parameters}


def _dtype(config: PreTrainedConfig, name: str) -> torch.dtype:
    if name != "auto":
        return DTYPES[name]
    found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return found if isinstance(found, torch.dtype) else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _elements(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() for t in tensors)


# ---- the budget --------------------------------------------------------------------------------------------------------


def _rank_within(question: Question, model: PeftModel) -> int:
    """Find the largest rank whose adapter fits the budget; `model` has one of rank 1.

    Returns:
        The rank.
    Raises:
        ConfigError: Not even rank 1 fits.
    """
    assert question.budget is not None
    layers, slot = adapted_layers(model), matrices_of(model)
    limits = [max_rank(layer.out_features, layer.in_features) for layer in layers]
    of_group: dict[str, int] = {}
    for layer, limit in zip(layers, limits):
        key = layer.group_of[ADAPTER]
        of_group[key] = max(of_group.get(key, 0), limit)
    dtype = next(iter(slot.values())).dtype

    def size(r: int) -> int:
        shapes = {key: (matrix.shape[0], min(r, of_group[key])) for key, matrix in slot.items()}
        if question.budget_in_bytes:
            return file_bytes(shapes, [min(r, limit) for limit in limits], dtype)
        return sum(rows * columns for rows, columns in shapes.values())

    # A file grows with r but for small steps where its fingerprint takes a tighter form, so the last that fits counts.
    best, r = 0, 1
    fewest = sum(matrix.shape[0] for matrix in slot.values()) * (dtype.itemsize if question.budget_in_bytes else 1)
    while r <= max(limits) and (r == 1 or min(r, min(limits)) * fewest <= question.budget):
        best = r if size(r) <= question.budget else best
        r += 1
    if not best:
        unit = "bytes" if question.budget_in_bytes else "parameters"
        raise ConfigError(
            f"--budget {question.budget:,} {unit} is too small: already r=1 takes {size(1):,}. Allow more, or name fewer "
            "layers with --target-modules."
        )
    return best


# ---- memory ------------------------------------------------------------------------------------------------------------


def _memory(
    method: str,
    rank: int,
    model: PeftModel,
    question: Question,
    weights: int,
    basis: int,
    notes: list[str],
    progress: Callable[[str], None],
) -> TrainingMemory:
    progress(f"Running a training step of {method} r={rank} without content")
    trained = [p for p in model.parameters() if p.requires_grad]
    adapter = sum(p.nbytes for p in trained)
    optimizer = MOMENTS * adapter
    fixed = weights + basis + adapter + optimizer
    steps = _steps(model, question, fixed, f"{method} r={rank}", notes)
    return TrainingMemory(
        method=method,
        rank=rank,
        parameters=_elements(trained),
        weights=weights,
        basis=basis,
        adapter=adapter,
        optimizer=optimizer,
        steps=steps,
    )


def _steps(model: PeftModel, question: Question, fixed: int, label: str, notes: list[str]) -> list[Step]:
    lengths = question.lengths or ()
    tracer = StepTracer(model, checkpointing=question.checkpointing)
    steps = []
    for length in lengths:
        for batch in question.batches:
            try:
                found = tracer.peak(batch, length)
            except TraceError as error:
                notes.append(f"{label}: no estimate of activations, since the step cannot run without values: {error}")
                return [
                    Step(batch=b, length=n, activations=None, total=None) for n in lengths for b in question.batches
                ]
            steps.append(Step(batch=batch, length=length, activations=found, total=fixed + found))
    return steps


def _check(question: Question) -> None:
    values = {"--r": [question.r], "--lora-rank": [question.lora_rank], "--batch": question.batches}
    values |= {
        "--length": [1] if question.lengths is None else question.lengths,
        "--budget": [1 if question.budget is None else question.budget],
    }
    for name, given in values.items():
        if not given or min(given) < 1:
            raise ConfigError(f"{name} must be 1 or more, got {', '.join(map(str, given)) or 'nothing'}.")
