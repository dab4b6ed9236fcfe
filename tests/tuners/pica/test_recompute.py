"""Adapted experts are made again in the backward pass: same numbers, less memory, and nothing stale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from pica import PicaConfig
from pica.experiments.plan.tracing import Allocations
from pica.tuners.pica import experts
from tests.families import inputs_of, make

# torch 2.6 and 2.7 cannot tell which hooks are active, so that made tensors are kept there as any other
remakes = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),  # pyright: ignore[reportAttributeAccessIssue]
    reason="not in torch 2.6 and 2.7",
)

STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def adapter(**settings: Any) -> PicaConfig:
    defaults = {"r": 3, "target_modules": ["q_proj"], "target_parameters": STACKS, "init_weights": False}
    return PicaConfig(**defaults | settings)


def adapted(name: str, implementation: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    base = make(name).to(dtype)
    base.set_experts_implementation(implementation)
    torch.manual_seed(0)
    return get_peft_model(base, adapter(**settings)).train()


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> list[Tensor]:
    for parameter in model.parameters():
        parameter.grad = None
    loss().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def keep_everything(patch: pytest.MonkeyPatch) -> None:
    """Autograd's own way: W + M P lives until the backward pass."""
    patch.setattr(experts, "can_be_recomputed", lambda _: False)


