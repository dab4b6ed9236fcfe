"""`make_basis`: from a base model, and for some projections text, to a basis file."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pica._version import __version__
from pica.basis import cached_solve_basis, full_precision, max_rank, with_progress
from pica.basis.file import About, BasisFile, LayerRows, check_free, weight_sample, write_basis
from pica.basis.moments import Leading, oriented, rows_of_outputs
from pica.basis.spectral import CALIBRATED
from pica.calibration.collecting import MEMORY, leading_of
from pica.calibration.gradients import gradient_directions
from pica.calibration.texts import LENGTH, TOKENS, Calibration, Source, calibration
from pica.errors import ConfigError, TargetError
from pica.tuners.base.bank import get_bank
from pica.tuners.base.roles import Member, plan_groups
from pica.tuners.base.sharding import in_parts
from pica.tuners.pica.config import PicaConfig
from pica.tuners.pica.layer import PicaLinear
from pica.tuners.pica.sides import input_side_of


def make_basis(
    model: nn.Module,
    folder: str | PathLike[str],
    config: PicaConfig | None = None,
    *,
    data: Source | Calibration = None,
    tokenizer: Any = None,
    tokens: int = TOKENS,
    length: int = LENGTH,
    seed: int = 0,
    memory: int = MEMORY,
    overwrite: bool = False,
) -> BasisFile:
    """Make a basis for a base model and write it as a folder, which adapters name in `basis_from`.

    For "activation" P holds the leading eigenvectors of the uncentred second moment C of a layer's inputs; for "weighted"
    the row space of U_r^T W, with U_r the leading eigenvectors of W C W^T: what is best kept of W on this data. "principal",
    "minor" and "random" need no data; from such a file they load without a decomposition. For "gradient" see
    `pica.calibration.gradients`.

    Args:
        model: The base model, without adapters; it is left as it was.
        folder: New, or empty.
        config: Projection, r, targets and seed, and for "gradient" `share` and `input_side`; the others of its fields do not
            matter. Default: `activation`, r=256.
        data: See `pica.calibration.texts.calibration`; default: the text inside this package.
        tokenizer: Of the model, where data are texts.
        tokens: About how many to read.
        length: Longest sequence, in tokens.
        seed: Of the order in which data are read, and of the sketches of wide layers.
        memory: Bytes that second moments, or gradients, may take together; the model reads the data again where they need
            more.
        overwrite: Whether to replace a basis in `folder`.

    Returns:
        The file, open for reading.

    Raises:
        ConfigError: The model has adapters, or the projection cannot be made for what is targeted.
        TargetError: A target matches no layer.
        BasisError: A layer is never used, or what it is given is not finite.
        DataError: There is nothing to read.
        OutputError: The folder is not to be had.
    """
    folder = Path(folder).expanduser()
    check_free(folder, overwrite=overwrite)
    config = PicaConfig(r=256, projection="activation", basis_from=None) if config is None else config
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ConfigError(
            "The model has adapters; make a basis from the base model, before they are put on or after unload()."
        )
    read: Calibration | None = None
    if config.projection in CALIBRATED:
        read = (
            data
            if isinstance(data, Calibration)
            else calibration(data, tokenizer, tokens=tokens, seed=seed, length=length)
        )
    with target_layers(model, config) as layers:
        turned = input_side_of(config, _shapes(layers))
        rows = directions(model, layers, config, read, seed=seed, memory=memory)
        parts = {path: _part(layers[path], rows[path], turned=path in turned) for path in layers}
    own = getattr(model, "config", None)
    about = About(
        projection=config.projection,
        rank=config.r,
        base=config.base_model_name_or_path or getattr(own, "_name_or_path", None) or None,
        revision=config.revision,
        calibration={} if read is None else read.about,
        seed=config.projection_seed if read is None else seed,
        pica_version=__version__,
        input_side=sorted(turned),
    )
    return write_basis(folder, parts, about, overwrite=overwrite)


@contextmanager
def target_layers(model: nn.Module, config: PicaConfig) -> Iterator[dict[str, PicaLinear]]:
    """The layers that a configuration targets, by path, as adapted ones; the model is put back as it was.

    Args:
        model: Without adapters.
        config: Only its targets matter.

    Yields:
        The layers, stacks of experts and embeddings among them where they are targeted.

    Raises:
        ConfigError: A weight is not all there.
        TargetError: A target matches no layer.
    """
    probe = copy.copy(config)
    probe.r, probe.projection, probe.rank_pattern = 1, "random", {}
    probe.basis_from, probe.basis_digest, probe.save_basis, probe.task_type = None, None, False, None
    probe.input_side, probe.share, probe.base_model_name_or_path = None, "role", None
    probe.modules_to_save = probe.trainable_token_indices = None
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    with torch.random.fork_rng():
        wrapped = peft.get_peft_model(model, probe)  # pyright: ignore[reportArgumentType] - any module will do
    try:
        bank = get_bank(model)
        assert bank is not None
        layers = {
            path: layer for path, layer in bank.matrices("default").layers.items() if isinstance(layer, PicaLinear)
        }
        if deferred := [
            path for path, layer in layers.items() if layer.frozen.is_deferred() or in_parts(layer.frozen.raw())
        ]:
            raise ConfigError(
                f"{deferred[0]}: its weight is on the meta device or split between processes; load the whole model in one "
                "process to make a basis."
            )
        yield layers
    finally:
        wrapped.unload()
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in trainable)


def directions(
    model: nn.Module,
    layers: Mapping[str, PicaLinear],
    config: PicaConfig,
    read: Calibration | None = None,
    *,
    seed: int = 0,
    memory: int = MEMORY,
) -> dict[str, Tensor]:
    """The directions P of each layer.

    Args:
        model: The base model.
        layers: Of it, as `target_layers` yields them.
        config: Projection, r and seed of random directions.
        read: What the model reads, for projections that look at data.
        seed: Of the sketches of wide layers.
        memory: As `make_basis`.

    Returns:
        (k, in) by path, orthonormal, float32; k is r, or fewer where there are no more. Layers that are given the same have
        one and the same tensor. For "gradient" (k, out) where the matrix is on the side of the layer's input.

    Raises:
        ConfigError: The projection looks at data, and there is nothing to read.
        TargetError: A layer's inputs cannot be looked at.
        BasisError: A layer is never used, or what it is given is not finite.
    """
    if config.projection not in CALIBRATED:
        return _of_weights(layers, config)
    if read is None:
        raise ConfigError(f"projection={config.projection!r} looks at data; pass what the model is to read.")
    return _of_data(model, layers, config, read, seed=seed, memory=memory)


def _of_data(
    model: nn.Module, layers: Mapping[str, PicaLinear], config: PicaConfig, read: Calibration, *, seed: int, memory: int
) -> dict[str, Tensor]:
    """P of each layer for the projections that look at data, (k, in), float32."""
    bases = {path: layer.get_base_layer() for path, layer in layers.items()}
    for path, layer in layers.items():
        if isinstance(bases[path], nn.Embedding) or not layer.mixes:
            what = "an embedding" if layer.mixes else "a stack of experts"
            raise TargetError(
                f"{path} is {what}, whose inputs projection={config.projection!r} cannot look at; leave it out, or use "
                "projection='principal'."
            )
    if config.projection == "gradient":
        return _of_gradients(model, layers, bases, config, read, memory)
    outputs = config.projection == "weighted"
    widths = {path: layer.out_features if outputs else layer.in_features for path, layer in layers.items()}
    found, same = leading_of(
        _without_head(model, layers), bases, read.batches, widths, config.r, outputs=outputs, seed=seed, memory=memory
    )
    rows: dict[str, Tensor] = {}
    for path, layer in layers.items():
        if path in same:
            rows[path] = rows[same[path]]
        else:
            rows[path] = oriented(_rows_of(found.pop(path), layer, outputs))
    return rows


def _of_gradients(
    model: nn.Module,
    layers: Mapping[str, PicaLinear],
    bases: Mapping[str, nn.Module],
    config: PicaConfig,
    read: Calibration,
    memory: int,
) -> dict[str, Tensor]:
    shapes = _shapes(layers)
    turned = input_side_of(config, shapes)
    members = [Member(path, *shape, config.r, path in turned) for path, shape in shapes.items()]
    groups = [[member.path for member in group.members] for group in plan_groups(members, config.share)]
    return gradient_directions(
        model, bases, shapes, read.batches, config.r, groups=groups, input_side=turned, memory=memory
    )


def _shapes(layers: Mapping[str, PicaLinear]) -> dict[str, tuple[int, int]]:
    return {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}


def _rows_of(leading: Leading, layer: PicaLinear, outputs: bool) -> Tensor:
    return rows_of_outputs(leading.rows, layer.frozen.read()) if outputs else leading.rows


def _without_head(model: nn.Module, layers: Mapping[str, PicaLinear]) -> nn.Module:
    """The model's body, where all of these layers are in it: logits are of no use here, and large."""
    name = getattr(model, "base_model_prefix", "")
    body = getattr(model, name, None) if name else None
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not isinstance(body, nn.Module) or encoder_decoder:
        return model
    return body if all(path.startswith(f"{name}.") for path in layers) else model


def _of_weights(layers: Mapping[str, PicaLinear], config: PicaConfig) -> dict[str, Tensor]:
    """P of each layer for the projections that the weight decides, (k, in), float32."""

    def solve() -> Iterator[Tensor]:
        for path, layer in layers.items():
            weight = layer.frozen.read()
            rank = min(config.r, max_rank(layer.out_features, layer.in_features, config.projection))
            options = {"projection": config.projection, "side": "in", "seed": config.projection_seed, "name": path}
            basis = cached_solve_basis(weight, rank, **options)
            yield basis.directions(weight)[: basis.clear_rank].to(torch.float32)

    return dict(zip(layers, with_progress(solve(), len(layers))))


def _part(layer: PicaLinear, rows: Tensor, *, turned: bool) -> LayerRows:
    weight = layer.frozen.read()
    with full_precision(weight.device):
        wide = weight.to(torch.float32)
        gains = (rows.to(weight.device) @ (wide if turned else wide.T)).norm(dim=1)
    return LayerRows(rows, gains.cpu(), weight_sample(weight))
