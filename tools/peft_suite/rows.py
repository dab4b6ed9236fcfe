"""What the case tables of PEFT's tests are filled with, for each method that this package adds to PEFT."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest
from peft import PeftConfig

from pica import PicaConfig, SvftConfig

METHOD_VARIABLE = "PICA_PEFT_TESTS_METHOD"
"""Environment variable that says to the pytest plugin which method is tested."""


@dataclass(frozen=True)
class Rows:
    """The rows of one method.

    Attributes:
        name: The method's name in test ids.
        config: Its configuration class.
        custom_models, several_active, mixed_batches, diffusion: Rows of those tables.
        language: Configurations that each language model is tried with.
        bank: Name of the method's bank at the root of a model.
    """

    name: str
    config: type[PeftConfig]
    custom_models: list
    several_active: list
    mixed_batches: list
    diffusion: list
    language: list[tuple[str, dict[str, Any]]]
    bank: str


def _custom(name: str, model: str, **kwargs: Any) -> Any:
    return pytest.param(f"PiCa {name}", model, PicaConfig, kwargs, id=f"PiCa {name}")


def _pair(name: str, first: dict[str, Any], second: dict[str, Any]) -> Any:
    first, second = {"init_weights": False, **first}, {"init_weights": False, **second}
    return pytest.param(f"PiCa {name}", "pica", PicaConfig, first, second, id=f"PiCa {name}")


_CUSTOM_MODELS = [
    _custom("target string", "MLP", target_modules="lin0"),
    _custom("target list", "MLP", target_modules=["lin0"]),
    _custom("rank above width", "MLP", target_modules=["lin1"]),
    _custom("two layers", "MLP", target_modules=["lin0", "lin1"], r=4),
    _custom("modules_to_save", "MLP", target_modules=["lin0"], modules_to_save=["lin1"]),
    _custom("minor", "MLP", target_modules=["lin0", "lin1"], r=4, projection="minor"),
    _custom("random", "MLP", target_modules=["lin0", "lin1"], r=4, projection="random"),
    _custom("unshared", "MLP", target_modules=["lin0", "lin1"], r=4, share="none"),
    _custom("group by hand", "MLP2", target_modules=["lin0", "lin1"], r=4, share={"lin[01]": "linear"}),
    _custom("rank_pattern", "MLP", target_modules=["lin0", "lin1"], r=4, rank_pattern={"lin1": 1}),
    _custom("all-linear", "MLP", target_modules="all-linear", r=4),
    _custom("exclude", "MLP", target_modules="all-linear", exclude_modules=["lin1"], r=4),
    _custom("Conv1D", "EmbConv1D", target_modules=["conv1d"]),
    _custom("Conv1D and linear", "EmbConv1D", target_modules=["conv1d", "lin0"], r=4),
    _custom("Conv1D and tokens", "EmbConv1D", target_modules=["conv1d"], trainable_token_indices={"emb": [0, 10]}),
    _custom("head of Conv2d", "Conv2d", target_modules=["lin0"]),
]

_SEVERAL_ACTIVE = [
    _pair("same", {"target_modules": ["lin0"], "r": 4}, {"target_modules": ["lin0"], "r": 4}),
    _pair("different layers", {"target_modules": ["lin0"], "r": 4}, {"target_modules": ["lin1"], "r": 2}),
    _pair("growing rank", {"target_modules": ["lin0"], "r": 2}, {"target_modules": ["lin0"], "r": 8}),
    _pair(
        "two projections",
        {"target_modules": ["lin0"], "r": 4},
        {"target_modules": ["lin0"], "r": 4, "projection": "minor"},
    ),
]

_MIXED_BATCHES = [
    pytest.param(
        f"PiCa {name}",
        PicaConfig(target_modules=["lin0"], r=4, init_weights=False),
        PicaConfig(target_modules=["lin0"], init_weights=False, **second),
        id=f"PiCa {name}",
    )
    for name, second in {"larger rank": {"r": 8}, "other projection": {"r": 4, "projection": "random"}}.items()
]

_CLIP_TARGETS = ["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"]
_UNET_TARGETS = ["to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
_DIFFUSION = [
    pytest.param(
        PicaConfig,
        {
            "text_encoder": {"r": 8, "target_modules": _CLIP_TARGETS, "init_weights": False},
            "unet": {"r": 8, "target_modules": _UNET_TARGETS, "init_weights": False},
        },
        id="PiCa",
    )
]


PICA = Rows(
    "PiCa",
    PicaConfig,
    _CUSTOM_MODELS,
    _SEVERAL_ACTIVE,
    _MIXED_BATCHES,
    _DIFFUSION,
    # the default sharing with the default targets, and none with a small rank
    [("shared", {"r": 8}), ("unshared", {"r": 4, "share": "none"})],
    "pica_M",
)


def _svft(name: str, model: str, **kwargs: Any) -> Any:
    return pytest.param(f"SVFT {name}", model, SvftConfig, kwargs, id=f"SVFT {name}")


_TWO = ["lin0", "lin1"]
_BAND = {"pattern": "banded", "off_diagonals": 2}
_RANDOM = {"pattern": "random", "off_diagonals": 1}

SVFT = Rows(
    "SVFT",
    SvftConfig,
    [
        _svft("target string", "MLP", target_modules="lin0"),
        _svft("two layers", "MLP", target_modules=_TWO),
        _svft("modules_to_save", "MLP", target_modules=["lin0"], modules_to_save=["lin1"]),
        _svft("banded", "MLP", target_modules=_TWO, **_BAND),
        _svft("random", "MLP", target_modules=_TWO, **_RANDOM),
        _svft("top_k", "MLP", target_modules=_TWO, pattern="top_k", off_diagonals=1),
        _svft("by hand", "MLP2", target_modules=_TWO, share={"lin[01]": "linear"}, **_BAND),
        _svft("shared", "MLP", target_modules=_TWO, share="role"),
        _svft("all-linear", "MLP", target_modules="all-linear"),
        _svft("exclude", "MLP", target_modules="all-linear", exclude_modules=["lin1"]),
        _svft("Conv1D", "EmbConv1D", target_modules=["conv1d"]),
        _svft("Conv1D and linear", "EmbConv1D", target_modules=["conv1d", "lin0"], **_BAND),
        _svft("Conv1D and tokens", "EmbConv1D", target_modules=["conv1d"], trainable_token_indices={"emb": [0, 10]}),
        _svft("head of Conv2d", "Conv2d", target_modules=["lin0"]),
    ],
    [
        pytest.param(f"SVFT {name}", "svft", SvftConfig, one, two, id=f"SVFT {name}")
        for name, one, two in [
            (
                name,
                {"init_weights": False, "target_modules": ["lin0"]},
                {"init_weights": False, "target_modules": ["lin0"], **second},
            )
            for name, second in {
                "same": {},
                "different layers": {"target_modules": ["lin1"]},
                "banded": _BAND,
                "random": _RANDOM,
            }.items()
        ]
    ],
    [
        pytest.param(
            f"SVFT {name}",
            SvftConfig(target_modules=["lin0"], init_weights=False),
            SvftConfig(target_modules=["lin0"], init_weights=False, **second),
            id=f"SVFT {name}",
        )
        for name, second in {"banded": _BAND, "random": _RANDOM}.items()
    ],
    [
        pytest.param(
            SvftConfig,
            {
                "text_encoder": {"target_modules": _CLIP_TARGETS, "init_weights": False},
                "unet": {"target_modules": _UNET_TARGETS, "init_weights": False},
            },
            id="SVFT",
        )
    ],
    [("plain", {}), ("banded and shared", {**_BAND, "share": "role"})],
    "svft_T",
)

ROWS = {"pica": PICA, "svft": SVFT}[os.environ.get(METHOD_VARIABLE, "pica")]
"""Those of the method that is tested."""


class MethodAsExample:
    """Called like LoRA's (or LoKr's) configuration, makes the method's. No subclass, so that isinstance sees through."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        dropped = ["lora_alpha", "lora_dropout", "alpha"]  # no method here has a scaling or a dropout
        if ROWS is SVFT:
            dropped += ["r", "rank_pattern"]
        for name in dropped:
            kwargs.pop(name, None)
        if "init_lora_weights" in kwargs:
            kwargs["init_weights"] = kwargs.pop("init_lora_weights")
        if kwargs.get("bias") == "lora_only":
            kwargs["bias"] = f"{ROWS.name.lower()}_only"
        return ROWS.config(*args, **kwargs)


def language(task: str) -> list:
    """The method's configurations for models of one task."""
    base = {"task_type": task, "target_modules": None}
    return [
        pytest.param(ROWS.config, {**base, **settings}, id=f"{ROWS.name} {name}") for name, settings in ROWS.language
    ]