def assert_same_bits_as_kept(model: Any, loss: Callable[[], Tensor]) -> None:
    recomputed = gradients(model, loss)
    with pytest.MonkeyPatch.context() as patch:
        keep_everything(patch)
        kept = gradients(model, loss)
    assert len(kept) == len(recomputed) > 0
    for first, second in zip(kept, recomputed, strict=True):
        assert first.abs().max() > 0
        assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        ("eager", torch.float64),
        ("eager", torch.bfloat16),
        ("batched_mm", torch.float64),
        ("grouped_mm", torch.float32),
        ("grouped_mm", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM"])
def test_gradients_have_the_bits_of_those_with_kept_weights(name: str, implementation: str, dtype: torch.dtype):
    model = adapted(name, implementation, dtype)
    assert_same_bits_as_kept(model, lambda: model(**inputs_of(name, model)).logits.float().square().sum())


@pytest.mark.parametrize("settings", [{"share": "none"}, {"target_modules": [], "target_parameters": STACKS[1:]}])
def test_bits_are_the_same_however_matrices_are_shared(settings: dict[str, Any]):
    name = "GptOssForCausalLM"
    model = adapted(name, "eager", **settings)
    assert_same_bits_as_kept(model, lambda: model(**inputs_of(name, model)).logits.square().sum())


def test_bits_are_the_same_with_two_adapters_at_once():
    name = "Qwen3MoeForCausalLM"
    model = adapted(name, "grouped_mm")
    model.add_adapter("b", adapter(r=2))
    model.base_model.set_adapter(["default", "b"])
    assert_same_bits_as_kept(model, lambda: model(**inputs_of(name, model)).logits.square().sum())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_bits_are_the_same_under_autocast(implementation: str):
    name = "Qwen3MoeForCausalLM"
    model = adapted(name, implementation)

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(**inputs_of(name, model)).logits.float().square().sum()

    assert_same_bits_as_kept(model, loss)


def test_experts_that_are_not_trained_are_made_again_for_the_layers_before_them():
    name = "MixtralForCausalLM"
    model = adapted(name, "eager")
    for path, parameter in model.named_parameters():
        if "gate_up_proj" in path or "down_proj" in path:
            parameter.requires_grad_(False)
    assert_same_bits_as_kept(model, lambda: model(**inputs_of(name, model)).logits.square().sum())


# ---- memory --------------------------------------------------------------------------------------------------------

SIDE, WIDTH, EXPERTS = 32, 96, 4
BLOCK = 4 * EXPERTS * 3 * SIDE * WIDTH  # bytes of a block's experts in float32


def mixture(blocks: int, implementation: str, reentrant: bool | None = None) -> Any:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=16,
        hidden_size=SIDE,
        intermediate_size=WIDTH,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    base = MixtralForCausalLM(config)
    base.set_experts_implementation(implementation)
    model: Any = get_peft_model(base, adapter()).train()
    if reentrant is not None:
        model.enable_input_require_grads()
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def loss_of(model: Any) -> Tensor:
    return model(input_ids=torch.arange(8).view(1, 8)).logits.square().sum()


def step_bytes(model: Any, *, keep: bool = False) -> tuple[int, int, int]:
    """Bytes that live after the forward pass, at most, and after the backward pass."""
    with pytest.MonkeyPatch.context() as patch:
        if keep:
            keep_everything(patch)
        gradients(model, lambda: loss_of(model))
        with Allocations({p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}) as counted:
            for parameter in model.parameters():
                parameter.grad = None
            loss = loss_of(model)
            forward = counted.live
            loss.backward()
            del loss
            return forward, counted.peak, counted.live


@remakes
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_no_block_keeps_its_adapted_experts(implementation: str):
    one, three = (mixture(blocks, implementation) for blocks in (1, 3))
    (forward, peak, left), kept = step_bytes(three), step_bytes(three, keep=True)
    assert kept[0] - forward == 3 * BLOCK
    assert left == kept[2]
    _, peak_of_one, _ = step_bytes(one)
    assert peak - peak_of_one < 0.7 * BLOCK  # of activations; neither copies nor their gradients add up
    assert kept[1] - peak_of_one > 2 * BLOCK


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_as_little_as_without_and_gives_the_same_bits(
    reentrant: bool, implementation: str
):
    model = mixture(3, implementation, reentrant)
    assert_same_bits_as_kept(model, lambda: loss_of(model))
    recomputed, kept = step_bytes(model), step_bytes(model, keep=True)
    assert recomputed[0] == kept[0]
    assert recomputed[1] < kept[1] + 0.05 * BLOCK  # beside each other: two copies of the directions
    plain = mixture(3, implementation)
    for first, second in zip(
        gradients(model, lambda: loss_of(model)), gradients(plain, lambda: loss_of(plain)), strict=True
    ):
        torch.testing.assert_close(first, second)


def test_a_graph_that_is_kept_does_not_keep_what_was_made_again():
    model = mixture(2, "eager")
    gradients(model, lambda: loss_of(model))
    with Allocations({p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}) as counted:
        loss = loss_of(model)
        before = counted.live
        trained = [p for p in model.parameters() if p.requires_grad]
        first = torch.autograd.grad(loss, trained, retain_graph=True)
        assert counted.live - before == sum(g.untyped_storage().nbytes() for g in first)
        second = torch.autograd.grad(loss, trained)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


@remakes
def test_hooks_around_the_model_get_all_but_the_adapted_experts():
    model = mixture(2, "eager")

    def seen(*, keep: bool) -> list[int]:
        sizes: list[int] = []

        def pack(tensor: Tensor) -> tuple[Tensor]:
            sizes.append(tensor.untyped_storage().nbytes())
            return (tensor.detach(),)

        with pytest.MonkeyPatch.context() as patch:
            if keep:
                keep_everything(patch)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0]):
                loss = loss_of(model)
            loss.backward()
        return sorted(sizes)

    recomputed, kept = seen(keep=False), seen(keep=True)
    stacks = {BLOCK // 3, BLOCK // 3 * 2}
    assert [size for size in kept if size not in stacks] == [size for size in recomputed if size not in stacks]
    assert len(kept) - len(recomputed) >= 2 * 2 * 2  # two stacks, two blocks, at least two experts


# ---- what was written to meanwhile ---------------------------------------------------------------------------------


@remakes
def test_an_optimizer_step_before_the_backward_pass_is_refused():
    model = mixture(1, "eager")
    loss = loss_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    with pytest.raises(RuntimeError, match=r"layers.0.mlp.experts.\w+_proj were modified in place between the forward"):
        loss.backward()


def test_second_derivatives_are_those_with_kept_weights():
    model = mixture(1, "eager").double()
    model.set_attn_implementation("eager")  # the CPU's fused kernel has none

    def loss() -> Tensor:
        trained = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss_of(model), trained, create_graph=True)
        return torch.stack([g.square().sum() for g in found]).sum()

    assert_same_bits_as_kept(model, loss)


# ---- where it does not apply -----------------------------------------------------------------------------------------


def test_gradients_are_the_same_where_hooks_are_forbidden():
    """As within torch.func: what a forward pass keeps cannot be replaced there."""
    model = mixture(1, "eager")
    wanted = gradients(model, lambda: loss_of(model))
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
        found = gradients(model, lambda: loss_of(model))
    assert len(found) == len(wanted) > 0
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


@remakes
def test_adapted_experts_compile_in_one_piece():
    model = mixture(1, "batched_mm")
    model.set_attn_implementation("eager")
    wanted = gradients(model, lambda: loss_of(model))
    found = gradients(model, lambda: loss_of(torch.compile(model, fullgraph=True, backend="eager")))
    assert len(found) == len(wanted) > 0
    for first, second in zip(found, wanted, strict=True):
        torch.testing.assert_close(first, second)
