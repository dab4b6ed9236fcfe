"""Loading models and tokenizers from a folder, the hub or this package."""

import dataclasses
import logging
import os
import pickle
from collections.abc import Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import pica
from pica._devices import accelerator
from pica.adapters.base_model import model_class_of
from pica.adapters.fitting import fit_embeddings, has_tokenizer, output_options, whole_shapes
from pica.errors import AdapterFileError, ConfigError, PicaError
from pica.experiments.recipes.checks import model_problem
from pica.experiments.recipes.recipe import ModelSection
from pica.files.documents import read_json
from pica.foreign_code import code_options, code_refusal, nothing_asked, wants_code
from pica.text import first_line

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device() -> torch.device:
    """Choose the device.

    Returns:
        The one that `PICA_DEVICE` (`--device` of the command line) names; else the accelerator, or the CPU without one.
    Raises:
        ConfigError: PyTorch finds no device of the kind that is named.
    """
    wanted, found = os.environ.get("PICA_DEVICE", "").partition(":")[0], accelerator() or torch.device("cpu")
    if wanted in ("", found.type):
        return found
    if wanted == "cpu":
        return torch.device("cpu")
    there = "no accelerator" if found.type == "cpu" else found.type
    raise ConfigError(
        f"Device {wanted} was asked for, and PyTorch {torch.__version__} does not find one (it finds {there}). Leave "
        "--device (or PICA_DEVICE) out, or install a PyTorch that is built for it and check its driver."
    )


def locate(path: str) -> str:
    """Find a model.

    Returns:
        Absolute folder of a local one (so that an adapter finds it from anywhere), or the hub name unchanged.
    Raises:
        ConfigError: The location can't be a model.
    """
    if problem := model_problem(path):
        raise ConfigError(problem[0].upper() + problem[1:])
    if path == "embedded":
        return str(resources.files("pica") / "assets" / "tiny-llama")
    folder = Path(path).expanduser()
    return str(folder.resolve()) if folder.is_dir() else path


def load_model(section: ModelSection) -> PreTrainedModel:
    """Load the frozen base model of a generation task.

    Returns:
        The model, in evaluation mode on the CPU.
    Raises:
        ConfigError: The folder is incomplete, or the hub has no such model or cannot be reached.
    """
    options = _options(section)
    if section.quantization is not None:
        options["quantization_config"] = quantisation(section)
    return read_pretrained(AutoModelForCausalLM, section, options).eval()


def quantisation(section: ModelSection) -> BitsAndBytesConfig:
    """Make bitsandbytes' settings.

    Returns:
        4-bit weights with double quantisation, as QLoRA has them, computing in `section.dtype`; or 8-bit ones.
    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"model.quantization={section.quantization!r} needs bitsandbytes, which is not installed: "
            "pip install 'pica-peft[quantised]'."
        )
    if section.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.bfloat16 if section.dtype == "auto" else DTYPES[section.dtype]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=str(section.quantization),
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def load_classifier(
    section: ModelSection, auto_class: Any, *, labels: Sequence[str] | None, seed: int
) -> tuple[PreTrainedModel, list[str]]:
    """A model with a classification head, in evaluation mode on the CPU.

    Args:
        section: Which model.
        auto_class: transformers' class that puts the head on, such as AutoModelForSequenceClassification.
        labels: Names of the classes, one output each; None: one output, for a regression.
        seed: Decides the initial values of layers that the model's files do not have; the global generator is left alone.

    Returns:
        The model, and the names of the modules that are newly made, since they must be trained and stored.

    Raises:
        ConfigError: As `load_model`, or the files lack weights of the model's body, or it is to be quantised.
    """
    if section.quantization is not None:
        raise ConfigError(
            f"model.quantization={section.quantization!r} is for tasks that generate text; a classifier's new head would be "
            "quantised before it is trained. Leave it out."
        )
    options = _options(section) | {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if labels is None:
        options |= {"num_labels": 1, "problem_type": "regression"}
    else:
        options |= {**names_of_outputs(labels), "problem_type": "single_label_classification"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, found = read_pretrained(auto_class, section, options)
    missing = [*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])]
    body = f"{model.base_model_prefix}."
    inner = _head_within(model)
    if lost := sorted(key for key in missing if key.startswith(body) and not key.startswith(inner)):
        raise ConfigError(
            f"Model {section.path!r} lacks {len(lost)} of the weights that {type(model).__name__} needs, such as "
            f"{lost[0]}; it is another kind of model, or its files are damaged."
        )
    # Within the body the smallest module, outside it (heads, poolers) the outermost: PEFT saves a head as one.
    new = {key.rpartition(".")[0] if key.startswith(body) else key.partition(".")[0] for key in missing}
    return model.eval(), sorted(new)


def names_of_outputs(labels: Sequence[str]) -> dict[str, Any]:
    """Options for `from_pretrained` that name a classifier's outputs."""
    names = dict(enumerate(labels))
    return {"num_labels": len(names), "id2label": names, "label2id": {name: index for index, name in names.items()}}


