"""The method against independent formulas in float64: the layer, Algorithm 1 step for step, merging, the start."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pica import PicaConfig
from pica.tuners.pica.layer import PicaLinear


def top_right_singular(w: Tensor, r: int) -> Tensor:
    """V_r^T (r, in) by LAPACK's SVD, each row with its largest entry positive: written out again on purpose."""
    rows = torch.linalg.svd(w, full_matrices=False)[2][:r]
    decisive = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return rows * decisive.sign()


class TwoLayers(nn.Module):
    def __init__(self, inn: int, out: int, *, bias: bool, conv: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"fc": Conv1D(out, inn) if conv else nn.Linear(inn, out, bias=bias)}) for _ in range(2)
        )
        self.double()

    def forward(self, x: Tensor) -> list[Tensor]:
        return [block["fc"](x) for block in self.layers]  # pyright: ignore[reportIndexIssue, reportCallIssue]


@pytest.mark.parametrize(
    ("conv", "bias"),
    [(False, 0.0), (False, 0.3), (False, 100.0), (True, 0.3), (True, 100.0)],
    ids=["Linear, no bias", "Linear", "Linear, large bias", "Conv1D", "Conv1D, large bias"],
)
@pytest.mark.parametrize(("inn", "out"), [(12, 12), (10, 24), (24, 10)], ids=["square", "tall", "wide"])
def test_forward_and_gradients_equal_the_plain_formula(inn, out, conv, bias):
    g = torch.Generator().manual_seed(0)
    base = TwoLayers(inn, out, bias=bool(bias), conv=conv)
    for block in base.layers:
        layer = block["fc"]  # pyright: ignore[reportIndexIssue]
        layer.weight.data = torch.randn(layer.weight.shape, generator=g, dtype=torch.float64)
        if bias:
            layer.bias.data = bias * torch.randn(out, generator=g, dtype=torch.float64)
    weights = [(b["fc"].weight.T if conv else b["fc"].weight).detach().clone() for b in base.layers]  # pyright: ignore
    biases = [b["fc"].bias.detach().clone() if bias else torch.zeros(out).double() for b in base.layers]  # pyright: ignore
    model = get_peft_model(base, PicaConfig(r=4, target_modules=["fc"]))
    (matrix,) = [p for p in model.parameters() if p.requires_grad]
    assert matrix.shape == (out, 4)
    assert matrix.dtype == torch.float64
    matrix.data = torch.randn(out, 4, generator=g, dtype=torch.float64)
    x = torch.randn(3, 5, inn, generator=g, dtype=torch.float64, requires_grad=True)
    probe = [torch.randn(3, 5, out, generator=g, dtype=torch.float64) for _ in range(2)]

    outputs = model(x)
    torch.stack([(y * p).sum() for y, p in zip(outputs, probe)]).sum().backward()

    m_ref = matrix.detach().clone().requires_grad_()
    x_ref = x.detach().clone().requires_grad_()
    expected = [x_ref @ (w + m_ref @ top_right_singular(w, 4)).T + b for w, b in zip(weights, biases)]
    torch.stack([(y * p).sum() for y, p in zip(expected, probe)]).sum().backward()
    for got, want in [*zip(outputs, expected), (x.grad, x_ref.grad), (matrix.grad, m_ref.grad)]:
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert m_ref.grad is not None
    assert m_ref.grad.abs().max() > 1e-3  # and not because everything is zero


def test_the_input_side_is_read_where_a_large_bias_would_drown_the_output():
    sides = {}
    for scale in (0.5, 100.0):
        layer = nn.Linear(24, 10)
        nn.init.constant_(layer.bias, scale)
        model = get_peft_model(nn.ModuleDict({"fc": layer}), PicaConfig(r=2, target_modules=["fc"]))
        (wrapped,) = [m for m in model.modules() if isinstance(m, PicaLinear)]
        projector = wrapped.bases.rows("principal")
        assert projector is not None
        sides[scale] = projector.shape[1]
    assert sides == {0.5: 10, 100.0: 24}


def algorithm_1(model: nn.Module, names: dict[str, list[str]], batches: list[Tensor], rank: int, lr: float) -> None:
    """The paper's Algorithm 1 on full weights: Adam on projected gradients, one pair of moments a group.

    Written from the paper alone: no adapter, no autograd on M; it edits the weights of `model` in place.
    """
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    weights = dict(model.named_parameters())
    bases = {n: top_right_singular(weights[n].detach(), rank) for group in names.values() for n in group}
    moments = {f: [torch.tensor(0.0), torch.tensor(0.0)] for f in names}
    for t, batch in enumerate(batches, start=1):
        loss = model(input_ids=batch, labels=batch).loss
        grads = torch.autograd.grad(loss, [weights[n] for n in bases])
        gradient = dict(zip(bases, grads))
        for f, group in names.items():
            total = torch.stack([gradient[n] @ bases[n].T for n in group]).sum(0)  # (out, in) (in, r) -> (out, r)
            moments[f][0] = beta1 * moments[f][0] + (1 - beta1) * total
            moments[f][1] = beta2 * moments[f][1] + (1 - beta2) * total**2
            step = (moments[f][0] / (1 - beta1**t)) / ((moments[f][1] / (1 - beta2**t)).sqrt() + eps)
            for n in group:
                weights[n].data -= lr * step @ bases[n]


def test_training_the_adapter_is_algorithm_1_step_for_step(tiny_llama):
    rank, lr, targets = 6, 1e-2, ["q_proj", "k_proj", "up_proj", "down_proj"]
    g = torch.Generator().manual_seed(0)
    batches = [torch.randint(3, 96, (2, 12), generator=g) for _ in range(5)]
    plain = tiny_llama(dtype=torch.float64)
    start = {n: p.detach().clone() for n, p in plain.named_parameters()}
    adapted = get_peft_model(copy.deepcopy(plain), PicaConfig(r=rank, target_modules=targets))
    groups = {t: [n for n in start if n.endswith(f"{t}.weight")] for t in targets}

    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=lr)
    for batch in batches:
        adapted(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    algorithm_1(plain, groups, batches, rank, lr)

    merged = dict(adapted.merge_and_unload().named_parameters())
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(merged[name], weight, atol=1e-8, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
        moved = (weight - start[name]).abs().max()
        assert (moved > 1e-3) == any(t in name for t in targets)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_new_adapter_leaves_the_outputs_bit_identical(tiny_llama, dtype):
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    base = tiny_llama(dtype=dtype)
    with torch.no_grad():
        before = base(ids).logits
        model = get_peft_model(base, PicaConfig(r=8, target_modules="all-linear"))
        assert torch.equal(model(ids).logits, before)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
        assert not torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 0.35)], ids=str
)
@pytest.mark.parametrize("projection", ["principal", "minor", "random"])
def test_merged_equals_unmerged_and_unmerging_is_exact(tiny_llama, dtype, atol, projection):
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    model = get_peft_model(tiny_llama(dtype=dtype), PicaConfig(r=8, projection=projection, init_weights=False))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data *= 0.3
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        apart = model(ids).logits
        with model.disable_adapter():
            base = model(ids).logits
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(model(ids).logits, apart, atol=atol, rtol=0)
        assert (apart - base).abs().max() > 2 * atol  # the adapter does something that merging could lose
        model.unmerge_adapter()
        assert torch.equal(model(ids).logits, apart)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
