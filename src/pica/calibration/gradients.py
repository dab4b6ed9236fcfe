"""Leading directions of the first gradient, turned so that the layers that share a matrix mean alike by it.

An adapter that starts at zero moves W by M P, and its first step is along G P^T, with G the gradient of W. P holds as much
of G as r directions can when it spans the leading right singular vectors of G; which basis of that span decides what the
sum over the layers that share M keeps. So each layer's rows are rotated (orthogonal Procrustes) until the G_i P_i^T lie as
close to their mean as they can, and then all of them by the mean's own right singular vectors, so that the first rows hold
the most of what is shared. For layers whose matrix is on their input's side all of this is of G^T.

Memory: the gradients, in float32, of as many layers as `memory` has room for; the model reads again for the next ones.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pica.basis import full_precision, max_rank, solve_basis, with_progress
from pica.calibration.capture import only_trained
from pica.calibration.collecting import rounds_within
from pica.calibration.texts import Batch
from pica.errors import BasisError, ConfigError
from pica.tuners.base.pointwise import as_positions, is_pointwise, read_positions

ROUNDS = 20
"""Of Procrustes; a screen of candidates used as many, and the mean changes by less than 1e-3 after ten."""
IGNORED = -100
"""Label of a token that the loss leaves out, as transformers has it."""


def gradient_directions(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    shapes: Mapping[str, tuple[int, int]],
    batches: Sequence[Batch],
    rank: int,
    *,
    groups: Sequence[Sequence[str]],
    input_side: Collection[str],
    memory: int,
) -> dict[str, Tensor]:
    """The directions of each layer.

    Args:
        model: Is run forward and backward on each batch, as in evaluation; left as it was.
        layers: Linear layers (or 1x1 convolutions) of it, by path.
        shapes: Their weights', (out, in).
        batches: Arguments of its forward passes. Where they have no labels, a language model's are the tokens themselves.
        rank: Directions wanted.
        groups: Which layers share a matrix, all of them in one group each.
        input_side: Layers whose matrix is on the side of their input.
        memory: Bytes that gradients may take together.

    Returns:
        By path (k, in), or (k, out) for layers in `input_side`: orthonormal rows, float32. k is the same within a group.

    Raises:
        ConfigError: The model gives no loss on a batch.
        BasisError: The loss does not depend on a layer, or a gradient is not finite.
    """
    rows: dict[str, Tensor] = {}
    cores: dict[str, Tensor] = {}
    rounds = list(rounds_within(memory, {path: 4 * math.prod(shape) for path, shape in shapes.items()}))

    def work() -> Iterator[None]:
        for paths in rounds:
            yield from _accumulated(model, {path: layers[path] for path in paths}, shapes, batches, into=found)
            for path in paths:
                rows[path], cores[path] = _leading(path, found.pop(path), rank, transposed=path in input_side)

    found: dict[str, Tensor] = {}
    with only_trained(model):
        with_progress(work(), len(rounds) * len(batches), unit="text")
    for group in groups:
        count = min(len(rows[path]) for path in group)
        turns = shared_rotations([cores[path][:, :count] for path in group])
        for path, turn in zip(group, turns):
            rows[path] = (turn @ rows[path][:count].double()).float().contiguous()
    return rows


def shared_rotations(cores: Sequence[Tensor]) -> list[Tensor]:
    """Rotations R_i that turn matrices toward one another: the C_i R_i^T are near their mean, whose columns fall in size.

    Args:
        cores: C_i (width, k), float64.

    Returns:
        R_i (k, k), orthogonal, float64, one for each. For a single matrix the one that makes its columns orthogonal.
    """
    turns = [torch.eye(core.shape[1], dtype=core.dtype) for core in cores]
    mean = max(cores, key=lambda core: float(core.norm()))
    for _ in range(ROUNDS if len(cores) > 1 else 0):
        for i, core in enumerate(cores):
            left, _, right = torch.linalg.svd(mean.T @ core)
            turns[i] = left @ right
        mean = torch.stack([core @ turn.T for core, turn in zip(cores, turns)]).mean(0)
    order = torch.linalg.svd(mean, full_matrices=len(mean) < mean.shape[1]).Vh
    largest = order.gather(1, order.abs().argmax(1, keepdim=True))
    order = order * torch.where(largest < 0, -1.0, 1.0)  # a sign for each direction, the same everywhere
    return [order @ turn for turn in turns]


def _leading(path: str, gradient: Tensor, rank: int, *, transposed: bool) -> tuple[Tensor, Tensor]:
    """Leading right singular vectors P (k, in) of G, and G P^T, float64; of G^T where `transposed`."""
    matrix = gradient.T if transposed else gradient
    if not bool(torch.isfinite(matrix).all()):
        raise BasisError(f"{path}: its gradient is not finite; load the model in another precision.")
    basis = solve_basis(matrix, min(rank, max_rank(len(matrix), matrix.shape[1])), side="in", name=path)
    rows = basis.projector[: basis.clear_rank]
    if not len(rows):
        raise BasisError(f"{path}: the loss does not depend on this layer, so it has no gradient. Leave it out.")
    with full_precision(matrix.device):
        core = matrix.double() @ rows.double().T
    return rows.cpu(), core.cpu()


def _accumulated(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    shapes: Mapping[str, tuple[int, int]],
    batches: Sequence[Batch],
    into: dict[str, Tensor],
) -> Iterator[None]:
    """G (out, in), float32, of the summed losses of all batches, from what goes through each layer; yields after each batch.

    Products of what a layer is given and of its output's gradient, so that quantised weights have one as well.

    Raises:
        BasisError: The loss does not depend on a layer.
    """

    def note(path: str) -> Any:
        def forward(module: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
            x = inputs[0].detach()
            # the first layers' outputs depend on nothing that has a gradient
            y = y if y.requires_grad else y.detach().requires_grad_().clone()

            def backward(dy: Tensor) -> None:
                read, given = (read_positions(module, x), as_positions(module, dy)) if is_pointwise(module) else (x, dy)
                read, given = read.reshape(-1, read.shape[-1]).float(), given.reshape(-1, given.shape[-1]).float()
                if path not in into:
                    into[path] = torch.zeros(shapes[path], device=given.device)
                into[path].addmm_(given.T, read)

            y.register_hook(backward)
            return y

        return layers[path].register_forward_hook(forward)

    handles = [note(path) for path in layers]
    try:
        for batch in batches:
            _loss(model, batch).backward()
            yield
    finally:
        for handle in handles:
            handle.remove()
    if missing := [path for path in layers if path not in into]:
        raise BasisError(f"{missing[0]}: the loss does not depend on this layer, so it has no gradient. Leave it out.")


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    """The model's loss on a batch, or raises `ConfigError`."""
    device = next(model.parameters()).device
    arguments = {name: value.to(device) for name, value in batch.items()}
    writes: Any = getattr(model, "get_output_embeddings", lambda: None)
    if not {"labels", "label"} & set(arguments) and "input_ids" in arguments and writes() is not None:
        ids, mask = arguments["input_ids"], arguments.get("attention_mask")
        arguments["labels"] = ids if mask is None else ids.masked_fill(mask == 0, IGNORED)
    loss = getattr(model(**arguments), "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigError(
            f"{type(model).__name__} gives no loss on this data; pass batches with labels, or train with "
            "projection='gradient', which reads the training problems."
        )
    return loss
