"""Shared bases and matrices against the plain formula; tools/check_vllm.py --plugin native tries them inside vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from pica.adapters.export.lora import export_lora
from pica.adapters.integrations.compact import BASES, SHARED, CompactReader, compact
from pica.adapters.integrations.named import WEIGHTS
from pica.adapters.integrations.vllm_native import SharedSlots, Stack, _check_roles, apply_shared
from pica.errors import ExportError

from ..conftest import adapted


def exported(model: PeftModel, folder: Path) -> dict[str, torch.Tensor]:
    export_lora(model, folder, engine="vllm", check=False)
    return load_file(folder / WEIGHTS)


def test_a_compact_folder_holds_each_matrix_once(tiny_llama: Callable[..., torch.nn.Module], tmp_path: Path) -> None:
    whole = {name: exported(adapted(tiny_llama(), seed=seed), tmp_path / name) for seed, name in enumerate(("a", "b"))}
    for name in whole:
        compact(tmp_path / name, tmp_path / BASES)
    assert len(list((tmp_path / BASES).iterdir())) == 1  # both have the base model's
    reader = CompactReader()
    for name, tensors in whole.items():
        assert not (tmp_path / name / WEIGHTS).exists()
        read = reader.read(tmp_path / name, torch.float32)
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[key], tensors[key].float()) for key in tensors)
        matrices = {id(value) for key, value in read.items() if ".lora_B." in key}
        assert len(matrices) == 4  # of q, v, up and down, in 3 layers each
        assert (tmp_path / name / SHARED).stat().st_size < 0.5 * sum(t.nbytes for t in tensors.values())
    first, second = (reader.read(tmp_path / name, torch.float32) for name in whole)
    assert all(first[key] is second[key] for key in first if ".lora_A." in key)


def test_what_shares_nothing_is_no_compact_folder(tiny_llama: Callable[..., torch.nn.Module], tmp_path: Path) -> None:
    exported(adapted(tiny_llama(), share="none"), tmp_path / "a")
    with pytest.raises(ExportError, match="little to share"):
        compact(tmp_path / "a", tmp_path / BASES)


def test_roles_have_one_matrix_and_all_their_layers() -> None:
    one, other = torch.zeros(2, 2), torch.zeros(2, 2)
    names = [f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_B.weight" for i in range(3)]
    counts = {"model.layers.*.self_attn": {3}}
    _check_roles(dict.fromkeys(names, one), counts)
    for tensors in ({**dict.fromkeys(names, one), names[1]: other}, dict.fromkeys(names[:2], one)):
        with pytest.raises(ValueError, match="same matrix"):
            _check_roles(tensors, counts)


SLOTS, RANK, COLUMNS, SLICES = 4, 3, 10, (6, 5)


def filled() -> tuple[SharedSlots, list[torch.Tensor], dict[int, list[torch.Tensor]]]:
    stacks = [Stack(SLOTS, out, RANK, torch.float64) for out in SLICES]
    shared = SharedSlots(len(SLICES), RANK, COLUMNS, stacks)
    bases = [torch.randn(RANK, COLUMNS, dtype=torch.float64) for _ in SLICES]
    own = {slot: [torch.randn(out, RANK, dtype=torch.float64) for out in SLICES] for slot in (0, 2, 3)}
    for slot, matrices in own.items():
        shared.put(slot, list(bases), list(matrices))
    return shared, bases, own


@pytest.mark.parametrize("lengths", [[1, 1, 1, 1, 1], [20, 0, 30, 9, 1]], ids=["decoding", "prompts"])
def test_the_product_is_each_tokens_own(lengths: list[int]) -> None:
    shared, bases, own = filled()
    of = torch.tensor([0, -1, 3, 2, 0]).repeat_interleave(torch.tensor(lengths))
    inputs, output = torch.randn(len(of), COLUMNS, dtype=torch.float64), torch.randn(len(of), 11, dtype=torch.float64)
    expected = output.clone()
    for token, slot in enumerate(of.tolist()):
        if slot >= 0:
            parts = [m @ (p @ inputs[token]) for m, p in zip(own[slot], bases)]
            expected[token] += torch.cat(parts)
    runs, counts = torch.unique_consecutive(of, return_counts=True)
    ends = counts.cumsum(0).tolist()
    segments = [(end - int(n), end, int(slot)) for slot, n, end in zip(runs, counts, ends) if slot >= 0]
    index = torch.nonzero(of >= 0).flatten()
    apply_shared(output, inputs, shared, SLICES, segments, index, of[index])
    assert torch.allclose(output, expected, atol=1e-12)


def test_slots_cost_their_matrices_only_and_the_basis_is_one() -> None:
    shared, bases, own = filled()
    firsts, seconds = shared.views(SLOTS)
    assert [a.shape for a in firsts] == [(SLOTS, 1, RANK, COLUMNS)] * 2
    assert {a.untyped_storage().data_ptr() for a in firsts} == {shared.basis.untyped_storage().data_ptr()}
    assert all(b is stack.rows for b, stack in zip(seconds, shared.stacks))
    # vLLM's own formula on these views
    x = torch.randn(COLUMNS, dtype=torch.float64)
    for slot, matrices in own.items():
        assert torch.allclose(seconds[1][slot, 0] @ firsts[1][slot, 0] @ x, matrices[1] @ bases[1] @ x)
    shared.put(2, [None, None], [None, None])
    assert not bool(shared.stacks[0].rows[2].any())
    assert bool(shared.stacks[0].rows[3].any())


def test_an_adapter_of_a_smaller_rank_uses_the_first_directions_and_another_basis_is_refused() -> None:
    shared, bases, own = filled()
    shared.put(1, [p[:2] for p in bases], [m[:, :2] for m in own[0]])
    assert torch.equal(shared.stacks[0].rows[1, 0], torch.nn.functional.pad(own[0][0][:, :2], (0, 1)))
    with pytest.raises(ValueError, match="turned otherwise"):
        shared.put(1, [-p for p in bases], list(own[0]))
    small = SharedSlots(1, RANK, COLUMNS, [Stack(SLOTS, 6, RANK, torch.float64)])
    small.put(0, [bases[0][:1]], [own[0][0][:, :1]])
    small.put(1, [bases[0]], [own[0][0]])  # brings the directions that were not known yet
    assert torch.equal(small.basis, bases[0])
