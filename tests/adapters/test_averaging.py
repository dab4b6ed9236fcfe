"""The mean of adapters: exact on one basis, refused where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import pica
from pica.errors import AdapterFileError, BasisMismatchError, ConfigError, OutputError, PicaError

WEIGHTS = "adapter_model.safetensors"
METHODS: dict[str, Any] = {
    "PiCa": lambda: pica.PicaConfig(r=4, target_modules=["q_proj", "down_proj"], init_weights=False),
    "PiCa with its basis": lambda: pica.PicaConfig(r=4, target_modules=["q_proj"], init_weights=False, save_basis=True),
    "SVFT": lambda: pica.SvftConfig(target_modules=["q_proj"], init_weights=False),
    "SVFT top_k": lambda: pica.SvftConfig(
        target_modules=["q_proj"], init_weights=False, pattern="top_k", off_diagonals=1
    ),
}


def clients(base: Any, config: Any, folder: Path, count: int = 3) -> list[Path]:
    """Adapters that start from one saved one and were trained apart."""
    get_peft_model(base(), config()).save_pretrained(str(folder / "start"))
    made = []
    for number in range(count):
        model = PeftModel.from_pretrained(base(), str(folder / "start"), is_trainable=True)
        generator = torch.Generator().manual_seed(number)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        made.append(folder / f"client-{number}")
        model.save_pretrained(str(made[-1]))
    return made


def updates(base: nn.Module, folder: Path) -> dict[str, Tensor]:
    model = PeftModel.from_pretrained(base, str(folder))
    return {n: m.get_delta_weight("default").double() for n, m in model.named_modules() if hasattr(m, "group_of")}  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("weights", [None, [300, 100, 0]], ids=["alike", "weighted"])
def test_the_update_of_the_mean_is_the_mean_of_the_updates(tiny_llama, tmp_path: Path, config: Any, weights: Any):
    folders = clients(tiny_llama, config, tmp_path)
    state = pica.average_adapters(folders, weights, tmp_path / "mean")
    shares = [1 / 3] * 3 if weights is None else [0.75, 0.25, 0]
    parts = [updates(tiny_llama(), folder) for folder in folders]
    found = updates(tiny_llama(), tmp_path / "mean")
    assert found
    for name, update in found.items():
        exact = sum(share * part[name] for share, part in zip(shares, parts))
        torch.testing.assert_close(update, exact, rtol=1e-5, atol=1e-6)
        assert (update - parts[0][name]).norm() > 0.01 * update.norm()
    written = load_file(tmp_path / "mean" / WEIGHTS)
    assert written.keys() == state.keys()
    assert all(torch.equal(written[key], state[key]) and written[key].dtype == state[key].dtype for key in state)
    config_files = [(folder / "adapter_config.json").read_bytes() for folder in (folders[0], tmp_path / "mean")]
    assert config_files[0] == config_files[1]


@pytest.mark.parametrize("config", METHODS.values(), ids=METHODS)
def test_state_dicts_and_folders_may_be_mixed_and_what_is_given_stays(tiny_llama, tmp_path: Path, config: Any):
    folders = clients(tiny_llama, config, tmp_path, 2)
    model = PeftModel.from_pretrained(tiny_llama(), str(folders[1]))
    state = get_peft_model_state_dict(model)
    before = {key: value.clone() for key, value in state.items()}
    mean = pica.average_adapters([str(folders[0]), state])
    assert all(torch.equal(mean[k], v) for k, v in pica.average_adapters(folders).items())
    set_peft_model_state_dict(model, mean)
    assert all(torch.equal(value, mean[key]) for key, value in get_peft_model_state_dict(model).items())
    alone = pica.average_adapters([before])
    assert all(torch.equal(alone[key], value) for key, value in before.items())


def test_half_precision_is_summed_in_float64_and_the_widest_dtype_is_kept(tiny_llama, tmp_path: Path):
    states = [load_file(folder / WEIGHTS) for folder in clients(tiny_llama, METHODS["PiCa"], tmp_path)]
    half = [{k: v.half() if v.is_floating_point() else v for k, v in state.items()} for state in states]
    mean = pica.average_adapters(half)
    assert {v.dtype for v in mean.values()} == {torch.float16, torch.uint8}
    for key, value in mean.items():
        if value.is_floating_point():
            assert torch.equal(value, (torch.stack([state[key].double() for state in half]).sum(0) / 3).half())
    assert {v.dtype for v in pica.average_adapters([*half, states[0]]).values()} == {torch.float32, torch.uint8}


def test_a_trained_head_is_averaged_too(tmp_path: Path):
    def base() -> nn.Module:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
        return BertForSequenceClassification(BertConfig(vocab_size=64, num_hidden_layers=1, **sizes))

    base().save_pretrained(tmp_path / "base")  # pyright: ignore[reportCallIssue]
    folders = clients(base, lambda: pica.PicaConfig(r=2, task_type="SEQ_CLS"), tmp_path, 2)
    for folder in folders:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "base")}))
    pica.average_adapters(folders, output_dir=tmp_path / "mean")
    heads = [load_file(folder / WEIGHTS)["base_model.model.classifier.weight"] for folder in folders]
    assert not torch.equal(*heads)
    mean: Any = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "mean")
    torch.testing.assert_close(mean.base_model.model.classifier.modules_to_save["default"].weight.data, sum(heads) / 2)


def _edit(folder: Path, change: Any) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


def _first(state: dict[str, Tensor]) -> str:
    return next(key for key in state if "q_proj" in key)


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda s: s[_first(s)].view(-1)[:1].fill_(torch.nan), AdapterFileError, "q_proj.* of '.*client-1' holds NaN"),
        (lambda s: s[_first(s)].view(-1)[:1].fill_(-torch.inf), AdapterFileError, "client-1' holds NaN or infinity"),
        (lambda s: s.update({_first(s): s[_first(s)][:-1]}), AdapterFileError, r"is torch.float32 .* in '.*client-0'"),
        (lambda s: s.pop(_first(s)), AdapterFileError, "client-0' holds .*q_proj.*, and '.*client-1' does not"),
        (lambda s: s.update(more=torch.ones(1)), AdapterFileError, "client-1' holds more, and '.*client-0' does not"),
        (
            lambda s: s.pop(next(k for k in s if k.endswith("fingerprint"))),
            AdapterFileError,
            "client-1' holds no basis fingerprint",
        ),
        (
            lambda s: next(v for k, v in s.items() if k.endswith("fingerprint"))[-8:].add_(1),
            BasisMismatchError,
            "client-0' and '.*client-1' were trained with different bases",
        ),
    ],
    ids=["nan", "inf", "shape", "missing", "extra", "no fingerprint", "fingerprint"],
)
@pytest.mark.parametrize("config", [METHODS["PiCa"], METHODS["SVFT"]], ids=["PiCa", "SVFT"])
def test_what_has_no_mean_is_refused_and_nothing_written(tiny_llama, tmp_path, config, damage, error, says):
    folders = clients(tiny_llama, config, tmp_path, 2)
    _edit(folders[1], damage)
    with pytest.raises(error, match=says):
        pica.average_adapters(folders, output_dir=tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_other_bases_configurations_and_methods_are_refused_by_name(tiny_llama, tmp_path: Path):
    start = clients(tiny_llama, METHODS["PiCa"], tmp_path, 1)[0]
    others: dict[str, tuple[Any, Any, type[PicaError], str]] = {
        "base": (tiny_llama(seed=1), METHODS["PiCa"](), BasisMismatchError, "different bases"),
        "rank": (tiny_llama(), pica.PicaConfig(r=5, target_modules=["q_proj", "down_proj"]), ConfigError, "r: 4 in "),
        "method": (tiny_llama(), METHODS["SVFT"](), ConfigError, "peft_type: .*PICA"),
        "lora": (tiny_llama(), LoraConfig(target_modules=["q_proj"]), AdapterFileError, "not a PiCa or SVFT adapter"),
    }
    for name, (base, config, error, says) in others.items():
        get_peft_model(base, config).save_pretrained(str(tmp_path / name))
        with pytest.raises(error, match=says) as told:
            pica.average_adapters([start, tmp_path / name])
        assert str(tmp_path / name) in str(told.value)
    lora = get_peft_model_state_dict(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])))
    with pytest.raises(AdapterFileError, match=r"adapter 2 \(a state dict\) holds no basis fingerprint"):
        pica.average_adapters([start, lora])


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [1, float("nan")], [1, float("inf")]], ids=str)
def test_weights_that_make_no_mean_are_refused(tiny_llama, tmp_path: Path, weights: list[float]):
    folders = clients(tiny_llama, METHODS["PiCa"], tmp_path, 2)
    with pytest.raises(ConfigError, match=r"weights"):
        pica.average_adapters(folders, weights)


def test_folders_are_replaced_only_if_asked_and_only_adapters(tiny_llama, tmp_path: Path):
    folders = clients(tiny_llama, METHODS["PiCa"], tmp_path, 2)
    before = (folders[0] / WEIGHTS).read_bytes()
    with pytest.raises(OutputError, match="is not empty"):
        pica.average_adapters(folders, output_dir=folders[0])
    assert (folders[0] / WEIGHTS).read_bytes() == before
    mean = pica.average_adapters(folders, output_dir=folders[0], overwrite=True)
    assert all(torch.equal(mean[k], v) for k, v in load_file(folders[0] / WEIGHTS).items())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(OutputError, match="something else than an adapter"):
        pica.average_adapters(folders, output_dir=tmp_path / "other", overwrite=True)
    states = [load_file(folder / WEIGHTS) for folder in folders]
    with pytest.raises(ConfigError, match="needs an adapter folder"):
        pica.average_adapters(states, output_dir=tmp_path / "mean")
    for nothing in ([], folders[0], states[0]):
        with pytest.raises(ConfigError, match="needs a list of adapters"):
            pica.average_adapters(nothing)  # pyright: ignore[reportArgumentType]
