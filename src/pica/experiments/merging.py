"""An adapter and its base model made into one plain model folder."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from pica.adapters.dequantise import merge_in_full
from pica.errors import AdapterFileError
from pica.experiments import output as files
from pica.experiments.assessing import run_of
from pica.experiments.models import (
    DTYPES,
    base_of,
    load_adapter,
    load_classifier,
    load_config,
    load_image_processor,
    load_model,
    load_tokenizer,
    locate,
    task_type_of,
)
from pica.experiments.recipe import ModelSection


def merge(adapter: Path, target: Path, *, base: str | None = None, dtype: str = "auto") -> Path:
    """Write the merged model and its tokenizer or image processor to `target`, a folder for transformers without pica.

    For an adapter of a pipeline of diffusers, `target` is a pipeline folder.

    The sum W + dW is formed in float32 and rounded once. An adapter that a run trained on a quantised base model is merged
    into the dequantised weights, so that the result computes what was trained, at the size of the unquantised model.

    Args:
        adapter: Adapter folder, of any PEFT method.
        target: New or empty folder.
        base: Base model; as recorded in the adapter if None.
        dtype: "float32", "bfloat16", "float16", or "auto" for that of the base model's files.

    Returns:
        `target`.

    Raises:
        AdapterFileError: The adapter or its base is not to be had, or the result does not fit the precision.
        OutputError: `target` is not empty or can't be written.
    """
    files.check_free(target, overwrite=False)
    run = run_of(adapter)
    # W_q + dW: the adapter was trained on the quantised weights, and its basis may be theirs
    kind = None if run is None else run.model.quantization
    section = ModelSection(path=base_of(adapter, base), dtype="float32", quantization=kind)
    if (Path(locate(section.path)) / "model_index.json").is_file() or _of_diffusers(adapter):
        from pica.experiments.diffusion.merging import merge_pipeline  # diffusers is an extra, and takes its seconds

        return merge_pipeline(adapter, target, section, dtype=DTYPES.get(dtype))
    chosen = DTYPES[dtype] if dtype in DTYPES else _stored_dtype(section)
    if _sees_pictures(adapter, section):
        processor = load_image_processor(section)
        model, _ = load_classifier(section, AutoModelForImageClassification, labels=_classes(adapter), seed=0)
    elif task_type_of(adapter) == "SEQ_CLS":
        processor = load_tokenizer(section, generates=False)
        model, _ = load_classifier(section, AutoModelForSequenceClassification, labels=_classes(adapter), seed=0)
    else:
        processor = load_tokenizer(section)
        model = load_model(section)
    loaded = load_adapter(model, adapter)
    quantised = section.quantization is not None or getattr(model, "hf_quantizer", None) is not None
    merged = merge_in_full(loaded) if quantised else loaded.merge_and_unload()
    assert isinstance(merged, PreTrainedModel)
    merged = merged.to(chosen)  # pyright: ignore[reportArgumentType]
    for name, parameter in merged.named_parameters():
        if not torch.isfinite(parameter).all():
            raise AdapterFileError(f"Merged weight {name} is not finite in {chosen}; choose another with --dtype.")
    with files.atomic_folder(target, replace=False) as partial:
        merged.save_pretrained(str(partial))
        processor.save_pretrained(str(partial))
    return target


def _of_diffusers(adapter: Path) -> bool:
    """Whether an adapter's file says that it belongs to a model of diffusers."""
    recorded = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("auto_mapping") or {}
    return str(recorded.get("parent_library", "")).startswith("diffusers.")


def _sees_pictures(adapter: Path, section: ModelSection) -> bool:
    """Whether an adapter classifies pictures. PEFT has no task type for that, so that its model must tell."""
    if task_type_of(adapter) is not None:
        return False
    kind = type(load_config(section))
    return kind in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING and kind not in MODEL_FOR_CAUSAL_LM_MAPPING


def _classes(adapter: Path) -> list[str] | None:
    """Names of a classifier's outputs, from its run, else as transformers numbers them; None for a single output."""
    recipe = run_of(adapter)
    if recipe is not None and recipe.task.labels is not None:
        return recipe.task.labels
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        heads = [name for name in file.keys() if name.endswith(_HEADS)]  # noqa: SIM118 -- the file object is no mapping
        outputs = max((file.get_slice(name).get_shape()[0] for name in heads), default=0)
    if not outputs:
        raise AdapterFileError(
            f"Adapter {str(adapter)!r} is for classification but holds no classifier; train it again."
        )
    return None if outputs == 1 else [f"LABEL_{number}" for number in range(outputs)]


_HEADS = ("classifier.weight", "score.weight", "classifier.out_proj.weight", "head.weight", "head.fc.weight")


def _stored_dtype(section: ModelSection) -> torch.dtype:
    """Precision that the base model's configuration names; float32 where it names none."""
    stored = load_config(section).dtype
    return stored if isinstance(stored, torch.dtype) else DTYPES.get(str(stored), torch.float32)
