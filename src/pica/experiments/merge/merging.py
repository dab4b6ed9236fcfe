"""An adapter and its base model made into one plain model folder."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from pica.adapters.merge import merge_in_full
from pica.errors import AdapterFileError
from pica.experiments.evaluate.assessing import run_of
from pica.experiments.merge.companions import Companions
from pica.experiments.models import DTYPES, base_of, load_adapter, load_base_of, load_config, locate, revision_of
from pica.experiments.recipes.recipe import ModelSection
from pica.files import output as files
from pica.files.documents import read_json
from pica.text import first_line


def merge(
    adapter: Path,
    target: Path,
    *,
    base: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Path:
    """Write the merged model and what makes its inputs to `target`, a folder for transformers without pica.

    The model is of whatever class the adapter's task or its own record names. Tokenizer, processors, generation settings
    and the parts around a sentence-transformers model are the adapter's own where they lie beside it, else the base's.
    For an adapter of a pipeline of diffusers, `target` is a pipeline folder.

    The sum W + dW is formed in float32 and rounded once. An adapter that a run trained on a quantised base model is merged
    into the dequantised weights, so that the result computes what was trained, at the size of the unquantised model.

    Args:
        adapter: Adapter folder, of any PEFT method.
        target: New or empty folder.
        base: Base model; as recorded in the adapter if None.
        dtype: "float32", "bfloat16", "float16", or "auto" for that of the base model's files.
        trust_remote_code: Run the Python code that comes with the base model, if it has some; what a run's recipe says of
            that does not count, since it may have come with the adapter.

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
    section = ModelSection(
        path=base_of(adapter, base),
        revision=revision_of(adapter, base),
        dtype="float32",
        quantization=kind,
        trust_remote_code=trust_remote_code,
    )
    if (Path(locate(section.path)) / "model_index.json").is_file() or _of_diffusers(adapter):
        from pica.experiments.pipelines.diffusion.merging import (
            merge_pipeline,  # diffusers is an extra, and takes its seconds
        )

        return merge_pipeline(adapter, target, section, dtype=DTYPES.get(dtype))
    chosen = DTYPES[dtype] if dtype in DTYPES else _stored_dtype(section)
    companions = Companions(adapter, section)
    model, absent = load_base_of(adapter, section, labels=run and run.task.labels)
    if absent:
        raise AdapterFileError(
            f"Neither the base model nor adapter {str(adapter)!r} holds {absent[0]}, so the merged model would guess; train "
            "the adapter again with such new layers in modules_to_save, or name the right base model with --base."
        )
    loaded = load_adapter(model, adapter)
    if not hasattr(loaded, "merge_and_unload"):
        kind = next(iter(loaded.peft_config.values())).peft_type
        method = getattr(kind, "value", kind)
        raise AdapterFileError(f"Adapter {str(adapter)!r} ({method}) changes no weights, so there is nothing to merge.")
    quantised = section.quantization is not None or getattr(model, "hf_quantizer", None) is not None
    try:
        merged = merge_in_full(loaded) if quantised else loaded.merge_and_unload()
    except (NotImplementedError, ValueError) as error:
        raise AdapterFileError(f"Adapter {str(adapter)!r} cannot be merged: {first_line(error)}") from error
    assert isinstance(merged, PreTrainedModel)
    merged = merged.to(chosen)  # pyright: ignore[reportArgumentType]
    for name, parameter in merged.named_parameters():
        if not torch.isfinite(parameter).all():
            raise AdapterFileError(f"Merged weight {name} is not finite in {chosen}; choose another with --dtype.")
    if (generation := companions.generation_config()) is not None and merged.can_generate():
        merged.generation_config = generation
    with files.atomic_folder(target, replace=False) as partial:
        merged.save_pretrained(str(partial))
        companions.save(partial)
    return target


def _of_diffusers(adapter: Path) -> bool:
    """Whether an adapter's file says that it belongs to a model of diffusers."""
    recorded = read_json(adapter / "adapter_config.json").get("auto_mapping") or {}
    return str(recorded.get("parent_library", "")).startswith("diffusers.")


def _stored_dtype(section: ModelSection) -> torch.dtype:
    """Precision that the base model's configuration names; float32 where it names none."""
    stored = load_config(section).dtype
    return stored if isinstance(stored, torch.dtype) else DTYPES.get(str(stored), torch.float32)
