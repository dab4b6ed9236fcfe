"""Which layers an adapter can go on, and a clear no to an entry that matches nothing or what cannot be adapted."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from pica.errors import ConfigError, TargetError
from pica.tuners.base.bank import MatrixBank, plain_name
from pica.tuners.base.default_targets import REWRITTEN, UNCALLED
from pica.tuners.base.layer import SharedLayer
from pica.tuners.base.matching import matches
from pica.tuners.base.pointwise import is_pointwise, why_not_pointwise
from pica.tuners.base.quantised import backend_of, problem_of


class UnmatchedTargetError(TargetError, NoMatchingPeftModuleError):
    """A `TargetError` that code written for PEFT's own methods catches too."""


def is_supported(module: nn.Module) -> bool:
    """Whether PiCa can adapt this base layer: a linear layer of some kind, quantised or not, or one with kernel 1."""
    if problem_of(module) is not None:
        return False
    return isinstance(module, (nn.Linear, Conv1D)) or is_pointwise(module) or backend_of(module) is not None


def refusal(method: str, path: str, module: nn.Module, family: str, root: nn.Module) -> str | None:
    """Find out whether a layer that was named can be adapted.

    Args:
        method: Who asks.
        path: Of the layer.
        module: The layer.
        family: The model's type, as in its configuration.
        root: The base model.
    Returns:
        Why not, and what to do; None where it can.
    """
    leave_out = "Leave it out of target_modules, or name it in exclude_modules."
    if isinstance(module, BaseTunerLayer):
        return (
            f"Target module {path} is not supported: it has an adapter of another method ({type(module).__module__}). Merge "
            f"that one first (merge_and_unload). {leave_out}"
        )
    if path.rpartition(".")[2] in UNCALLED.get(family, ()) or isinstance(module, NonDynamicallyQuantizableLinear):
        return (
            f"Target module {path} is not supported: the model never calls this layer, it reads the layer's weight past "
            f"any adapter. {leave_out}"
        )
    if any(path.endswith(f".{end}") for end in REWRITTEN.get(family, ())):
        return (
            f"Target module {path} is not supported: the model rescales this layer's weight whenever it goes from training "
            f"to evaluation, and an adapter would not be rescaled with it. {leave_out}"
        )
    if "Router" in type(module).__name__:
        return f"Target module {path} is not supported: it routes tokens to experts and is no plain layer. {leave_out}"
    if problem := problem_of(module, root):
        return f"Target module {path} ({type(module).__name__}) is not supported: {problem}. {leave_out}"
    if is_supported(module) or (method == "PiCa" and isinstance(module, nn.Embedding) and module.max_norm is None):
        return None
    what = f"Target module {path} ({type(module).__name__}) is not supported: {method} adapts linear layers "
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        why = why_not_pointwise(module)
        return f"{what}and convolutions with kernel 1, one group and no padding, and {why}. {leave_out}"
    more = ", embeddings without max_norm" if method == "PiCa" else ""
    return (
        f"{what}(torch.nn.Linear, transformers' Conv1D, 1x1 convolutions, quantised linear layers{more}). {leave_out}"
    )


def check_targets(config: PeftConfig, model: nn.Module) -> None:
    """Raise `UnmatchedTargetError` if an entry of `target_modules` matches no module path of `model`; names what is near."""
    targets = getattr(config, "target_modules", None)
    if not targets or targets == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        return
    paths = _base_paths(model)
    if isinstance(targets, str):
        missing = [] if any(matches(targets, p, what="target_modules") for p in paths) else [targets]
    else:
        ends = {".".join(parts[i:]) for p in paths for parts in [p.split(".")] for i in range(len(parts))}
        missing = sorted(t for t in targets if t not in ends)
    if missing:
        names = sorted({p.rpartition(".")[2] for p in paths if not p.rpartition(".")[2].isdigit()})
        raise UnmatchedTargetError(
            f"Target modules {{{', '.join(map(repr, missing))}}} not found in the base model. {_near(missing, names)}"
        )


