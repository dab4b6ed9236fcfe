"""Bases from what layers are given: against the layers' inputs themselves, and what the model is left like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import pica
from pica.basis.file import BasisFile
from pica.calibration import collecting
from pica.calibration.making import make_basis
from pica.errors import BasisError, ConfigError, OutputError, TargetError

TARGETS = ["q_proj", "k_proj", "down_proj"]


def batches(count: int = 3, rows: int = 2, length: int = 24) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(96, (rows, length), generator=g)} for _ in range(count)]


def inputs_of(model: nn.Module, path: str, read: list[dict[str, Tensor]]) -> Tensor:
    """Everything that a layer is given, without padding, (tokens, in), float64."""
    seen: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].detach())

    handle = model.get_submodule(path).register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in read:
            model(**batch)
    handle.remove()
    masks = [batch.get("attention_mask", torch.ones(x.shape[:2])).bool() for batch, x in zip(read, seen)]
    return torch.cat([x[mask] for x, mask in zip(seen, masks)]).double()


def leading(x: Tensor, rank: int) -> Tensor:
    rows = torch.linalg.svd(x, full_matrices=False)[2][:rank]
    return rows.T @ rows


def projector_of(rows: Tensor) -> Tensor:
    return rows.double().T @ rows.double()


def config(projection: str = "activation", r: int = 8, **more: Any) -> pica.PicaConfig:
    return pica.PicaConfig(**{"r": r, "projection": projection, "target_modules": TARGETS, **more})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., nn.Module]) -> BasisFile:
    return make_basis(tiny_llama(), tmp_path_factory.mktemp("made") / "basis", config(), data=batches())


@pytest.mark.parametrize("path", ["model.layers.1.self_attn.k_proj", "model.layers.2.mlp.down_proj"])
def test_activation_directions_are_those_of_the_layers_inputs(made, tiny_llama, path):
    model = tiny_llama().eval()
    width = model.get_submodule(path).in_features
    x = inputs_of(model, path, batches())
    torch.testing.assert_close(projector_of(made.rows(path, 8, width)), leading(x, 8), atol=1e-4, rtol=0)
    other = made.rows("model.layers.0.self_attn.q_proj", 8, 64)
    assert width != 64 or (projector_of(other) - leading(x, 8)).abs().max() > 0.05, "another layer's are others"


def test_layers_that_are_given_the_same_share_their_directions(made):
    assert made.about.same_rows == {
        f"model.layers.{i}.self_attn.q_proj": f"model.layers.{i}.self_attn.k_proj" for i in range(3)
    } or made.about.same_rows == {
        f"model.layers.{i}.self_attn.k_proj": f"model.layers.{i}.self_attn.q_proj" for i in range(3)
    }


def test_weighted_directions_are_the_best_for_the_weight_on_these_inputs(tiny_llama, tmp_path):
    made = make_basis(tiny_llama(), tmp_path / "basis", config("weighted"), data=batches())
    model, path = tiny_llama().eval(), "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(path).weight.detach().double()
    y = inputs_of(model, path, batches()) @ weight.T
    kept = leading(y, 8) @ weight
    rows = made.rows(path, 8, weight.shape[1]).double()
    torch.testing.assert_close(kept @ rows.T @ rows, kept, atol=1e-5, rtol=0)


def test_padding_is_left_out(tmp_path: Path):
    model = BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    ).eval()
    mask = torch.tensor([[1] * 10 + [0] * 6, [1] * 16])
    read = [{"input_ids": torch.randint(1, 50, (2, 16)), "attention_mask": mask}]
    path = "encoder.layer.0.output.dense"
    made = make_basis(model, tmp_path / "b", config(target_modules=["output.dense"], r=6), data=read)
    expected = leading(inputs_of(model, path, read), 6)
    torch.testing.assert_close(projector_of(made.rows(path, 6, 40)), expected, atol=1e-4, rtol=0)
    with_padding = leading(inputs_of(model, path, [{**read[0], "attention_mask": torch.ones(2, 16)}]), 6)
    assert (with_padding - expected).abs().max() > 1e-3


def test_in_little_memory_the_data_are_read_again_and_nothing_changes(tiny_llama, tmp_path, made, monkeypatch):
    rounds: list[list[str]] = []
    whole = collecting.rounds_within

    def noted(*args: Any) -> Any:
        rounds[:] = whole(*args)
        return rounds

    monkeypatch.setattr(collecting, "rounds_within", noted)
    little = make_basis(tiny_llama(), tmp_path / "b", config(), data=batches(), memory=100_000)
    assert len(rounds) > 2
    assert little.digest == made.digest


@pytest.mark.parametrize("projection", ["activation", "principal"])
def test_the_model_is_left_as_it_was(tiny_llama, tmp_path, projection):
    model = tiny_llama().train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
    state = torch.random.get_rng_state()
    make_basis(model, tmp_path / "b", config(projection), data=batches(1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == flags
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_basis_of_weights_is_that_of_the_adapter(tiny_llama, tmp_path):
    made = make_basis(tiny_llama(), tmp_path / "b", config("principal"))
    path = "model.layers.1.mlp.down_proj"
    weight = tiny_llama().get_submodule(path).weight.detach().double()
    torch.testing.assert_close(projector_of(made.rows(path, 8, 112)), leading(weight, 8), atol=1e-4, rtol=0)


def test_what_cannot_be_made_is_refused(tiny_llama, tmp_path):
    adapted = pica.PicaConfig(r=2, target_modules=["q_proj"])
    model = tiny_llama()
    with pytest.raises(TargetError, match="is an embedding, whose inputs projection='activation' cannot look at"):
        make_basis(model, tmp_path / "a", config(target_modules=["embed_tokens"]), data=batches(1))
    with pytest.raises(ConfigError, match="texts need the model's tokenizer"):
        make_basis(model, tmp_path / "a", config())
    model.model.layers[0].self_attn.q_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(BasisError, match="what the model gave this layer was not finite"):
        make_basis(model, tmp_path / "a", config(target_modules=["down_proj"]), data=batches(1))
    assert not list(tmp_path.iterdir())
    from peft import get_peft_model

    with pytest.raises(ConfigError, match="The model has adapters"):
        make_basis(get_peft_model(tiny_llama(), adapted), tmp_path / "a", config(), data=batches(1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(OutputError, match="is not empty"):
        make_basis(model, tmp_path / "full", config(), data=batches(1))
