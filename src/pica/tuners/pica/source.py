"""Of which weight a layer's basis is, and which side of the layer its projector reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pica.basis import BasisRequest, WantedSide
from pica.basis.checkpoint import read_tensor
from pica.basis.fingerprint import NAMED
from pica.errors import ConfigError
from pica.tuners.base.layer import SharedLayer
from pica.tuners.base.sharding import whole

# A bias this many times larger than the layer's response to a unit input drowns that response when the output is
# rounded to half precision, so the projector then reads the input although it is the wider side.
BIAS_LIMIT = 4.0

# A checkpoint's weight that differs by more than this share of its norm from the layer's own is not the one that was
# quantised: int8 differs by 1%, NF4 by 9%, FP4 by 13%, another model's weight by 140%.
FOREIGN_WEIGHT = 0.6


class Source(NamedTuple):
    """What a basis is of.

    Attributes:
        weight: (out, in).
        side: The one that its projector reads; "auto" looks at the directions.
        origin: Of the weight, one of `pica.basis.fingerprint.ORIGINS`.
    """

    weight: Tensor
    side: WantedSide
    origin: str


def source_of(layer: SharedLayer, request: BasisRequest, *, check: bool = False) -> Source:
    """Find what the basis that was asked for is of.

    That is the layer's own weight, dequantised where it is quantised; or the one that the request names in a
    checkpoint. The projector of another weight than the layer's own cannot read the layer's output, W x, so it reads
    the input.

    Args:
        layer: The layer.
        request: What was asked for.
        check: Whether to hold a checkpoint's weight against the layer's own.
    Returns:
        The weight, the side and the weight's origin.
    Raises:
        ConfigError: the checkpoint's weight is missing, of another shape, quantised, or another model's.
    """
    frozen = layer.frozen
    if request.checkpoint is None:
        own = frozen.read()
        return Source(own, _own_side(layer, request, own), frozen.quantised_as)
    named = read_tensor(request.checkpoint, request.tensor, layer.path)
    named = named.flatten(1) if frozen.kernel_dims and named.ndim > 1 else named
    named = (named.T if frozen.transposed else named).to(frozen.device_and_dtype()[0])
    if named.shape != (layer.out_features, layer.in_features):
        raise ConfigError(
            f"basis_from={request.checkpoint!r}: {request.tensor} is {tuple(named.shape)} and {layer.path} "
            f"({layer.out_features}, {layer.in_features}); name the unquantised checkpoint of the same model."
        )
    if check or not frozen.quantised:
        own = frozen.read()
        wide = torch.promote_types(torch.promote_types(own.dtype, named.dtype), torch.float32)
        difference = float(torch.linalg.vector_norm(own.to(wide) - named.to(wide)))
        if difference == 0 and not frozen.quantised:
            return Source(own, _own_side(layer, request, own), "")
        size = float(torch.linalg.vector_norm(named, dtype=wide))
        if not difference <= FOREIGN_WEIGHT * size:
            raise ConfigError(
                f"basis_from={request.checkpoint!r} is not this base model before quantisation: {layer.path} "
                f"differs by {difference / max(size, 1e-30):.0%} of its norm. Name the checkpoint that was quantised."
            )
    return Source(named, "in", NAMED)


def _own_side(layer: SharedLayer, request: BasisRequest, weight: Tensor) -> WantedSide:
    """The side for a basis of the layer's own weight."""
    # Minor directions are those that W shortens most: read from its output, they would be amplified rounding.
    return "in" if request.projection == "minor" else preferred_side(layer, weight)


def preferred_side(layer: SharedLayer, weight: Tensor) -> WantedSide:
    """The side that a projector should read: the narrower one, unless the output would spoil it.

    That is so where a large bias drowns the response (see `BIAS_LIMIT`), or the layer rounds its input. An embedding's
    output is as good as its input: nothing was computed on the way.

    Args:
        layer: The layer.
        weight: (out, in), its own; on the meta device where only its shape counts.
    Returns:
        "in", "out", or "auto", which looks at the directions.
    """
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding):
        return "out"
    if weight.shape[1] <= weight.shape[0] or not layer.frozen.output_is_exact():
        return "in"
    bias = getattr(base, "bias", None)
    if bias is None or bias.is_meta:
        return "auto"
    bias = whole(bias, layer.out_features, layer.path)
    response = torch.linalg.vector_norm(weight, dtype=torch.float64) / weight.shape[0] ** 0.5
    # rms |W x| over outputs, |x| = 1
    return "auto" if float(bias.detach().abs().max()) <= BIAS_LIMIT * float(response) else "in"
