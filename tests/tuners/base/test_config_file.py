"""Loading is strict: what is wrong with an adapter's folder is told in one sentence, before the model is touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from pica import PicaConfig, SvftConfig
from pica.errors import AdapterFileError, ConfigError


def make_base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).eval()


OWN: dict[Any, dict[str, Any]] = {PicaConfig: {"r": 3}, SvftConfig: {}}


@pytest.fixture(params=OWN, ids=lambda method: method.method)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A saved adapter of `make_base`, of either method."""
    model = get_peft_model(
        make_base(), request.param(target_modules=["0", "2"], init_weights=False, **OWN[request.param])
    )
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def method_of(folder: Path) -> type[PicaConfig] | type[SvftConfig]:
    return {"PICA": PicaConfig, "SVFT": SvftConfig}[
        json.loads((folder / "adapter_config.json").read_text())["peft_type"]
    ]


PICA_ONLY = pytest.mark.parametrize("folder", [PicaConfig], indirect=True, ids=["PICA"])


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refused(folder: Path, kind: type[Exception], match: str) -> None:
    """Every way of loading raises, and the model is as it was: nothing wrapped, the same output bits."""
    x = torch.linspace(-1, 1, 12).view(2, 6)
    base = make_base()
    before, names = base(x), [name for name, _ in base.named_modules()]
    with pytest.raises(kind, match=match):
        PeftModel.from_pretrained(base, folder)
    assert [name for name, _ in base.named_modules()] == names
    assert torch.equal(base(x), before)
    other = get_peft_model(base, PicaConfig(r=2, target_modules=["0"], init_weights=False))  # pyright: ignore[reportArgumentType]
    before, names = other(x), [name for name, _ in other.named_modules()]
    with pytest.raises(kind, match=match):
        other.load_adapter(str(folder), "second")
    assert list(other.peft_config) == ["default"]
    assert [name for name, _ in other.named_modules()] == names
    assert torch.equal(other(x), before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share": ["role"]}, r"share=\['role'\] must be 'role', 'none'"),
        ({"share": {"0": 3}}, "share: the group of '0' must be a non-empty name"),
        ({"target_modules": 5}, "target_modules=5 must be a name, a list of names or null"),
        ({"target_modules": ["0", 2]}, r"target_modules=\['0', 2\] must be a name"),
        ({"target_modules": [["0"]]}, r"target_modules=\[\['0'\]\] must be a name"),
        ({"exclude_modules": {"0": 1}}, "exclude_modules=.* must be a name"),
        ({"modules_to_save": "2"}, "modules_to_save='2' must be a list of names or null"),
        ({"layers_to_transform": ["1"]}, r"layers_to_transform=\['1'\] must be a whole number, a list"),
        ({"trainable_token_indices": {"0": "1"}}, "trainable_token_indices=.* must be a list of whole numbers"),
        ({"inference_mode": 1}, "inference_mode=1 must be true or false"),
        ({"bias": None}, "bias=None is unknown"),
        ({"task_type": "POETRY"}, "Invalid task type: 'POETRY'"),
        ({"auto_mapping": []}, r"auto_mapping=\[\] must be a mapping or null"),
        ({"base_model_name_or_path": 7}, "base_model_name_or_path=7 must be text or null"),
    ],
)
def test_a_wrong_value_is_told_with_the_file(folder: Path, fields: dict[str, Any], message: str):
    edit(folder, **fields)
    refused(folder, ConfigError, f"adapter_config.json'?: {method_of(folder).__name__}: {message}")


@PICA_ONLY
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": "8"}, "r='8' must be a whole number of at least 1"),
        ({"r": 0}, "r=0 must be a whole number"),
        ({"r": True}, "r=True must be a whole number"),
        ({"r": None}, "r=None must be a whole number"),
        ({"r": 2.0}, "r=2.0 must be a whole number"),
        ({"rank_pattern": {"0": "4"}}, r"rank_pattern\['0'\]='4' must be a whole number"),
        ({"rank_pattern": [4]}, r"rank_pattern=\[4\] must be a mapping"),
        ({"rank_pattern": None}, "rank_pattern=None must be a mapping"),
        ({"rank_pattern": [["0", 4], ["2"]]}, r"rank_pattern=\[\['0', 4\], \['2'\]\] must be a mapping"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern='\(' is not a regular expression"),
        ({"projection": "top"}, "projection='top' is unknown"),
        ({"projection": ["principal"]}, r"projection=\['principal'\] is unknown"),
        ({"projection_seed": "1"}, "projection_seed='1' must be a whole number"),
        ({"save_basis": "no"}, "save_basis='no' must be true or false"),
        ({"basis_format": "one"}, "basis_format='one' must be a whole number or null"),
        ({"basis_digest": "0" * 63}, "basis_digest='0{63}' must be a SHA-256 in hexadecimal"),
        ({"basis_digest": 7}, "basis_digest=7 must be"),
    ],
)
def test_a_wrong_value_of_picas_own_is_told_with_the_file(folder: Path, fields: dict[str, Any], message: str):
    edit(folder, **fields)
    refused(folder, ConfigError, f"adapter_config.json'?: PicaConfig: {message}")


