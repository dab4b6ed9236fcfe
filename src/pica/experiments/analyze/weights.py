"""Weights of two models, read one at a time from their safetensors files.

No model is ever in memory: a folder is an index of which file holds which tensor, and a tensor is read when it is asked for.
An adapter is put on a skeleton whose weights are mapped from the base model's files, not read, and merged layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pica.adapters.base_model import base_config, model_class_of
from pica.adapters.fitting import fit_embeddings, output_options, whole_shapes
from pica.basis.checkpoint import WeightFolder, renaming
from pica.errors import AdapterFileError, ConfigError, PicaError
from pica.experiments.models import locate
from pica.foreign_code import code_options, nothing_asked
from pica.text import first_line
from pica.tuners.base.layer import SharedLayer


def fetch(path: str) -> Path:
    """Find a model or adapter on disk, in this package ("embedded") or on the hub, code and pickles left there.

    Returns:
        Its folder.
    Raises:
        ConfigError: There is no such model.
    """
    for local in (Path(path).expanduser(), Path(path).expanduser() / "adapter"):  # the latter: output of `pica train`
        if (local / "adapter_config.json").is_file():
            return local
    folder = Path(locate(path))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
        except Exception as error:  # the hub client's errors have no common base
            reason = first_line(error)
            raise ConfigError(
                f"Model {path!r} is no local folder, and fetching it from the hub failed: {reason}"
            ) from error
    return folder


def open_folder(path: str) -> WeightFolder:
    """Open a model; see `fetch`.

    Returns:
        Its weights.
    Raises:
        ConfigError: There is no such model, or it has no safetensors files.
    """
    folder = fetch(path)
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{path!r} is an adapter; give the model it belongs to as BASE, and the adapter after it.")
    return WeightFolder(folder)


def skeleton(folder: WeightFolder, model_class: type | None = None, outputs: int | None = None) -> nn.Module | None:
    """Build the model's modules on the meta device, without weights.

    Args:
        folder: Its configuration names the architecture.
        model_class: A class of transformers to build instead of the one that the configuration names.
        outputs: Number of a head's outputs, where it is not the configuration's.
    Returns:
        None where transformers cannot build it.
    """
    import transformers

    if not folder.config:
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder.path), local_files_only=True, **code_options())
        if outputs is not None:
            config.num_labels = outputs
        names = config.architectures or ["AutoModel"]
        chosen = model_class or getattr(transformers, names[0])
        with torch.device("meta"):
            if hasattr(chosen, "from_config"):  # one of transformers' Auto classes
                return chosen.from_config(config, **code_options())
            return chosen._from_config(config)
    except Exception:  # whatever an architecture's own code raises: what is left is to go by names
        return None


@dataclass(frozen=True)
class Target:
    """A weight to analyse.

    Attributes:
        name: Of the base model's tensor.
        path: Of its module in the base model's files, without ".weight".
        transposed: Stored as (in, out), as transformers' Conv1D does.
    """

    name: str
    path: str
    transposed: bool = False


def linear_weights(folder: WeightFolder) -> list[Target]:
    """The matrices of linear layers; embeddings and the head over the vocabulary are left out."""
    # Where transformers cannot build the architecture, every matrix whose name does not speak of an embedding or a head
    # counts.
    from transformers.pytorch_utils import Conv1D

    matrices = {n: e for n, e in folder.entries.items() if n.endswith(".weight") and len(e.shape) == 2}
    built = skeleton(folder)
    if built is None:
        words = ("embed", "wte", "wpe", "lm_head", "shared.weight")
        return [Target(n, n.removesuffix(".weight")) for n in matrices if not any(word in n for word in words)]
    modules = dict(built.named_modules())
    module_of = renaming([name.removesuffix(".weight") for name in matrices], modules)
    head = built.get_output_embeddings() if hasattr(built, "get_output_embeddings") else None  # pyright: ignore[reportCallIssue]
    found = []
    for name in matrices:
        path = name.removesuffix(".weight")
        module = modules.get(module_of(path))
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head:
            found.append(Target(name, path, isinstance(module, Conv1D)))
    return found


class Tuned(Protocol):
    """The fine-tuned side: which of the base's weights it has, and each of them on demand."""

    notes: list[str]
    confined: str
    """Where the method keeps every update, whatever the task; "" if nowhere, or not known."""

    def has(self, target: Target) -> bool: ...

    def load(self, target: Target) -> Tensor:
        """The fine-tuned weight, in the layout of the base's file."""
        ...


class TunedFolder:
    """A fully fine-tuned model folder."""

    def __init__(self, base: WeightFolder, folder: WeightFolder) -> None:
        self.folder, self.notes, self.confined = folder, list[str](), ""
        self._name = renaming(base.entries, folder.entries)
        self._base = base

    def has(self, target: Target) -> bool:
        entry = self.folder.entries.get(self._name(target.name))
        if entry is None:
            return False
        if entry.shape != self._base.entries[target.name].shape:
            shapes = f"{self._base.entries[target.name].shape} and {entry.shape}"
            self.notes.append(f"{target.path} has different shapes in the two models, {shapes}; it is left out.")
            return False
        return True

    def load(self, target: Target) -> Tensor:
        return self.folder.load(self._name(target.name))


