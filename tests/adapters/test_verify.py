from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import pica
from pica import PicaConfig
from pica.cli import main
from pica.errors import BasisMismatchError, ConfigError
from pica.tuners.pica.layer import PicaLinear
from tests.shared import logits


@pytest.fixture
def adapter(tiny_llama, tmp_path):
    model = get_peft_model(tiny_llama(), PicaConfig(r=8, init_weights=False))
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def failed(report) -> list[str]:
    return [c.name for c in report.checks if c.passed is False]


def test_a_good_adapter_passes_every_check_and_leaves_the_base_alone(adapter, tiny_llama):
    base = tiny_llama()
    report = pica.verify(adapter, base)
    assert report.ok
    assert [c.passed for c in report.checks] == [True] * 6
    assert not [m for m in base.modules() if isinstance(m, PicaLinear)]
    assert "changes the output by" in str(report)


def test_without_a_base_only_the_files_are_asked(adapter):
    report = pica.verify(adapter)
    assert report.ok
    assert [c.passed for c in report.checks] == [True, True, True, None, None, None]


def test_another_base_is_told(adapter, tiny_llama):
    assert failed(pica.verify(adapter, tiny_llama(seed=1))) == ["belongs to this base"]
    assert failed(pica.verify(adapter, tiny_llama(intermediate_size=96))) == ["right shapes"]


def test_an_adapter_that_does_nothing_is_told(tiny_llama, tmp_path):
    get_peft_model(tiny_llama(), PicaConfig(r=8)).save_pretrained(str(tmp_path))
    assert failed(pica.verify(tmp_path, tiny_llama())) == ["has an effect"]


@pytest.mark.parametrize("damage", ["cut", "NaN", "no fingerprint", "no file", "no config", "not JSON", "a LoRA"])
def test_damage_is_told(adapter, tiny_llama, damage):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "NaN":
        next(v for v in tensors.values() if v.is_floating_point())[0, 0] = float("nan")
        save_file(tensors, path)
    elif damage == "no fingerprint":
        save_file({k: v for k, v in tensors.items() if not k.endswith("fingerprint")}, path)
    elif damage == "no file":
        path.unlink()
    elif damage == "no config":
        (adapter / "adapter_config.json").unlink()
    elif damage == "not JSON":
        (adapter / "adapter_config.json").write_text("{")
    else:
        get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(str(adapter))
    report = pica.verify(adapter)
    assert failed(report) == [{"NaN": "finite", "no fingerprint": "complete"}.get(damage, "readable")]


def test_the_command_prints_a_table_and_its_status_tells(adapter, tiny_llama, tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    assert main(["verify", str(adapter), "--base", str(tmp_path / "base")]) == 0
    assert "belongs to this base  ok" in capsys.readouterr().out
    assert main(["verify", str(adapter), "--base", str(tmp_path / "other")]) == 1
    assert "15 of 15 layers differ" in capsys.readouterr().out
    assert main(["verify", str(adapter), "--files-only"]) == 0
    assert main(["verify", str(tmp_path / "nothing"), "--files-only"]) == 1


def test_an_adapter_whose_checkpoint_moved_is_verified_as_it_loads(tiny_llama, tmp_path, capsys):
    """Its basis is that of the checkpoint it was quantised from, which the base model itself may be."""
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_llama().save_pretrained(tmp_path / "checkpoint")
    model = get_peft_model(tiny_llama(), PicaConfig(r=8, init_weights=False, basis_from=str(tmp_path / "checkpoint")))  # pyright: ignore[reportArgumentType]
    model.save_pretrained(str(tmp_path / "adapter"))
    (tmp_path / "checkpoint").rename(tmp_path / "moved")
    PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "adapter"))
    report = pica.verify(tmp_path / "adapter", tiny_llama())
    assert report.ok, report
    assert failed(pica.verify(tmp_path / "adapter", tiny_llama(seed=1))) == ["belongs to this base"]


def test_a_model_of_other_sizes_is_told_with_both(tiny_llama, tmp_path):
    model = get_peft_model(tiny_llama(), PicaConfig(r=8, init_weights=False, modules_to_save=["norm"]))  # pyright: ignore[reportArgumentType]
    model.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    wide = {k: torch.ones(80) if v.shape == (64,) else v for k, v in tensors.items()}
    save_file(wide, tmp_path / "adapter_model.safetensors")
    report = pica.verify(tmp_path, tiny_llama())
    assert failed(report) == ["right shapes"]
    assert "norm.weight of shape (80,), and this model has one of shape (64,)" in str(report)


