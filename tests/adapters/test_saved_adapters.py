"""Adapters that were saved before load with the meaning they had then. The files in `saved/` are never made again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import pica
from pica.tuners.base.layer import SharedLayer

SAVED = Path(__file__).parent / "saved"
FOLDERS = sorted(path.name for path in SAVED.iterdir() if path.is_dir())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10, bias=False), nn.Linear(10, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.load_state_dict(load_file(SAVED / "base.safetensors"))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


def test_there_is_something_to_load():
    assert len(FOLDERS) == 6


@pytest.mark.parametrize("name", FOLDERS)
def test_an_adapter_that_was_saved_long_ago_means_the_same(name: str):
    updates = load_file(SAVED / "updates.safetensors")
    model = PeftModel.from_pretrained(Net(), str(SAVED / name))  # pyright: ignore[reportArgumentType]
    layers = {m.path: m for m in model.modules() if isinstance(m, SharedLayer)}
    assert {f"{name}:{path}" for path in layers} == {key for key in updates if key.startswith(f"{name}:")}
    for path, layer in layers.items():
        torch.testing.assert_close(layer.get_delta_weight("default"), updates[f"{name}:{path}"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FOLDERS)
def test_and_goes_through_a_save_of_today_unchanged(name: str, tmp_path: Path):
    model = PeftModel.from_pretrained(Net(), str(SAVED / name))  # pyright: ignore[reportArgumentType]
    pica.save_adapter(model, tmp_path / "again")
    before, after = (
        load_file(SAVED / name / "adapter_model.safetensors"),
        load_file(tmp_path / "again" / "adapter_model.safetensors"),
    )
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