class TunedAdapter:
    """An adapter of any PEFT method on the base model.

    The base's weights are mapped from its files; the adapter is loaded by PEFT as always, and a layer's fine-tuned weight
    is what PEFT's own `merge` makes of a float32 copy of it. Memory: the adapter, what its method computes on loading
    (nothing of a weight's size for LoRA, DoRA, VeRA, LoHa, OFT, ...; the basis, (r, in), of each layer for PiCa; a new
    base weight for each layer for PiSSA and its kind), and one layer.
    """

    def __init__(self, base: WeightFolder, adapter: Path) -> None:
        """Put the adapter on the mapped base model.

        Raises:
            AdapterFileError: The adapter cannot be loaded on this base, or changes no weight of a linear layer.
            PicaError: Whatever else its method refuses.
        """
        import peft
        from peft.tuners.tuners_utils import BaseTunerLayer

        import pica

        pica.register()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (adapter / name).is_file():
                raise AdapterFileError(f"{str(adapter)!r} is no adapter folder: it holds no {name}.")
        self.notes: list[str] = []
        try:
            config = peft.PeftConfig.from_pretrained(str(adapter))
            shapes, model_class = whole_shapes(adapter), model_class_of(str(base.path), config)
            own = base_config(str(base.path))
            outputs = output_options(model_class, own, shapes).get("num_labels")
            model = mapped_model(base, model_class, outputs)
            fit_embeddings(model, adapter, config, shapes)
            with nothing_asked():
                carried = peft.PeftModel.from_pretrained(model, str(adapter)).eval()  # pyright: ignore[reportArgumentType]
        except PicaError:
            raise
        except Exception as error:  # each method raises what it likes
            raise AdapterFileError(
                f"Adapter {str(adapter)!r} cannot be loaded on {str(base.path)!r}: {first_line(error)}"
            ) from error
        self.confined = _confined(config)
        inner = carried.get_base_model()
        self._layers = {
            path: module
            for path, module in inner.named_modules()
            if isinstance(module, BaseTunerLayer)
            and isinstance(getattr(module.get_base_layer(), "weight", None), Tensor)
        }
        if not self._layers:
            raise AdapterFileError(
                f"Adapter {str(adapter)!r} ({config.peft_type}) changes no weights, so there is no update to analyse."
            )
        name_of = renaming([f"{path}.weight" for path in self._layers], base.entries)
        self._by_name = {name_of(f"{path}.weight"): module for path, module in self._layers.items()}
        self._method = str(getattr(config.peft_type, "value", config.peft_type))

    def has(self, target: Target) -> bool:
        return target.name in self._by_name

    def load(self, target: Target) -> Tensor:
        """Merge the adapter into one layer's weight, as PEFT does.

        Returns:
            The merged weight, float32.
        Raises:
            AdapterFileError: The method cannot be merged into this layer.
        """
        layer: Any = self._by_name[target.name]
        weight = layer.get_base_layer().weight
        mapped = weight.data
        weight.data = mapped.to(torch.float32, copy=True)  # merging writes in place, and must not write to the file
        try:
            with torch.no_grad():
                layer.merge()
                return layer.get_base_layer().weight.detach()
        except Exception as error:
            raise AdapterFileError(f"{target.path}: {self._method} cannot be merged into it: {error}") from error
        finally:
            layer.merged_adapters.clear()
            if isinstance(layer, SharedLayer):
                layer.frozen.forget_merge()
            layer.get_base_layer().weight = nn.Parameter(mapped, requires_grad=False)


def _confined(config: Any) -> str:
    """Where the method's own rule keeps every update, whatever the task: for a sentence; "" if nowhere."""
    method = str(getattr(config.peft_type, "value", config.peft_type))
    if method == "PICA":
        which = {"principal": "the top", "minor": "the last", "random": "random"}[config.projection]
        ranks = f"{config.r}" + (" (others in rank_pattern)" if config.rank_pattern else "")
        return (
            f"{which} {ranks} directions of each layer's column space"
            if which != "random"
            else f"{ranks} random directions"
        )
    if method == "SVFT":
        return "the singular vectors of each weight"
    if method == "PSOFT":
        return f"the top {config.r} singular directions of each weight, on both sides"
    return ""


def mapped_model(folder: WeightFolder, model_class: type, outputs: int | None = None) -> nn.Module:
    """Map a model's weights from its files: pages are read when they are touched, and can be dropped.

    Weights that the files lack (a new head, with as many `outputs` if given) are zero.

    Returns:
        The model, in evaluation mode.
    Raises:
        ConfigError: transformers cannot build the architecture.
    """
    built = skeleton(folder, model_class, outputs)
    if built is None:
        raise ConfigError(
            f"transformers cannot build the model of {str(folder.path)!r}, so no adapter can be put on it."
        )
    wanted = dict(built.named_parameters())
    name_of = renaming(folder.entries, wanted)
    state: dict[str, Tensor] = {}
    for name, entry in folder.entries.items():
        full = name_of(name)
        if full in wanted and tuple(wanted[full].shape) == entry.shape:
            state[full] = folder.load(name)
    for name, parameter in wanted.items():
        if name not in state:
            state[name] = torch.zeros(parameter.shape, dtype=torch.float32)
    built.load_state_dict(state, strict=False, assign=True)
    for name, buffer in list(_meta_buffers(built)):
        owner = built.get_submodule(name.rpartition(".")[0])
        owner._buffers[name.rpartition(".")[2]] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    if hasattr(built, "tie_weights"):
        built.tie_weights()  # pyright: ignore[reportCallIssue]
    return built.eval()


def _meta_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            yield name, buffer
