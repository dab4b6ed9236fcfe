"""How much drawn pictures look like a subject's, and like their prompt: DINO, CLIP-I and CLIP-T, as DreamBooth has them.

All three are mean cosines: DINO and CLIP-I of each drawn picture with each real one, in the space of a self-supervised
ViT's class token and of CLIP's picture encoder; CLIP-T of each drawn picture with its prompt, in CLIP's common space.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from pica.experiments.models import device
from pica.foreign_code import code_options
from pica.text import first_line

logger = logging.getLogger(__name__)

SCORES = ("dino", "clip_i", "clip_t")
_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError)
_BATCH = 16


class SubjectScores:
    """Scores with the models that a recipe names, loaded on first use; what cannot be loaded is not measured.

    Args:
        dino: Folder or hub name of a ViT for DINO; None: not measured.
        clip: Folder or hub name of a CLIP for CLIP-I and CLIP-T; None: not measured.

    Attributes:
        missing: For each score that is not measured, why not.
    """

    def __init__(self, dino: str | None, clip: str | None) -> None:
        self._names, self._loaded = {"dino": dino, "clip": clip}, dict[str, tuple[Any, ...] | None]()
        self.missing: dict[str, str] = {}

    def load(self) -> None:
        """Read the models; fills `missing`."""
        self._model("dino", ("dino",), (AutoModel, AutoImageProcessor))
        self._model("clip", ("clip_i", "clip_t"), (AutoModel, AutoImageProcessor, AutoTokenizer))

    def measure(self, drawn: Sequence[Any], prompts: Sequence[str], real: Sequence[Any]) -> dict[str, list[float]]:
        """Score drawn pictures.

        Args:
            drawn: PIL images.
            prompts: One for each of them.
            real: PIL images of the subject.
        Returns:
            Each drawn picture's score by the names of `SCORES`, without those that are not measured.
        """
        self.load()
        for loaded in self._loaded.values():
            if loaded:
                loaded[0].to(device())
        found: dict[str, list[float]] = {}
        if loaded := self._loaded["dino"]:
            model, processor = loaded
            found["dino"] = _cosines(
                _embedded(drawn, processor, _dino(model)), _embedded(real, processor, _dino(model))
            )
        if loaded := self._loaded["clip"]:
            model, processor, tokenizer = loaded
            pictures = _embedded(drawn, processor, _clip(model))
            found["clip_i"] = _cosines(pictures, _embedded(real, processor, _clip(model)))
            found["clip_t"] = (pictures * _texts(prompts, tokenizer, model)).sum(1).tolist()
        for loaded in self._loaded.values():
            if loaded:
                loaded[0].to("cpu")
        return found

    def _model(self, role: str, scores: tuple[str, ...], loaders: tuple[Any, ...]) -> None:
        if role in self._loaded:
            return
        self._loaded[role] = None
        name = self._names[role]
        if name is None:
            reason = f"dreambooth.{role} names no model"
        else:
            try:
                self._loaded[role] = _load(name, loaders)
                return
            except _ERRORS as error:
                reason = f"model {name} is not available locally ({first_line(error)})"
        self.missing |= dict.fromkeys(scores, reason)


def _load(name: str, loaders: tuple[Any, ...]) -> tuple[Any, ...]:
    """From a folder, else from the hub's cache, else from the hub."""
    folder = Path(name).expanduser()
    location = str(folder) if folder.is_dir() else name
    error: BaseException | None = None
    for local in (True,) if folder.is_dir() or name.startswith((".", "/", "~")) else (True, False):
        try:
            loaded = [
                loader.from_pretrained(
                    location,
                    local_files_only=local,
                    **code_options(),
                    **({"backend": "pil"} if loader is AutoImageProcessor else {}),
                )
                for loader in loaders
            ]
            loaded[0].eval()
            return tuple(loaded)
        except _ERRORS as failed:
            error = failed
    assert error is not None
    raise error


def _dino(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda pixels: model(pixel_values=pixels).last_hidden_state[:, 0]


def _clip(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda pixels: _tensor(model.get_image_features(pixel_values=pixels))


def _tensor(output: Any) -> Tensor:
    """CLIP's features, which newer versions of transformers wrap."""
    return output if isinstance(output, Tensor) else output.pooler_output


@torch.inference_mode()
def _embedded(pictures: Sequence[Any], processor: Any, embed: Callable[[Tensor], Tensor]) -> Tensor:
    """Unit vectors, (pictures, width), float32 on the CPU."""
    rows = []
    for start in range(0, len(pictures), _BATCH):
        values = processor(images=list(pictures[start : start + _BATCH]), return_tensors="pt")["pixel_values"]
        rows.append(functional.normalize(embed(values.to(device())).float(), dim=-1).cpu())
    return torch.cat(rows)


@torch.inference_mode()
def _texts(prompts: Sequence[str], tokenizer: Any, model: Any) -> Tensor:
    """Unit vectors, (prompts, width), float32 on the CPU; texts that are too long are cut off."""
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
    tokens = {name: tokens[name].to(model.device) for name in ("input_ids", "attention_mask")}
    return functional.normalize(_tensor(model.get_text_features(**tokens)).float(), dim=-1).cpu()


def _cosines(drawn: Tensor, real: Tensor) -> list[float]:
    """Mean cosine of each drawn picture with all real ones."""
    return (drawn @ real.T).mean(1).tolist()
