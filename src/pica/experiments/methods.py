"""Every adaptation method that a recipe can name: which PEFT configuration it is, and what `r` means to it.

Nothing here imports torch or peft before a configuration is made, so that checks and help stay quick.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from pica.errors import ConfigError
from pica.experiments.recipes.recipe import AdapterSection
from pica.tuners.pica.settings import PicaSettings
from pica.tuners.svft.settings import SvftSettings

if TYPE_CHECKING:
    import peft

Values = dict[str, Any]

# Fields that are set by the recipe's other fields, by the task or by PEFT itself.
_NOT_OPTIONS = {
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "rank_pattern",
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "modules_to_save",
}
_DUMMY_TARGET = "dummy-target-modules"  # PEFT's own name for "no layer gets an adapter"


def _nothing(section: AdapterSection) -> Values:
    return {}


@dataclass(frozen=True)
class Method:
    """How one method is configured.

    Attributes:
        title: What it is called in print.
        config: Name of its configuration class, in `peft` or, for our own, in `pica`.
        family: Methods of one family share a colour in plots.
        rank: The configuration's field for `adapter.r`; None for a method without a rank.
        values: Further fields that follow from the section.
        takes: Fields of the section, of those in `SPECIAL`, that it has.
        settings: For our own: the part of its configuration that needs no torch, and says what is wrong with its fields.
    """

    title: str
    config: str
    family: str
    rank: str | None = "r"
    values: Callable[[AdapterSection], Values] = _nothing
    takes: tuple[str, ...] = ()
    settings: type[PicaSettings] | type[SvftSettings] | None = None

    def problems(self, section: AdapterSection) -> list[str]:
        """What the configuration would say of the fields that only this method has."""
        if self.settings is None:
            return []
        own = {field.name for field in dataclasses.fields(self.settings)} & set(self.takes)
        return self.settings(**{name: getattr(section, name) for name in own}).own_problems()


_BASIS = ("basis_from", "calibration", "calibration_tokens")
SPECIAL = ("share", "projection", "save_basis", *_BASIS, "pattern", "off_diagonals", "lora_alpha", "lora_dropout")
"""Fields of the adapter section that only some methods have; set for another one they are refused."""
_LORA = ("lora_alpha", "lora_dropout")


def _alpha(default: Callable[[int], float], **more: Any) -> Callable[[AdapterSection], Values]:
    """Values of a LoRA whose scale numerator is `default(r)` unless the section sets one."""

    def values(section: AdapterSection) -> Values:
        alpha = default(section.r) if section.lora_alpha is None else section.lora_alpha
        return {"lora_alpha": alpha, "lora_dropout": section.lora_dropout, **more}

    return values


def _pica(section: AdapterSection) -> Values:
    share = "role" if section.share is None else section.share
    values = {"share": share, "projection": section.projection, "save_basis": section.save_basis}
    return values if section.basis_from is None else values | {"basis_from": section.basis_from}


def _svft(section: AdapterSection) -> Values:
    share = "none" if section.share is None else section.share
    return {"share": share, "pattern": section.pattern, "off_diagonals": section.off_diagonals}


def _adalora(section: AdapterSection) -> Values:
    # PEFT asks for the number of steps when nobody knows it yet: `experiments.train.allocation` sets it, tinit and tfinal.
    start = max(section.r + 1, round(1.5 * section.r))
    return {**_alpha(lambda r: 2 * r)(section), "init_r": start, "total_step": 1_000_000}


def _eva(section: AdapterSection) -> Values:
    import peft

    # A starts from the inputs' directions when the training data are there (experiments.train.calibrating)
    start = peft.EvaConfig(rho=1.0)  # no other ranks than asked for
    return _alpha(lambda r: 2 * r, init_lora_weights="eva", eva_config=start)(section)


def _ia3(section: AdapterSection) -> Values:
    return {} if section.target_modules is None else {"feedforward_modules": []}  # all of them scale their output


METHODS: dict[str, Method] = {
    "pica": Method(
        "PiCa",
        "PicaConfig",
        "PiCa",
        values=_pica,
        takes=("share", "projection", "save_basis", *_BASIS),
        settings=PicaSettings,
    ),
    "svft": Method(
        "SVFT",
        "SvftConfig",
        "SVFT",
        rank=None,
        values=_svft,
        takes=("share", "pattern", "off_diagonals"),
        settings=SvftSettings,
    ),
    "lora": Method("LoRA", "LoraConfig", "LoRA", values=_alpha(lambda r: 2 * r), takes=_LORA),
    "rslora": Method("rsLoRA", "LoraConfig", "LoRA", values=_alpha(lambda r: 16, use_rslora=True), takes=_LORA),
    "dora": Method("DoRA", "LoraConfig", "LoRA", values=_alpha(lambda r: 2 * r, use_dora=True), takes=_LORA),
    "pissa": Method(
        "PiSSA",
        "LoraConfig",
        "LoRA from singular vectors",
        values=_alpha(lambda r: r, init_lora_weights="pissa"),
        takes=_LORA,
    ),
    "mica": Method(
        "MiCA",
        "LoraConfig",
        "LoRA from singular vectors",
        values=_alpha(lambda r: 2 * r, init_lora_weights="mica"),
        takes=_LORA,
    ),
    "eva": Method("EVA", "LoraConfig", "LoRA", values=_eva, takes=_LORA),
    "adalora": Method("AdaLoRA", "AdaLoraConfig", "LoRA", rank="target_r", values=_adalora, takes=_LORA),
    "vera": Method("VeRA", "VeraConfig", "shared random bases"),
    "randlora": Method(
        "RandLoRA", "RandLoraConfig", "shared random bases", values=lambda s: {"randlora_alpha": 20 * s.r}
    ),
    "vblora": Method("VB-LoRA", "VBLoRAConfig", "shared random bases"),
    "boft": Method("BOFT", "BOFTConfig", "orthogonal", rank=None),
    "psoft": Method("PSOFT", "PsoftConfig", "orthogonal", values=lambda s: {"psoft_alpha": s.r}),
    "ia3": Method("IA3", "IA3Config", "other", rank=None, values=_ia3),
    "miss": Method("MiSS", "MissConfig", "other"),
    "full": Method("full fine-tuning", "LoraConfig", "full", rank=None),
    "head": Method("head only", "LoraConfig", "other", rank=None),
}
"""By the name that `adapter.method` takes. `full` trains all weights of the target modules and nothing else, `head` only the
layers that the model's files do not have."""