@pytest.mark.parametrize(
    ("recorded", "words"),
    [
        (None, "does not record its base model; name it with --base"),
        (7, "base_model_name_or_path is 7, not a name"),
        ("/gone/away", "'/gone/away' does not exist. Name it with --base"),
    ],
)
@pytest.mark.parametrize("command", ["verify", "export", "merge", "evaluate"])
def test_a_base_that_is_not_to_be_had_is_one_sentence(adapter, tmp_path, tiny_llama, capsys, recorded, words, command):
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = recorded
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    more = {"verify": [], "evaluate": ["--task", "arithmetic"]}.get(command, ["-o", str(tmp_path / "out")])
    assert main([command, str(adapter), *more]) == 2
    assert words in capsys.readouterr().err
    if command in ("verify", "export") and recorded != 7:
        tiny_llama().save_pretrained(tmp_path / "base")
        assert main([command, str(adapter), *more, "--base-model", str(tmp_path / "base")]) == 0


def test_the_class_that_an_adapter_names_is_taken_from_known_libraries_only(tiny_llama, tmp_path, monkeypatch):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    get_peft_model(base, PicaConfig(r=4, init_weights=False)).save_pretrained(str(tmp_path / "adapter"))
    config = tmp_path / "adapter" / "adapter_config.json"
    stored = json.loads(config.read_text())
    assert stored["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"  # not said by a task type
    assert pica.verify(tmp_path / "adapter", str(tmp_path / "base")).ok
    (tmp_path / "planted_library.py").write_text("raise SystemExit('was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    stored["auto_mapping"]["parent_library"] = "planted_library"
    config.write_text(json.dumps(stored))
    assert pica.verify(tmp_path / "adapter", str(tmp_path / "base")).ok


def test_hotswap_changes_the_weights_in_place(adapter, tiny_llama, tmp_path):
    other = get_peft_model(tiny_llama(), PicaConfig(r=8, init_weights=False))
    other.save_pretrained(str(tmp_path / "other"))
    model = PeftModel.from_pretrained(tiny_llama(), str(adapter))
    identity = {n: id(p) for n, p in model.named_parameters()}
    assert not torch.equal(logits(model), logits(other))
    pica.hotswap_adapter(model, tmp_path / "other")
    torch.testing.assert_close(logits(model), logits(other), atol=1e-6, rtol=0)
    assert {n: id(p) for n, p in model.named_parameters()} == identity
    assert not any(p.requires_grad for p in model.parameters())


def test_hotswap_refuses_what_does_not_fit_and_changes_nothing(adapter, tiny_llama, tmp_path):
    model = PeftModel.from_pretrained(tiny_llama(), str(adapter))
    before = logits(model)
    get_peft_model(tiny_llama(), PicaConfig(r=4)).save_pretrained(str(tmp_path / "small"))
    get_peft_model(tiny_llama(seed=1), PicaConfig(r=8, init_weights=False)).save_pretrained(str(tmp_path / "foreign"))
    with pytest.raises(ConfigError, match="r: 8 here, 4 there"):
        pica.hotswap_adapter(model, tmp_path / "small")
    with pytest.raises(ConfigError, match="no PiCa or SVFT adapter 'nobody'"):
        pica.hotswap_adapter(model, adapter, "nobody")
    with pytest.raises(BasisMismatchError):
        pica.hotswap_adapter(model, tmp_path / "foreign")
    assert torch.equal(logits(model), before)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge_adapter"):
        pica.hotswap_adapter(merged, adapter)


@pytest.mark.parametrize("ask", [pica.verify, lambda folder, base: pica.export_lora(folder, folder / "lora", base)])
def test_a_base_model_that_was_passed_in_can_still_be_trained(adapter, tiny_llama, ask):
    base = tiny_llama()
    ask(adapter, base)
    assert all(p.requires_grad for p in base.parameters())


def test_hotswap_refuses_rows_of_other_tokens_and_other_heads(tiny_llama, tmp_path):
    """Their tensors would have the same shapes."""

    def adapted(**settings) -> PeftModel:
        model = get_peft_model(tiny_llama(), PicaConfig(r=8, target_modules=["q_proj"], **settings))
        assert isinstance(model, PeftModel)
        return model

    adapted(trainable_token_indices=[7, 8]).save_pretrained(str(tmp_path / "rows"))
    with pytest.raises(ConfigError, match=r"trainable_token_indices: \[3, 4\] here, \[7, 8\] there"):
        pica.hotswap_adapter(adapted(trainable_token_indices=[3, 4]), tmp_path / "rows")
    adapted().save_pretrained(str(tmp_path / "plain"))
    with pytest.raises(ConfigError, match=r"modules_to_save: \['lm_head'\] here, None there"):
        pica.hotswap_adapter(adapted(modules_to_save=["lm_head"]), tmp_path / "plain")


def test_hotswap_refuses_patterns_in_another_order(tiny_llama, tmp_path):
    """The first that matches counts, so matrices of the same names and shapes would go to other layers."""

    def adapted(share: dict[str, str]) -> PeftModel:
        model = get_peft_model(tiny_llama(), PicaConfig(r=8, target_modules=["q_proj", "o_proj"], share=share))
        assert isinstance(model, PeftModel)
        return model

    share = {"layers.0.self_attn.*": "first", ".*q_proj": "rest"}
    adapted(dict(reversed(share.items()))).save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match="share: "):
        pica.hotswap_adapter(adapted(share), tmp_path)