def load_base_of(
    adapter: Path, section: ModelSection, *, labels: Sequence[str] | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """The base model of an adapter of any task, with as many outputs as the adapter's head, on the CPU.

    Args:
        adapter: Its folder.
        section: Which model.
        labels: Names of a classifier's outputs; those of the base model, or numbers, where they are not as many.
    Returns:
        The model, and the names of weights that neither its files nor the adapter's have (an embedder's pooler aside).
    Raises:
        AdapterFileError: The adapter cannot be read, or its head is of another kind of model.
        ConfigError: The model is not to be had.
    """
    try:
        config = peft.PeftConfig.from_pretrained(str(adapter))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterFileError(f"{str(adapter)!r} holds no readable adapter_config.json ({error}).") from error
    own = load_config(section)
    try:
        model_class: Any = model_class_of(locate(section.path), config, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise ConfigError(f"No class is known to load {section.path!r} by: {first_line(error)}") from error
    shapes = whole_shapes(adapter)
    options = output_options(model_class, own, shapes, trust_remote_code=section.trust_remote_code)
    if labels is not None and len(labels) == options.get("num_labels", own.num_labels):
        options |= names_of_outputs(labels)
    options |= _options(section) | {"output_loading_info": True}
    if section.quantization is not None:
        options["quantization_config"] = quantisation(section)
    model, found = read_pretrained(model_class, section, options)
    absent = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])} - set(shapes)
    if model_class is AutoModel:  # embedders are used without their pooler, and are trained and published without it
        absent = {name for name in absent if "pooler" not in name}
    return model.eval(), sorted(absent)


def _head_within(model: PreTrainedModel) -> tuple[str, ...]:
    """Beginnings of names within the body whose weights may be made anew: a pooler's, and the head of a timm model."""
    names = [name for name, _ in model.named_modules() if "pooler" in name]
    if timm := getattr(model, "timm_model", None):
        heads = timm.get_classifier()
        heads = heads if isinstance(heads, (tuple, list)) else (heads,)
        names += [name for name, module in model.named_modules() if any(module is head for head in heads)]
    return tuple(f"{name}." for name in names)


def load_config(section: ModelSection) -> PreTrainedConfig:
    """Load the model's configuration, without its weights.

    Returns:
        The configuration.
    Raises:
        ConfigError: It is not to be had.
    """
    return read_pretrained(AutoConfig, section, {})


def _options(section: ModelSection) -> dict[str, Any]:
    options: dict[str, Any] = {"dtype": "auto" if section.dtype == "auto" else DTYPES[section.dtype]}
    if section.attention is not None:
        options["attn_implementation"] = section.attention
    return options