def configuration(section: AdapterSection) -> "peft.PeftConfig":
    """Make the PEFT configuration that a section describes.

    Returns:
        The configuration, without a task type.
    Raises:
        ConfigError: An option is no field of the method's configuration, or the configuration refuses a value.
    """
    import peft

    import pica

    method = METHODS[section.method]
    known: Any = getattr(peft, method.config, None) or getattr(pica, method.config, None)
    if known is None:
        raise ConfigError(f"Method {section.method} needs {method.config}, which this installation does not have.")
    if section.method == "full":
        return _full(section, peft)
    if section.method == "head":
        return _head(section, peft)
    fields = {field.name for field in dataclasses.fields(known) if field.init}
    given: Values = {
        "target_modules": section.target_modules,
        "exclude_modules": section.exclude_modules,
        "layers_to_transform": section.layers_to_transform,
        "rank_pattern": dict(section.rank_pattern),
    }
    for name, value in given.items():
        if value and name not in fields:
            raise ConfigError(f"adapter.{name}: method {section.method} has no such setting; leave it unset.")
    values = {name: value for name, value in given.items() if value}
    if method.rank is not None:
        values[method.rank] = section.r
    _check_options(section, fields - _NOT_OPTIONS - ({method.rank} if method.rank else set()))
    values |= method.values(section) | dict(section.options)
    try:
        return known(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"adapter: method {section.method} refuses these settings: {error}") from error


def changes_base(section: AdapterSection) -> bool:
    """Whether the method may change the base weights when it is put on, so that turned off it leaves another model."""
    # PEFT's initialisations with a name may: PiSSA and others take what the adapter starts from out of the frozen weight.
    return isinstance(getattr(configuration(section), "init_lora_weights", True), str)


def _full(section: AdapterSection, library: Any) -> "peft.PeftConfig":
    """A PEFT adapter that is nothing but complete copies of the target modules."""
    # PEFT stores and loads them like any adapter. The frozen originals stay in memory beside the copies.
    _check_options(section, set())
    if not isinstance(section.target_modules, list):
        raise ConfigError("adapter.target_modules: method full needs a list of module names.")
    for name in ("exclude_modules", "layers_to_transform", "rank_pattern"):
        if getattr(section, name):
            raise ConfigError(f"adapter.{name}: method full has no such setting; leave it unset.")
    return library.LoraConfig(r=1, target_modules=_DUMMY_TARGET, modules_to_save=list(section.target_modules))


def _head(section: AdapterSection, library: Any) -> "peft.PeftConfig":
    """A PEFT adapter that is nothing but the layers that are newly made, which the caller names."""
    _check_options(section, set())
    for name in ("target_modules", "exclude_modules", "layers_to_transform", "rank_pattern"):
        if getattr(section, name):
            raise ConfigError(f"adapter.{name}: method head has no such setting; leave it unset.")
    return library.LoraConfig(r=1, target_modules=_DUMMY_TARGET)


def _check_options(section: AdapterSection, allowed: set[str]) -> None:
    options: Mapping[str, Any] = section.options
    for name in options:
        if name in allowed:
            continue
        near = get_close_matches(name, allowed, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(sorted(allowed)) or 'none'}."
        raise ConfigError(f"adapter.options: method {section.method} has no option {name!r}; {hint}")
