"""PiCa on a diffusers UNet: through diffusers' own `add_adapter` and through PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import Tensor, nn

import pica
from pica import PicaConfig

diffusers = pytest.importorskip("diffusers")

CONFIG = PicaConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_weights=False)


@pytest.fixture
def unet():
    """Factory of UNets with two widths of attention, so that a role alone does not make a group."""

    def make():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return diffusers.UNet2DConditionModel(
                block_out_channels=(16, 32),
                layers_per_block=1,
                sample_size=16,
                down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=24,
                norm_num_groups=8,
            ).eval()

    return make


def sample(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise, text = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 7, 24, generator=generator)
    with torch.no_grad():
        return model(noise, torch.tensor([1, 5]), text).sample


def test_adapters_of_diffusers(unet):
    model = unet()
    base = sample(model)
    model.add_adapter(CONFIG, adapter_name="a")
    of_a = sample(model)
    assert not torch.allclose(of_a, base, atol=1e-3)
    model.add_adapter(PicaConfig(r=8, target_modules=["to_q"], init_weights=False), adapter_name="b")
    model.set_adapter("b")
    assert not torch.allclose(sample(model), of_a, atol=1e-3)
    model.set_adapter("a")
    assert torch.equal(sample(model), of_a)
    model.disable_adapters()
    assert torch.equal(sample(model), base)
    model.enable_adapters()
    model.fuse_lora(adapter_names=["a"])
    torch.testing.assert_close(sample(model), of_a, atol=1e-4, rtol=1e-4)
    model.unfuse_lora()
    assert torch.equal(sample(model), of_a)
    model.delete_adapters("b")
    assert torch.equal(sample(model), of_a)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_state_goes_from_one_model_to_another(unet, low_cpu_mem_usage):
    model = unet()
    model.add_adapter(CONFIG, adapter_name="a")
    state = get_peft_model_state_dict(model, adapter_name="a")
    other = unet()
    inject_adapter_in_model(CONFIG, other, adapter_name="a", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not torch.equal(sample(unet()), sample(model))
    result = set_peft_model_state_dict(other, state, adapter_name="a", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.unexpected_keys
    assert torch.equal(sample(other), sample(model))


def test_a_peft_model_of_a_unet_trains_and_reloads(unet, tmp_path):
    model = get_peft_model(unet(), CONFIG)
    model(torch.randn(1, 4, 16, 16), torch.tensor([1]), torch.randn(1, 7, 24)).sample.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(str(tmp_path))
    assert torch.equal(sample(PeftModel.from_pretrained(unet(), tmp_path)), sample(model))


def test_layers_of_one_role_and_two_widths_are_two_groups(unet):
    rows = pica.coverage(get_peft_model(unet(), CONFIG)).rows
    of_down_q = [row for row in rows if row.group.startswith("down_blocks-N") and "attn1-to_q" in row.group]
    assert sorted({shape[0] for row in of_down_q for shape in row.shapes}) == [16, 32]
    assert all(len({shape[0] for shape in row.shapes}) == 1 for row in rows)


def test_an_adapter_is_not_left_behind_in_the_next_of_its_name(unet):
    model = unet()
    base = sample(model)
    model.add_adapter(CONFIG, adapter_name="a")
    model.unload_lora()
    assert torch.equal(sample(model), base)
    model.add_adapter(PicaConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), adapter_name="a")
    assert torch.equal(sample(model), base)
