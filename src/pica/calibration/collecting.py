"""Leading directions of what the layers of a model are given, or give, while it reads.

Memory: the streams of as many layers as `MEMORY` has room for are collected at a time, and the model reads once more for the
next ones. Layers that are given the very same tensor (query, key and value of a block) are collected once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pica.basis import with_progress
from pica.basis.moments import Leading, Stream, passes_of, stream_bytes, stream_of
from pica.calibration.texts import Batch
from pica.errors import BasisError
from pica.tuners.base.pointwise import as_positions, is_pointwise, read_positions

MEMORY = 2 * 2**30
"""Bytes that the streams may take together; one layer's are taken even if it is more."""


def leading_of(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Sequence[Batch],
    widths: Mapping[str, int],
    rank: int,
    *,
    outputs: bool = False,
    seed: int = 0,
    memory: int = MEMORY,
) -> tuple[dict[str, Leading], dict[str, str]]:
    """The leading directions of each layer's inputs, or of its outputs without the bias.

    Args:
        model: Is run on each batch, without gradients, as it is in evaluation.
        layers: Linear layers (or 1x1 convolutions) of it, by path.
        batches: Arguments of its forward passes, on any device.
        widths: Of each layer's vectors.
        rank: Directions wanted.
        outputs: Whether what the layer gives is looked at, instead of what it is given.
        seed: Of the sketches of wide layers.
        memory: As `MEMORY`.

    Returns:
        The directions by path, of layers that lead others once, and for each layer that is given the same as another, that
        one's path.

    Raises:
        BasisError: A layer was given nothing, or numbers that are not finite.
    """
    device = next(model.parameters()).device
    with _evaluating(model):
        same = {} if outputs else _same_inputs(model, layers, batches[0], device)
        sizes = {path: stream_bytes(widths[path], rank) for path in layers if path not in same}
        rounds = list(rounds_within(memory, sizes))
        passes = sum(max(passes_of(widths[path], rank) for path in paths) for paths in rounds)
        found: dict[str, Leading] = {}

        def work() -> Iterator[None]:
            for paths in rounds:
                streams = {
                    path: stream_of(widths[path], rank, _place(layers[path], device), seed=seed) for path in paths
                }
                for number in range(max(stream.passes for stream in streams.values())):
                    going = {path: stream for path, stream in streams.items() if number < stream.passes}
                    yield from _read(model, {path: layers[path] for path in going}, going, batches, device, outputs)
                    for stream in going.values():
                        stream.end_pass()
                for path in paths:
                    found[path] = _checked(path, streams.pop(path).leading(rank))

        with_progress(work(), passes * len(batches), unit="text")
    return found, same


def rounds_within(memory: int, sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Layers of which so many bytes fit into memory together, in the model's order; at least one."""
    held, room = list[str](), memory
    for path, size in sizes.items():
        if held and size > room:
            yield held
            held, room = [], memory
        held.append(path)
        room -= size
    if held:
        yield held


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _same_inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch, device: torch.device
) -> dict[str, str]:
    """For each layer that is given the very tensor that another was given before it, that one's path."""
    given: dict[str, Tensor] = {}  # kept for one pass, so that no two of them are at the same place

    def note(path: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            given.setdefault(path, inputs[0])

        return hook

    handles = [module.register_forward_pre_hook(note(path)) for path, module in layers.items()]
    try:
        _run(model, {name: value[:1] if value.ndim else value for name, value in batch.items()}, device)
    finally:
        for handle in handles:
            handle.remove()
    first: dict[tuple[int, int], str] = {}
    same = {}
    for path, tensor in given.items():
        owner = first.setdefault((id(tensor), tensor.shape[-1]), path)
        if owner != path:
            same[path] = owner
    return same


def _read(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    streams: Mapping[str, Stream],
    batches: Sequence[Batch],
    device: torch.device,
    outputs: bool,
) -> Iterator[None]:
    """One pass over everything; yields after each batch."""
    mask: Tensor | None = None

    def note(path: str) -> Any:
        stream, module = streams[path], layers[path]

        def of_input(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = read_positions(module, inputs[0]) if is_pointwise(module) else inputs[0]
            stream.add(_counted(x, mask))

        def of_output(module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> None:
            y = as_positions(module, y) if is_pointwise(module) else y
            bias = getattr(module, "bias", None)
            stream.add(_counted(y if bias is None else y - bias, mask))

        return module.register_forward_hook(of_output) if outputs else module.register_forward_pre_hook(of_input)

    handles = [note(path) for path in layers]
    try:
        for batch in batches:
            mask = batch.get("attention_mask")
            _run(model, batch, device)
            yield
    finally:
        for handle in handles:
            handle.remove()


def _run(model: nn.Module, batch: Batch, device: torch.device) -> None:
    arguments = {name: value.to(device) for name, value in batch.items() if name not in ("labels", "label")}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder_input_ids" not in arguments:
        arguments["decoder_input_ids"] = arguments["input_ids"]
    model(**arguments)


def _counted(vectors: Tensor, mask: Tensor | None) -> Tensor:
    """(tokens, n) of (..., n), without those that the batch's mask leaves out, where it is a mask of these."""
    if mask is not None and mask.shape == vectors.shape[:-1]:
        return vectors[mask.to(device=vectors.device, dtype=torch.bool)]
    rows = vectors.reshape(-1, vectors.shape[-1])
    if (
        mask is not None and vectors.ndim == 2 and mask.numel() == len(rows)
    ):  # models that lay a batch's tokens in a row
        return rows[mask.to(device=vectors.device, dtype=torch.bool).flatten()]
    return rows


def _place(module: nn.Module, device: torch.device) -> torch.device:
    weight = getattr(module, "weight", None)
    return weight.device if isinstance(weight, Tensor) and not weight.is_meta else device


def _checked(path: str, leading: Leading) -> Leading:
    if leading.total == 0:
        raise BasisError(
            f"{path}: the model never used this layer on the calibration data, or only on zeros, so there are no directions "
            "to take. Leave it out with exclude_modules, or read other data."
        )
    if not math.isfinite(leading.total):
        raise BasisError(f"{path}: what the model gave this layer was not finite; load it in another precision.")
    return leading
