"""Cap, a screen of bases: the share of a layer's first gradient that lies in its directions.

An adapter that starts at zero moves W by M P, and the gradient of M is G P^T, with G the gradient of W. So the share
||G P^T||_F^2 / ||G||_F^2 is what a basis lets through of the first step. It says nothing of what comes after that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pica.calibration.texts import Batch
from pica.errors import BasisError, ConfigError
from pica.theory import captured_energy

Directions = Mapping[str, Tensor]
"""P of each layer, (k, in), orthonormal, by path."""


@dataclass(frozen=True)
class LayerCapture:
    """What bases hold of one layer's gradient.

    Attributes:
        in_features: Width of the directions.
        energy: ||G||_F^2.
        shares: ||G P^T||_F^2 / ||G||_F^2, by the basis' name; 0 where the gradient is zero.
    """

    in_features: int
    energy: float
    shares: Mapping[str, float]


def captured_gradient(model: nn.Module, bases: Mapping[str, Directions], batch: Batch) -> dict[str, LayerCapture]:
    """Measure the share of each layer's gradient that bases hold, at the model's present weights.

    Memory: besides the forward pass, the gradient of one layer at a time, and that in float64.

    Args:
        model: Without adapters; is run as in evaluation, and left as it was.
        bases: By name, all with the same layers: linear ones (or 1x1 convolutions) whose weight is in floating point.
        batch: Arguments of one forward pass that gives a loss, so labels among them; on any device.

    Returns:
        By the layer's path, in the order of the first basis.

    Raises:
        ConfigError: The model gives no loss on this batch, or a weight is quantised, or is one with another layer's.
        BasisError: The loss does not depend on a layer, or its gradient is not finite.
    """
    paths = list(next(iter(bases.values())))
    found: dict[str, LayerCapture] = {}

    def measure(path: str, module: nn.Module) -> Any:
        def hook(weight: Tensor) -> None:
            gradient, weight.grad = _as_matrix(module, weight), None
            if gradient.device.type == "mps":  # has no float64
                gradient = gradient.cpu()
            energy = float(gradient.double().square().sum())
            if not energy < float("inf"):
                raise BasisError(f"{path}: its gradient is not finite; load the model in another precision.")
            shares = {
                name: float(captured_energy(gradient, rows[path].to(gradient.device))[-1]) if len(rows[path]) else 0.0
                for name, rows in bases.items()
            }
            found[path] = LayerCapture(gradient.shape[1], energy, shares)

        return hook

    modules = {path: model.get_submodule(path) for path in paths}
    weights = {path: _weight_of(path, module) for path, module in modules.items()}
    if len({id(weight) for weight in weights.values()}) < len(weights):
        raise ConfigError("Two of the layers have one and the same weight, so neither has a gradient of its own.")
    with only_trained(model, list(weights.values())):
        handles = [w.register_post_accumulate_grad_hook(measure(path, modules[path])) for path, w in weights.items()]
        try:
            device = next(iter(weights.values())).device
            loss = getattr(model(**{name: value.to(device) for name, value in batch.items()}), "loss", None)
            if not isinstance(loss, Tensor):
                raise ConfigError(f"{type(model).__name__} gives no loss on this batch; pass labels with it.")
            if loss.requires_grad:
                loss.backward()
        finally:
            for handle in handles:
                handle.remove()
    if missing := [path for path in paths if path not in found]:
        raise BasisError(f"{missing[0]}: the loss does not depend on this layer, so it has no gradient. Leave it out.")
    return {path: found[path] for path in paths}


def _weight_of(path: str, module: nn.Module) -> nn.Parameter:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        raise ConfigError(f"{path}: its weight is quantised, and has no gradient; load the model unquantised.")
    return weight


def _as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """The gradient as (out, in)."""
    assert weight.grad is not None
    return weight.grad.T if isinstance(module, Conv1D) else weight.grad.flatten(1)


@contextmanager
def only_trained(model: nn.Module, weights: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """The model in evaluation mode, with gradients of these parameters alone; then as it was, gradients included."""
    training = [module for module in model.modules() if module.training]
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _, _ in before:
        parameter.grad = None
        if parameter.is_floating_point():
            parameter.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, needed, gradient in before:
            parameter.grad = gradient
            if parameter.is_floating_point():
                parameter.requires_grad_(needed)
        for module in training:
            module.training = True
