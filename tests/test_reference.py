"""The package does what the paper's method, written out plainly, does."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import pica
from pica.reference import Algorithm1, adapted, column_space

ROLES = {"self_attn.q_proj": 4, "self_attn.v_proj": 4, "mlp.up_proj": 4, "mlp.down_proj": 4}


def make_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).double().eval()


def weights_of(model: torch.nn.Module, role: str) -> list[torch.nn.Parameter]:
    return [p for n, p in model.named_parameters() if n.endswith((f"{role}.weight", f"{role}.base_layer.weight"))]


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def test_the_column_space_is_orthonormal_and_the_best_of_its_rank():
    weight = torch.randn(7, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    space = column_space(weight, 3)
    torch.testing.assert_close(space @ space.T, torch.eye(3).double())
    left = weight - weight @ space.T @ space
    torch.testing.assert_close((left**2).sum(), (torch.linalg.svdvals(weight)[3:] ** 2).sum())  # Eckart and Young


def test_an_adapted_model_has_the_papers_weights(ids: torch.Tensor):
    base = make_base()
    model = get_peft_model(
        copy.deepcopy(base), pica.PicaConfig(r=4, target_modules=list(r.split(".")[1] for r in ROLES))
    )
    matrices = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            g = torch.Generator().manual_seed(len(matrices))
            parameter.data = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
            matrices[name] = parameter.detach()
    assert len(matrices) == len(ROLES)
    for role in ROLES:
        (matrix,) = [m for n, m in matrices.items() if role.split(".")[1] in n]
        originals = weights_of(base, role)
        for weight, new in zip(originals, adapted([w.detach() for w in originals], matrix)):
            weight.data = new
    torch.testing.assert_close(model(ids).logits, base(ids).logits)


def test_training_an_adapter_is_algorithm_1_step_for_step(ids: torch.Tensor):
    """Adam on the shared matrices, and projected Adam on whole copies of the weights, keep giving the same model."""
    full = make_base()
    model = get_peft_model(
        copy.deepcopy(full), pica.PicaConfig(r=4, target_modules=list(r.split(".")[1] for r in ROLES))
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.Adam(trained, lr=0.01)
    roles = {role: [w.detach() for w in weights_of(full, role)] for role in ROLES}  # the parameters' own memory
    papers = {role: Algorithm1(weights, r=4, lr=0.01) for role, weights in roles.items()}
    losses = []
    for _ in range(5):
        loss = model(ids, labels=ids).loss
        adam.zero_grad()
        loss.backward()
        adam.step()
        theirs = full(ids, labels=ids).loss
        full.zero_grad()
        theirs.backward()
        for role, paper in papers.items():
            paper.step([w.grad for w in weights_of(full, role) if w.grad is not None])
        torch.testing.assert_close(loss, theirs, rtol=1e-9, atol=0)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    torch.testing.assert_close(model(ids).logits, full(ids).logits, rtol=1e-7, atol=1e-9)