def keep_from_bypassing(model: nn.Module) -> None:
    """Have torch's own encoder layers call their linear layers where these are adapted.

    In evaluation mode `torch.nn.TransformerEncoderLayer` hands their weights to a fused kernel and calls none of them, so
    an adapter would train and then have no effect. The kernel knows two activations; without either it is not taken. Only
    the kernel can do with the nested tensors that `torch.nn.TransformerEncoder` makes of a padded batch.
    """
    modules = list(model.modules())
    for layer in (m for m in modules if isinstance(m, nn.TransformerEncoderLayer)):
        if any(isinstance(child, BaseTunerLayer) for child in layer.children()):
            layer.activation_relu_or_gelu = 0
    for encoder in (m for m in modules if isinstance(m, nn.TransformerEncoder)):
        if not all(getattr(layer, "activation_relu_or_gelu", 1) for layer in encoder.layers):
            encoder.use_nested_tensor = False


def further_modules(config: PeftConfig) -> list[str]:
    """Names of the modules that PEFT itself is to train beside the adapter, in full or some of their rows."""
    indices = getattr(config, "trainable_token_indices", None)
    rows = list(indices) if isinstance(indices, Mapping) else [] if indices is None else ["the input embedding"]
    return [*(getattr(config, "modules_to_save", None) or []), *rows]


def check_further_modules(names: Iterable[str], slot: str) -> None:
    """Refuse names by which PEFT would wrap the adapter's own matrices, as it wraps all that ends so.

    Args:
        names: As `further_modules` gives them.
        slot: Path of the adapter's matrices in the base model.
    Raises:
        ConfigError: There is such a name.
    """
    bank = slot.partition(".")[0]
    if wrong := [n for n in names if slot.endswith(n) or bank.endswith(n)]:
        raise ConfigError(
            f"{', '.join(map(repr, wrong))} in modules_to_save or trainable_token_indices matches the adapter's own "
            f"matrices ({slot!r}); give more of the module's path, or the adapter another name."
        )


def check_task_type(config: PeftConfig, model: nn.Module) -> None:
    """Raise `ConfigError` if the task type needs a model that generates and this one cannot."""
    # PEFT finds that out once the adapter is in the model, and then only as a missing attribute.
    task = getattr(config.task_type, "value", config.task_type)
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(model, "prepare_inputs_for_generation"):
        raise ConfigError(
            f"task_type={task!r} needs a model that generates text, and {type(model).__name__} does not "
            "(it has no prepare_inputs_for_generation). Leave task_type out, or use a model with a language-model head."
        )


def _base_paths(model: nn.Module) -> list[str]:
    """Paths of the base model's modules, without what adapters put inside their layers."""
    inside = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, (BaseTunerLayer, MatrixBank)))
    return [
        n
        for n, m in model.named_modules()
        if n and not isinstance(m, MatrixBank) and not (inside and n.startswith(inside))
    ]


def _near(missing: Sequence[str], names: Iterable[str]) -> str:
    names = list(names)
    near = sorted({n for m in missing for n in difflib.get_close_matches(m.rpartition(".")[2], names, n=3, cutoff=0.5)})
    if near:
        return f"Names that are near: {', '.join(near)}."
    return f"Its modules are named: {', '.join(names[:40])}{', ...' if len(names) > 40 else ''}."


def target_layers(tuner: Any, config: PeftConfig, adapted: type[SharedLayer]) -> Iterator[tuple[str, nn.Module]]:
    """Find the layers that a configuration targets, by the same test that PEFT's injection applies.

    Yields:
        Path and module of each.
    Raises:
        TargetError: One is neither a layer that can be adapted nor one that is `adapted` already.
        ConfigError: One was adapted within another model.
    """
    is_target: Callable[[PeftConfig, str], Any] = tuner._check_target_module_exists
    family = str(getattr(getattr(tuner.model, "config", None), "model_type", ""))
    inside: tuple[str, ...] = ()
    for path, module in tuner.model.named_modules():
        if not path or (inside and path.startswith(inside)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{path}.")
        if not is_target(config, path):
            continue
        assert isinstance(module, nn.Module)  # for the type checker, which loses it above
        if not isinstance(module, adapted) and (
            problem := refusal(adapted.method_class.name, path, module, family, tuner.model)
        ):
            raise TargetError(problem)
        if isinstance(module, adapted) and module.path != plain_name(path):
            raise ConfigError(
                f"{path} has a {adapted.method_class.name} adapter from when it was {module.path}: the model, or a part "
                "of it, is a PeftModel already. Add an adapter to that one (model.add_adapter(name, config)), or take "
                "its adapters out before (base = model.unload())."
            )
        yield path, module
