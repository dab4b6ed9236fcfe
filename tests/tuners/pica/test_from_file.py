"""Adapters on a basis that a file brings: every projection, every way to find it, and every reason to refuse."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import pica
from pica.basis import spectral
from pica.basis.file import NAME
from pica.calibration.making import make_basis
from pica.errors import BasisMismatchError, ConfigError

TARGETS = ["q_proj", "k_proj", "down_proj"]
IDS = torch.arange(24)[None]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def config(basis: Path | str | None, projection: str = "activation", **more: Any) -> pica.PicaConfig:
    fields = {"r": 8, "target_modules": TARGETS, "init_weights": False}
    return pica.PicaConfig(projection=projection, basis_from=basis and str(basis), **{**fields, **more})  # pyright: ignore


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any]) -> Callable[[str], Path]:
    """Folder of a basis of the tiny model, made once for each projection."""
    folder = tmp_path_factory.mktemp("bases")
    read = [{"input_ids": torch.randint(96, (2, 30), generator=torch.Generator().manual_seed(i))} for i in range(2)]

    def of(projection: str) -> Path:
        if not (folder / projection).is_dir():
            wanted = pica.PicaConfig(r=12, projection=projection, target_modules=TARGETS)  # pyright: ignore
            make_basis(tiny_llama(), folder / projection, wanted, data=read)
        return folder / projection

    return of


@pytest.fixture
def no_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a basis was solved")

    monkeypatch.setattr(spectral, "_solve_with_fallbacks", refuse)


@pytest.mark.parametrize("projection", ["activation", "weighted", "principal", "minor", "random"])
def test_trained_saved_loaded_merged_and_exported(projection, bases, tiny_llama, tmp_path, request):
    basis = bases(projection)
    request.getfixturevalue("no_solver")
    model = get_peft_model(tiny_llama(), config(basis, projection))
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    wanted = logits(model)
    assert (wanted - logits(tiny_llama())).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "a")
    stored = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert len(stored["basis_digest"]) == 64
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "a"))
    assert torch.equal(logits(loaded), wanted)
    assert pica.verify(tmp_path / "a", tiny_llama()).ok
    pica.export_lora(tmp_path / "a", tmp_path / "lora", base_model=tiny_llama())
    lora = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "lora"))
    torch.testing.assert_close(logits(lora), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), wanted, atol=1e-4, rtol=0)


def test_a_file_of_principal_directions_and_the_weights_themselves_mean_the_same(bases, tiny_llama, tmp_path):
    get_peft_model(tiny_llama(), config(None, "principal")).save_pretrained(tmp_path / "a")
    solved = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "a"))
    named = pica.PicaConfig.from_pretrained(str(tmp_path / "a"))
    named.basis_from = str(bases("principal"))
    read = PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "a"), config=named)
    torch.testing.assert_close(logits(read), logits(solved), atol=1e-4, rtol=0)


def test_adapters_of_one_basis_share_it_and_go_in_one_batch(bases, tiny_llama):
    model: Any = get_peft_model(tiny_llama(), config(bases("activation")), adapter_name="one")
    model.add_adapter("two", config(bases("activation"), r=4))
    model.add_adapter("three", config(None, "principal"))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert sum(name.startswith("pica_basis_") for name, _ in layer.named_buffers()) == 2
    alone = []
    for name in ("one", "two", "three"):
        model.set_adapter(name)
        alone.append(logits(model))
    with torch.no_grad():
        mixed = model.eval()(input_ids=IDS.repeat(3, 1), adapter_names=["one", "two", "three"]).logits
    torch.testing.assert_close(mixed, torch.cat(alone), atol=1e-5, rtol=0)
    model.add_weighted_adapter(["one", "two"], [1.0, 0.5], "sum")
    parts = {name: layer.get_delta_weight(name) for name in ("one", "two", "sum")}
    torch.testing.assert_close(parts["sum"], parts["one"] + 0.5 * parts["two"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(bases, tiny_llama, tmp_path, dtype):
    model = get_peft_model(tiny_llama(dtype=dtype), config(bases("activation")))
    model.save_pretrained(tmp_path / "a")
    loaded = PeftModel.from_pretrained(tiny_llama(dtype=dtype), str(tmp_path / "a"))
    assert torch.equal(logits(loaded), logits(model))


def test_it_is_found_beside_the_adapter_and_with_save_basis_within_it(bases, tiny_llama, tmp_path):
    moved = tmp_path / "basis"
    shutil.copytree(bases("activation"), moved)
    beside, within = tmp_path / "beside", tmp_path / "within"
    for folder, save in ((beside, False), (within, True)):
        model = get_peft_model(tiny_llama(), config(moved, save_basis=save))
        model.save_pretrained(folder)
    wanted = logits(model)
    assert (beside / "adapter_model.safetensors").stat().st_size < (within / "adapter_model.safetensors").stat().st_size
    shutil.copy(moved / NAME, beside / NAME)
    shutil.rmtree(moved)
    found = PeftModel.from_pretrained(tiny_llama(), str(beside))
    assert (logits(found) - logits(tiny_llama())).abs().max() > 1e-3
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), str(within))), wanted)
    (beside / NAME).unlink()
    base = tiny_llama()
    with pytest.raises(
        ConfigError, match=r"The basis \(sha256 .*\) is not to be found: looked in .*beside.* and the cache"
    ):
        PeftModel.from_pretrained(base, str(beside))
    assert not isinstance(base.model.layers[0].self_attn.q_proj, pica.PicaModel.layer_class)


def test_another_file_is_refused(bases, tiny_llama, tmp_path):
    get_peft_model(tiny_llama(), config(bases("activation"))).save_pretrained(tmp_path / "a")
    made = dataclasses.replace(config(None), r=12)
    other = [{"input_ids": torch.zeros(1, 30, dtype=torch.long) + torch.arange(30)}]
    make_basis(tiny_llama(), tmp_path / "other", made, data=other)
    named = PeftConfig.from_pretrained(str(tmp_path / "a"))
    named.basis_from = str(tmp_path / "other")  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConfigError, match="is another one"):
        PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "a"), config=named)
    named.basis_digest = None  # pyright: ignore[reportAttributeAccessIssue] - even so the fingerprint tells
    with pytest.raises(BasisMismatchError, match="trained with another basis"):
        PeftModel.from_pretrained(tiny_llama(), str(tmp_path / "a"), config=named)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"basis_from": None}, "make a basis with `pica basis MODEL -o DIR --projection activation`"),
        ({"projection": "weighted"}, "holds 'activation' directions, and the adapter has projection='weighted'"),
        ({"r": 13}, "has 12 directions a layer, and the adapter asks for 13"),
        ({"rank_pattern": {"q_proj": 20}}, "asks for 20"),
        ({"target_modules": ["v_proj"]}, "has no directions for model.layers.0.self_attn.v_proj"),
    ],
)
def test_what_a_basis_does_not_have_is_refused(bases, tiny_llama, fields, why):
    base = tiny_llama()
    given = {"projection": "activation", "basis_from": str(bases("activation")), "r": 8, "target_modules": TARGETS}
    with pytest.raises(ConfigError, match=why):
        get_peft_model(base, pica.PicaConfig(**{**given, **fields}))
    assert torch.equal(logits(base), logits(tiny_llama()))


def test_another_base_model_is_refused(bases, tiny_llama):
    with pytest.raises(ConfigError, match="was made for another base model"):
        get_peft_model(tiny_llama(seed=1), config(bases("activation")))


def test_a_body_finds_the_directions_of_the_model_with_a_head(bases, tiny_llama):
    body: Any = tiny_llama().model
    get_peft_model(body, config(bases("activation")))
    assert body.layers[0].self_attn.q_proj.method.usable_directions("default") == 8