def test_unknown_fields_are_named_with_the_version_that_wrote_them(folder: Path):
    edit(folder, depth=3, alpha=1, pica_version="9.9")
    refused(folder, AdapterFileError, "does not know: 'alpha', 'depth'. It was written by pica 9.9; upgrade pica")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_to_nowhere_is_a_missing_file(folder: Path, name: str):
    (folder / name).unlink()
    (folder / name).symlink_to("nowhere")
    # PEFT itself looks for a configuration that is not there, on the hub
    kind, match = (ValueError, "Can't find") if name.endswith("json") else (AdapterFileError, "holds no adapter_model")
    refused(folder, kind, match)


def declare_more(content: bytes) -> bytes:
    """A header that places a tensor of a terabyte in the file."""
    header = b'{"huge":{"dtype":"F32","shape":[1000000,250000],"data_offsets":[0,1000000000000]}}'
    return len(header).to_bytes(8, "little") + header + content[-100:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: b"",
        lambda c: c[:7],
        lambda c: c[:-1],
        lambda c: c + b"\0",
        lambda c: c[:200],
        lambda c: (2**62).to_bytes(8, "little") + c[8:],
        lambda c: c[:8] + b"[" + c[9:],
        lambda c: b"\x80\x04\x95pickle" * 9,
        declare_more,
    ],
)
def test_a_damaged_weights_file_is_told(folder: Path, damage: Callable[[bytes], bytes]):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused(folder, AdapterFileError, "adapter_model.safetensors' is damaged or cut short")


def test_a_file_without_tensors_is_told(folder: Path):
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    refused(folder, AdapterFileError, "holds no tensors")


def test_missing_weights_are_told_and_never_looked_for_on_the_hub(folder: Path):
    (folder / "adapter_model.safetensors").unlink()
    refused(folder, AdapterFileError, "holds no adapter_model.safetensors: the adapter is incomplete")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe{}", b'{"r": ' + b"9" * 5000 + b"}", b"[1]", b'"PICA"', b"null"]
)
def test_a_configuration_that_is_no_json_object_is_told(folder: Path, content: bytes):
    method = method_of(folder)
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(AdapterFileError, match=r"adapter_config.json' (cannot be read|must hold a JSON object)"):
        method.from_pretrained(folder)


def test_a_subfolder_is_checked_too(folder: Path):
    method = method_of(folder)
    assert method.from_pretrained(folder.parent, subfolder="adapter").target_modules == {"0", "2"}
    (folder / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(AdapterFileError, match="cut short"):
        method.from_pretrained(str(folder.parent), subfolder="adapter")


def test_pickled_weights_are_refused_unless_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch):
    model = PeftModel.from_pretrained(make_base(), folder)
    x = torch.linspace(-1, 1, 12).view(2, 6)
    model.save_pretrained(str(folder.parent / "pickled"), safe_serialization=False)
    refused(folder.parent / "pickled", AdapterFileError, "adapter_model.bin, a pickled file.*PICA_ALLOW_TORCH_FILES=1")
    monkeypatch.setenv("PICA_ALLOW_TORCH_FILES", "1")
    assert torch.equal(PeftModel.from_pretrained(make_base(), folder.parent / "pickled")(x), model(x))


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"modules_to_save": ["0"]}, "'0'"), ({"trainable_token_indices": {"0": [1]}}, "'trainable_token_indices'")],
)
def test_weights_that_the_configuration_promises_are_missed_before_the_model_is_touched(
    folder: Path, fields: dict[str, Any], named: str
):
    edit(folder, **fields)
    refused(folder, AdapterFileError, f"holds no weights for {named}")