def load_tokenizer(
    section: ModelSection, *, generates: bool = True, beside: Path | None = None
) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer.

    Args:
        section: Which model.
        generates: Whether texts are to be generated, which needs an end-of-text token.
        beside: An adapter's folder: a tokenizer that lies there goes before the base model's.
    Returns:
        The tokenizer, with a padding token.
    Raises:
        ConfigError: There is none, or it lacks a token that is needed.
    """
    own = beside if beside is not None and has_tokenizer(beside) else None
    tokenizer = read_pretrained(AutoTokenizer, section, {}, beside=own)
    if generates and tokenizer.eos_token_id is None:
        raise ConfigError(
            f"The tokenizer of {section.path!r} has no end-of-text token, so no answer could ever end; the model does not "
            "generate text."
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"The tokenizer of {section.path!r} has no padding token, so texts can't form a batch.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(section: ModelSection, *, beside: Path | None = None) -> Any:
    """Load what makes pictures into a model's input; one that lies in an adapter's folder goes before the base model's.

    Returns:
        That with Pillow where there is a choice: its pixels do not depend on whether torchvision is installed.
    Raises:
        ConfigError: The model has none.
    """
    own = beside if beside is not None and (beside / "preprocessor_config.json").is_file() else None
    return read_pretrained(AutoImageProcessor, section, {"backend": "pil"}, beside=own)


def load_adapter(model: PreTrainedModel, folder: Path, name: str = "default") -> peft.PeftModel:
    """Put a saved adapter, of any method that PEFT knows, on its base model, which gets as many tokens as the adapter has.

    Returns:
        The model with it, in evaluation mode.
    Raises:
        AdapterFileError: The folder holds no adapter, or one that is damaged or belongs to another model.
        PicaError: The method itself refuses the model.
    """
    pica.register()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():  # PEFT would look for it on the hub
            raise AdapterFileError(f"{str(folder)!r} is no adapter folder: it holds no {file}.")
    try:
        with nothing_asked():
            fit_embeddings(model, folder, peft.PeftConfig.from_pretrained(str(folder)))
            return peft.PeftModel.from_pretrained(model, str(folder), adapter_name=name).eval()
    except PicaError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise AdapterFileError(f"Adapter {str(folder)!r} cannot be loaded: {first_line(error)}") from error


def base_of(adapter: Path, base: str | None = None) -> str:
    """Find out where the base model of an adapter folder is.

    Returns:
        As given, else as recorded with the adapter.
    Raises:
        AdapterFileError: The folder holds no adapter, or its base model is not to be found.
    """
    recorded = _recorded(adapter).get("base_model_name_or_path")
    if base is not None:
        return base
    if recorded is not None and not isinstance(recorded, str):
        raise AdapterFileError(
            f"{str(adapter / 'adapter_config.json')!r}: base_model_name_or_path is {recorded!r}, not a name; name the base "
            "model with --base."
        )
    if recorded and (Path(recorded).is_absolute() and Path(recorded).parts[-3:] == ("pica", "assets", "tiny-llama")):
        return "embedded"  # the package may be installed elsewhere by now
    if not recorded:
        raise AdapterFileError(f"Adapter {str(adapter)!r} does not record its base model; name it with --base.")
    if problem := model_problem(recorded):
        raise AdapterFileError(f"The base model of adapter {str(adapter)!r}: {problem} Name it with --base.")
    return recorded


def revision_of(adapter: Path, base: str | None = None) -> str | None:
    """Read the revision of the base model that an adapter records.

    Returns:
        Branch, tag or commit; None where another base is named.
    Raises:
        AdapterFileError: The folder holds no readable adapter_config.json.
    """
    return None if base is not None else _recorded(adapter).get("revision")


def _recorded(adapter: Path) -> dict[str, Any]:
    try:
        config = read_json(adapter / "adapter_config.json")
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{str(adapter)!r} holds no readable adapter_config.json ({error}).") from None
    if not isinstance(config, dict):
        raise AdapterFileError(f"{str(adapter)!r} holds no readable adapter_config.json (it is no JSON object).")
    return config


def read_pretrained(loader: Any, section: ModelSection, options: dict[str, Any], *, beside: Path | None = None) -> Any:
    """Read with a loader of transformers, from the model, or from the adapter's folder `beside`.

    Returns:
        What it reads.
    Raises:
        ConfigError: It is not to be had.
    """
    if beside is not None:
        section = dataclasses.replace(section, path=str(beside), revision=None)
    location = locate(section.path) if beside is None else section.path
    local = Path(location).is_dir()
    try:
        return loader.from_pretrained(
            location,
            revision=section.revision or "main",
            local_files_only=local,  # a folder must not cause requests to the hub
            **code_options(section.trust_remote_code),
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, pickle.UnpicklingError) as error:
        if wants_code(error):
            raise ConfigError(f"Model {code_refusal(section.path)}") from error
        if local:
            raise ConfigError(f"Model folder {section.path!r} cannot be loaded: {first_line(error)}") from error
        raise ConfigError(
            f"Model {section.path!r} is no local folder, and loading it from the hub failed: {first_line(error)}"
        ) from error
