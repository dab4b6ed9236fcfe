"""What one training step takes in memory, found by running it on tensors that have a shape and no content.

The step runs for real as far as autograd is concerned, so whatever the model, the attention kernel and the adapter keep
for the backward pass is what is counted; nothing is computed, and no memory is used.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pica.errors import ConfigError
from pica.experiments.plan.packing import is_unpacked, packed, parts
from pica.text import first_line


class TraceError(Exception):
    """The step cannot be run without values; says why."""


# the kernel of mixtures of experts: torch's own rule for tensors without content knows bfloat16 alone; not in torch 2.6
_GROUPED = (torch.ops.aten._grouped_mm.default,) if hasattr(torch.ops.aten, "_grouped_mm") else ()

# of bitsandbytes' 4-bit layers: beyond a few tokens it unpacks the whole weight, in the dtype of its input
_QUANTISED_PRODUCT = "bitsandbytes::gemm_4bit"


def _grouped_product(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """A tensor of the shape that the product by groups has: of rows (S, N), or of weights (groups, M, N)."""
    if left.ndim == 2 and right.ndim == 2:
        return left.new_empty(len(offsets), left.shape[0], right.shape[1])
    return left.new_empty(*left.shape[:-1], right.shape[-1])


class Allocations(TorchDispatchMode):
    """Counts the bytes of storages that live at the same time, while it is active.

    Attributes:
        live, peak: Bytes now, and at most; of storages that operations made, not of those in `known`.
    """

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known = set(known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _GROUPED:
            result = _grouped_product(*args[:3])
        elif func.name() == _QUANTISED_PRODUCT:
            unpacked = args[0].new_empty(args[2])
            self._add(unpacked.untyped_storage())
            result = func(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class StepTracer:
    """Runs training steps of a model that was built on the meta device.

    Args:
        model: Its parameters and buffers are replaced by fake ones on the CPU; of no use for anything else afterwards.
        checkpointing: Whether each block's activations are computed again in the backward pass.
    """

    def __init__(self, model: nn.Module, *, checkpointing: bool = False) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._model = model.train()
        with self._mode:
            self._storages = _replace_tensors(model)
            if checkpointing:
                _enable_checkpointing(model)

    def peak(self, batch: int, length: int) -> int:
        """Trace the memory of one forward and backward pass.

        Args:
            batch: Samples.
            length: Tokens a sample (images and sounds have the length that the model takes).
        Returns:
            Most bytes at a time beyond the model's own tensors, gradients included.
        Raises:
            TraceError: The model's forward pass depends on values, or needs an input that is not known here.
        """
        known = {s._cdata for s in self._storages}
        try:
            with _quiet(), self._mode, torch.enable_grad():
                inputs = example_inputs(self._model, batch, length)
                with Allocations(known) as counted:
                    loss = _loss(self._model(**inputs))
                    loss.backward()
                    del loss
                    found = counted.peak
        except Exception as error:  # of any kind: it comes from the model's code, which was never meant for this
            raise TraceError(first_line(error)) from error
        finally:
            for parameter in self._model.parameters():
                parameter.grad = None
        return found


def example_inputs(model: nn.Module, batch: int, length: int) -> dict[str, Tensor]:
    """Make inputs of a training step.

    Returns:
        Tensors of the right shapes, dtypes and names, with zeros for values.
    Raises:
        TraceError: The model's main input is of a kind that is not known here.
    """
    config: Any = model.config
    accepted = inspect.signature(_innermost(model).forward).parameters
    main = getattr(_innermost(model), "main_input_name", "input_ids")
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    inputs: dict[str, Tensor] = {}
    if main == "input_ids":
        inputs["input_ids"] = torch.zeros(batch, length, dtype=torch.long)
        if "pixel_values" in accepted and not _innermost(model).can_generate():  # pyright: ignore[reportCallIssue]
            inputs["pixel_values"] = _pixels(config, batch, dtype)  # as many captions as pictures: CLIP
    elif main == "pixel_values":
        inputs["pixel_values"] = _pixels(config, batch, dtype)
        if "input_points" in accepted:
            inputs["input_points"] = torch.zeros(batch, 1, 1, 2, dtype=dtype)
    elif main == "input_features" and hasattr(config, "max_source_positions"):
        inputs["input_features"] = torch.zeros(batch, config.num_mel_bins, 2 * config.max_source_positions, dtype=dtype)
    elif main == "input_values" and hasattr(config, "inputs_to_logits_ratio"):
        inputs["input_values"] = torch.zeros(batch, length * config.inputs_to_logits_ratio, dtype=dtype)
    else:
        raise TraceError(f"its main input is {main!r}, which is not known here")
    if "labels" in accepted:
        inputs["labels"] = _labels(type(_innermost(model)).__name__, config, batch, length)
    elif "start_positions" in accepted:
        inputs |= {name: torch.zeros(batch, dtype=torch.long) for name in ("start_positions", "end_positions")}
    elif "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = torch.zeros(batch, length, dtype=torch.long)
    return inputs


def _pixels(config: Any, batch: int, dtype: torch.dtype) -> Tensor:
    image = getattr(config, "vision_config", config)
    side = image.image_size if isinstance(image.image_size, int) else image.image_size[0]
    return torch.zeros(batch, getattr(image, "num_channels", 3), side, side, dtype=dtype)


def positions(config: Any) -> int | None:
    """Most tokens that a model takes, as its configuration says; None where it says nothing."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _labels(kind: str, config: Any, batch: int, length: int) -> Tensor:
    if kind.endswith(("ForSequenceClassification", "ForImageClassification")):
        regression = getattr(config, "num_labels", 2) == 1
        return torch.zeros(batch, dtype=torch.float32 if regression else torch.long)
    return torch.zeros(batch, length, dtype=torch.long)


def _innermost(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue,reportReturnType]


def _loss(outputs: Any) -> Tensor:
    loss = outputs.get("loss")
    if loss is not None:
        return loss
    return next(v for v in outputs.values() if isinstance(v, Tensor) and v.is_floating_point()).float().sum()


def _replace_tensors(model: nn.Module) -> list[torch.UntypedStorage]:
    """Fake tensors instead of meta ones, on the CPU; what was tied stays tied. Returns their storages."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor, parameter: bool) -> Tensor:
        if id(tensor) not in made and is_unpacked(tensor):
            made[id(tensor)] = packed(tensor)
        elif id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if parameter else empty
        return made[id(tensor)]

    kept = []  # so that no id is given to a second tensor meanwhile
    for module in model.modules():
        for tensors, parameter in ((module._parameters, True), (module._buffers, False)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    kept.append(tensor)
                    tensors[name] = fake(tensor, parameter)  # pyright: ignore[reportArgumentType]
    return [part.untyped_storage() for tensor in made.values() for part in parts(tensor)]


def _enable_checkpointing(model: Any) -> None:
    if not getattr(_innermost(model), "supports_gradient_checkpointing", False):
        raise ConfigError(f"{type(_innermost(model)).__name__} does not support gradient checkpointing.")
    model.enable_input_require_grads()
    kwargs = {"use_reentrant": False, "preserve_rng_state": False}
    inner: Any = _innermost(model)
    if hasattr(inner, "activation_checkpointing_enable"):
        inner.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs)
    else:  # its older name in transformers
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's log entries on operations that failed: the error itself says it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)
