"""Whatever an adapter's files hold, loading them either works or raises a known error and leaves the model as it was."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from pica import PicaConfig
from pica.errors import PicaError
from pica.tuners.base.bank import find_banks

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# PEFT looks into adapter_config.json for the method's name before it asks the method, with these:
BEFORE_PICA = (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError)
# and this comes from PEFT where a well-formed configuration does not suit the model, such as targets that it lacks.
FROM_PEFT = (ValueError,)

TRICKS = [
    "../../../etc/passwd",
    "/dev/zero",
    "~root",
    "a\0b",
    "%s%n",
    "default",
    "pica_M",
    "0",
    "2",
    ".*",
    "(",
    "[a",
    "",
]
TRICKS += ["all-linear", "(a+)+$", "9" * 400, "\ud83d\ude00", "__class__", "CAUSAL_LM", "principal", "none", "all"]
FIELDS = [*PicaConfig(r=1).to_dict(), "runtime_config", "eva_config", "__init__"]
FIELDS.remove("peft_type")

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.sampled_from([2**31, 2**63, -(2**70), 10**40]),
    st.floats(),
    st.sampled_from(TRICKS),
    st.text(max_size=8),
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TRICKS), inner, max_size=3),
    max_leaves=5,
)


def make_base() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """The files of a good adapter: configuration and weights."""
    folder = tmp_path_factory.mktemp("good")
    model = get_peft_model(make_base(), PicaConfig(r=3, target_modules=["0", "2"], init_weights=False))  # pyright: ignore[reportArgumentType]
    model.save_pretrained(str(folder))
    return (folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()


def damage(data: st.DataObject, content: bytes) -> bytes:
    """Change bytes: flip, cut, insert, repeat."""
    chance = random.Random(data.draw(st.integers(0, 2**32)))
    changed = bytearray(content)
    # the first bytes decide what a safetensors file is taken for, so half of the changes fall there
    places = [chance.randrange(len(content) if chance.random() < 0.5 else min(400, len(content))) for _ in range(4)]
    how = data.draw(st.sampled_from(["flip", "flips", "cut", "insert", "drop", "noise"]))
    if how == "cut":
        return bytes(changed[: places[0]])
    if how == "insert":
        changed[places[0] : places[0]] = chance.randbytes(chance.randrange(1, 40))
    elif how == "drop":
        del changed[places[0] : places[0] + chance.randrange(1, 40)]
    elif how == "noise":
        part = chance.randbytes(chance.randrange(1, 40))
        changed[places[0] : places[0] + len(part)] = part
    else:
        for place in places[: 1 if how == "flip" else 4]:
            changed[place] ^= 1 << chance.randrange(8)
    return bytes(changed)


def forge(data: st.DataObject, content: bytes) -> bytes:
    """Change what the header of a safetensors file says."""
    size = int.from_bytes(content[:8], "little")
    body = content[8 + size :]
    header: dict[str, Any] = json.loads(content[8 : 8 + size])
    name = data.draw(st.sampled_from(sorted(header)))
    how = data.draw(st.sampled_from(["length", "dtype", "shape", "offsets", "rename", "remove", "twice", "value"]))
    if how == "length":
        return data.draw(st.sampled_from([0, 1, 2**20, 2**31, 2**63, 2**64 - 1])).to_bytes(8, "little") + content[8:]
    entry = header[name]
    if how == "dtype" and "dtype" in entry:
        entry["dtype"] = data.draw(st.sampled_from(["F64", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "X", ""]))
    elif how == "shape" and "shape" in entry:
        entry["shape"] = data.draw(st.lists(st.sampled_from([0, 1, 3, 5, 8, 24, 2**40, 2**63]), max_size=4))
    elif how == "offsets" and "data_offsets" in entry:
        entry["data_offsets"] = data.draw(st.lists(st.sampled_from([0, 4, 96, 2**40, 2**63]), min_size=2, max_size=2))
    elif how == "rename":
        new = data.draw(
            st.sampled_from([*TRICKS, "base_model.model.pica_M.x", "base_model.model.0.weight", f"{name}.x"])
        )
        header[new] = header.pop(name)
    elif how == "remove":
        del header[name]
    elif how == "twice":
        header[f"{name}.2"] = entry
    else:
        header[name] = data.draw(values)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def mutate(data: st.DataObject, config: bytes, weights: bytes) -> tuple[bytes, bytes, str]:
    how = data.draw(st.sampled_from(["field", "field", "method", "config bytes", "weights bytes", "weights header"]))
    if how == "config bytes":
        return damage(data, config), weights, how
    if how == "weights bytes":
        return config, damage(data, weights), how
    if how == "weights header":
        return config, forge(data, weights), how
    fields = json.loads(config)
    names = ["peft_type"] if how == "method" else data.draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=2))
    for name in names:
        if name == "peft_type":
            fields[name] = data.draw(
                st.one_of(st.integers(), st.none(), st.sampled_from(["pica", "PICA ", "", "../PICA"]))
            )
        else:
            fields[name] = data.draw(values)
    return json.dumps(fields).encode(), weights, how


def enormous(model: nn.Module) -> bool:
    """Whether a matrix holds finite values so large that no output could stay finite."""
    slots = [slot for _, bank in find_banks(model) for slot in bank.values()]
    return any(float(p.detach().abs().max()) > 1e30 for slot in slots for p in slot.parameters() if p.numel())


def load(folder: Path, x: Tensor, expected: Tensor, pristine: nn.Module) -> str:
    """What loading the folder led to; fails where that is not allowed."""
    base = copy.deepcopy(pristine)
    model, refusal = None, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(base, folder)
    except (PicaError, *BEFORE_PICA, *FROM_PEFT) as error:
        refusal = error
    if model is None:
        assert torch.equal(base(x), expected), f"the model is changed after {refusal!r}"
        return type(refusal).__name__
    with torch.no_grad():
        assert torch.isfinite(model(x)).all() or enormous(model)
    return "loaded"


def fuzz(saved: tuple[bytes, bytes], folder: Path, count: int) -> Counter[str]:
    """Load `count` mutated adapters; how many led to what."""
    outcomes: Counter[str] = Counter()
    x = torch.linspace(-1, 1, 12).view(2, 6)
    pristine = make_base()
    expected = pristine(x)

    @seed(int(os.environ.get("PICA_FUZZ_SEED", "0")))  # the same each time, unless others are asked for
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        config, weights, how = mutate(data, *saved)
        folder.mkdir(exist_ok=True)
        (folder / CONFIG).write_bytes(config)
        (folder / WEIGHTS).write_bytes(weights)
        outcomes[load(folder, x, expected, pristine)] += 1
        outcomes["inputs"] += 1

    attempt()
    shutil.rmtree(folder)
    return outcomes


def report(outcomes: Counter[str], capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nfuzzed loading: {', '.join(f'{n} {what}' for what, n in outcomes.most_common())}")  # noqa: T201


def test_mutated_adapters_load_or_are_refused(saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    outcomes = fuzz(saved, tmp_path / "adapter", 300)
    report(outcomes, capsys)
    assert outcomes["inputs"] >= 300
    assert outcomes["AdapterFileError"] > 30
    assert outcomes["ConfigError"] > 20


@pytest.mark.slow
def test_ten_thousand_mutated_adapters_load_or_are_refused(saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    outcomes = fuzz(saved, tmp_path / "adapter", 10_000)
    report(outcomes, capsys)
    assert outcomes["inputs"] >= 10_000
