"""Directions of the first gradient: against autograd's own gradients, and turned alike over the layers that share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import BertConfig, BertModel, Conv1D

import pica
from pica.basis.file import BasisFile
from pica.calibration.gradients import shared_rotations
from pica.calibration.making import make_basis
from pica.calibration.texts import calibration
from pica.errors import BasisError, ConfigError

TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]
READ = [f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")]
WRITES = "model.layers.1.mlp.down_proj"


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(3)
    found = [{"input_ids": torch.randint(96, (2, 24), generator=g)} for _ in range(count)]
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, 16:] = 0
    return [batch | {"attention_mask": mask} for batch in found]


def config(**more: Any) -> pica.PicaConfig:
    return pica.PicaConfig(**{"r": 8, "projection": "gradient", "target_modules": TARGETS, **more})


def gradients(model: nn.Module, read: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Autograd's, of the summed losses; padding has no label."""
    for batch in read:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
    return {name.removesuffix(".weight"): p.grad for name, p in model.named_parameters() if p.grad is not None}


def span(rows: Tensor) -> Tensor:
    return rows.double().T @ rows.double()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., nn.Module]) -> BasisFile:
    return make_basis(tiny_llama(), tmp_path_factory.mktemp("made") / "basis", config(), data=batches())


@pytest.mark.parametrize("path", [*READ, WRITES])
def test_the_directions_are_the_leading_ones_of_the_gradient(made, tiny_llama, path):
    gradient = gradients(tiny_llama(), batches())[path]
    matrix = gradient.T if path in READ else gradient
    rows = made.rows(path, 8, matrix.shape[1])
    wanted = torch.linalg.svd(matrix.double(), full_matrices=False).Vh[:8]
    torch.testing.assert_close(span(rows), span(wanted), atol=1e-4, rtol=0)
    assert (path in made.about.input_side) == (path in READ)


def test_the_layers_that_share_mean_alike_by_them(made, tiny_llama):
    """What the mean over a role's layers keeps of their gradients: no less than in the singular vectors' own order."""
    found = gradients(tiny_llama(), batches())
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]

    def kept(rows_of: Callable[[str], Tensor]) -> float:
        return float(torch.stack([found[path].T @ rows_of(path).T for path in paths]).mean(0).norm())

    turned = kept(lambda path: made.rows(path, 8, 64))
    plain = kept(lambda path: torch.linalg.svd(found[path].T, full_matrices=False).Vh[:8])
    assert turned > 1.05 * plain
    mean = torch.stack([found[path].T @ made.rows(path, 8, 64).T for path in paths]).mean(0)
    lengths = mean.norm(dim=0)
    assert bool((lengths[:-1] >= lengths[1:] - 1e-6).all()), "the first directions hold the most of what is shared"


def test_rotations_find_what_matrices_have_in_common():
    g = torch.Generator().manual_seed(0)
    common = torch.randn(20, 5, generator=g, dtype=torch.float64) * torch.tensor([5.0, 4, 3, 2, 1])
    turns = [torch.linalg.qr(torch.randn(5, 5, generator=g, dtype=torch.float64))[0] for _ in range(4)]
    cores = [common @ turn for turn in turns]
    found = [core @ turn.T for core, turn in zip(cores, shared_rotations(cores))]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
    products = found[0].T @ found[0]
    torch.testing.assert_close(products, torch.diag(products.diag()), atol=1e-8, rtol=0)
    assert bool((products.diag().diff() <= 0).all())


def test_rotations_of_fewer_outputs_than_directions():
    cores = [torch.randn(3, 6, dtype=torch.float64) for _ in range(2)]
    for turn in shared_rotations(cores):
        torch.testing.assert_close(turn @ turn.T, torch.eye(6, dtype=torch.float64))


def test_memory_decides_how_often_the_model_reads_and_nothing_else(made, tiny_llama, tmp_path):
    model, calls = tiny_llama(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    again = make_basis(model, tmp_path / "b", config(), data=batches(), memory=1)
    assert len(calls) >= 12 * 3
    assert again.digest == made.digest


def test_the_model_is_left_as_it_was(tiny_llama, tmp_path):
    model = tiny_llama().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.lm_head.weight.requires_grad_(False)
    make_basis(model, tmp_path / "b", config(), data=batches())
    assert model.training
    assert not model.lm_head.weight.requires_grad
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_own_labels_count_and_enter_the_digest(tiny_llama, tmp_path):
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]] * 2, "labels": [[-100, -100, 7, 8]] * 2})
    read = calibration(rows, tokens=100, labels=True)
    assert read.batches[0]["labels"].tolist() == [[-100, -100, 7, 8]]
    assert read.about["digest"] != calibration(rows, tokens=100).about["digest"]
    own = make_basis(tiny_llama(), tmp_path / "a", config(r=2), data=read)
    tokens = make_basis(tiny_llama(), tmp_path / "b", config(r=2), data=calibration(rows, tokens=100))
    difference = span(own.rows(WRITES, 2, 112)) - span(tokens.rows(WRITES, 2, 112))
    assert difference.abs().max() > 0.01


def test_labels_of_classes_are_one_a_row():
    read = calibration(Dataset.from_dict({"input_ids": [[5, 6], [7]], "labels": [1, 0]}), tokens=100, labels=True)
    assert sorted(batch["labels"].tolist() for batch in read.batches) == [[0], [1]]


def test_without_sharing_each_layer_has_its_own_order(tiny_llama, tmp_path):
    own = make_basis(tiny_llama(), tmp_path / "b", config(share="none"), data=batches())
    core = gradients(tiny_llama(), batches())[WRITES] @ own.rows(WRITES, 8, 112).T
    products = core.T @ core
    torch.testing.assert_close(products, torch.diag(products.diag()), atol=1e-5 * float(products.max()), rtol=0)


def test_a_model_without_a_loss_is_told(tmp_path: Path):
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    body = BertModel(BertConfig(vocab_size=96, **sizes))
    with pytest.raises(ConfigError, match="BertModel gives no loss on this data"):
        make_basis(body, tmp_path / "b", config(target_modules=["query"]), data=batches())


def test_a_layer_that_the_loss_does_not_reach_is_named(tiny_llama, tmp_path):
    model = tiny_llama()
    model.unused = nn.Linear(8, 8)
    with pytest.raises(BasisError, match="unused: the loss does not depend on this layer"):
        make_basis(model, tmp_path / "b", config(target_modules=["q_proj", "unused"]), data=batches())


def test_weights_of_other_layouts_have_gradients_too(tmp_path: Path, tiny_llama):
    """GPT-2's Conv1D keeps its weight as (in, out); a linear layer with the same weight has the same directions."""

    class Model(nn.Module):
        def __init__(self, *, turned: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 5)
            if turned:
                plain = self.second
                self.second: Any = Conv1D(5, 6)
                self.second.weight.data, self.second.bias.data = plain.weight.data.T.clone(), plain.bias.data

        def forward(self, x: Tensor) -> Any:
            return type("Out", (), {"loss": self.second(self.first(x).tanh()).square().sum()})

    read = [{"x": torch.randn(7, 6, generator=torch.Generator().manual_seed(1))}]
    made = [
        make_basis(Model(turned=turned), tmp_path / str(turned), config(r=3, target_modules=["second"]), data=read)
        for turned in (False, True)
    ]
    assert made[0].about.input_side == made[1].about.input_side
    rows = [one.rows("second", 3, 5 if one.about.input_side else 6) for one in made]
    torch.testing.assert_close(rows[0], rows[1])
