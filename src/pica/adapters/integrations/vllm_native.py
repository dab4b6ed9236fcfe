"""P once and M once an adapter inside vLLM, on a CPU: what its LoRA layers hold, and how they compute with it.

A LoRA layer of vLLM keeps A (slots, 1, R, in) and B (slots, 1, out, R) for itself. Here A is one basis (R, in) seen `slots`
times, by a stride of 0, and B is one stack for all layers of a role. So an adapter costs its matrices and no more, and the
product with A is one for the whole batch. vLLM has no interface for this: its classes are changed, for the versions that
were tried only.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pica.adapters.integrations.compact import SHARED, CompactReader

VERSIONS = ("0.32.",)
_LONG = 8  # tokens in a row of one adapter from which on a product of their own is the quicker one
_PREFIX, _B = "base_model.model.", ".lora_B.weight"
_DIGITS = re.compile(r"(?<=\.)\d+(?=\.)")


def obstacle() -> str:
    """Why this vLLM cannot do it; empty where it can."""
    from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]
    from vllm.version import __version__  # pyright: ignore[reportMissingImports]

    if not __version__.startswith(VERSIONS):
        return f"it is tried with vLLM {' and '.join(f'{v}*' for v in VERSIONS)} only, and this is {__version__}"
    if not current_platform.is_cpu():
        return "vLLM's GPU kernels refuse a shared A (docs/vllm-shared-basis.md)"
    return ""


class Stack:
    """B of all layers of a role, one row a slot: (slots, 1, out, R)."""

    def __init__(self, slots: int, out: int, rank: int, dtype: torch.dtype) -> None:
        self.rows = torch.zeros(slots, 1, out, rank, dtype=dtype)
        self._held: list[Tensor | None] = [None] * slots

    def put(self, slot: int, matrix: Tensor | None) -> None:
        """Fill a row. All layers of the role do so with the same tensor, which is copied for the first of them."""
        if matrix is not None and self._held[slot] is matrix:
            return
        self.rows[slot] = 0
        if matrix is not None:
            self.rows[slot, 0, :, : matrix.shape[1]] = matrix
        self._held[slot] = matrix


class SharedSlots:
    """What one LoRA layer holds in place of matrices of its own.

    Attributes:
        basis: P of its slices, one below the other: (slices * R, in).
        stacks: B of each slice, shared by all layers of the role.
    """

    def __init__(self, slices: int, rank: int, columns: int, stacks: list[Stack]) -> None:
        self.rank, self.stacks = rank, stacks
        dtype = stacks[0].rows.dtype
        self.basis = torch.zeros(slices * rank, columns, dtype=dtype)
        self._rows = [0] * slices  # of P that are known

    def views(self, slots: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A and B as vLLM's layer names them."""
        parts = self.basis.split(self.rank)
        return tuple(part.expand(slots, 1, *part.shape) for part in parts), tuple(s.rows for s in self.stacks)

    def put(self, slot: int, firsts: list[Tensor | None], seconds: list[Tensor | None]) -> None:
        """Take an adapter's matrices into a slot.

        Raises:
            ValueError: its basis is not the one that is here.
        """
        for part, (a, b) in enumerate(zip(firsts, seconds)):
            if a is None or b is None or not bool(b.any()):
                self.stacks[part].put(slot, None)
                continue
            here = self.basis[part * self.rank : (part + 1) * self.rank]
            known = min(self._rows[part], a.shape[0])
            if not torch.equal(here[:known], a[:known]):
                raise ValueError(
                    "its basis is turned otherwise than that of the adapters that are served, so it cannot share theirs; "
                    "start the server without PICA_VLLM_NATIVE."
                )
            if a.shape[0] > known:
                here[: a.shape[0]] = a
                self._rows[part] = a.shape[0]
            self.stacks[part].put(slot, b)


def apply_shared(
    output: Tensor,
    inputs: Tensor,
    shared: SharedSlots,
    slices: tuple[int, ...],
    segments: list[tuple[int, int, int]],
    index: Tensor,
    chosen: Tensor,
) -> None:
    """Add each token's update.

    Args:
        output: (tokens, out), changed in place.
        inputs: (tokens, in).
        shared: The layer's basis and stacks.
        slices: Rows of the output that each slice has.
        segments: (first token, one after the last, slot) of every run of tokens with an adapter.
        index: The tokens with an adapter.
        chosen: The slot of each of them.
    """
    coordinates = inputs @ shared.basis.t()  # (tokens, slices * R): one product, whoever's tokens these are
    offset = 0
    for part, width in enumerate(slices):
        h = coordinates[:, part * shared.rank : (part + 1) * shared.rank]
        stack = shared.stacks[part].rows[:, 0]
        if len(segments) * _LONG <= len(index):
            for begin, end, slot in segments:
                output[begin:end, offset : offset + width].addmm_(h[begin:end], stack[slot].t())
        else:
            update = torch.bmm(stack[chosen], h[index].unsqueeze(2)).squeeze(2)
            output[:, offset : offset + width].index_add_(0, index, update)
        offset += width


def install() -> None:
    """Change vLLM's classes. Once a process."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA  # pyright: ignore[reportMissingImports]
    from vllm.lora.layers.column_parallel_linear import (  # pyright: ignore[reportMissingImports]
        MergedColumnParallelLinearWithLoRA,
    )
    from vllm.lora.lora_model import LoRAModel  # pyright: ignore[reportMissingImports]
    from vllm.lora.model_manager import LoRAModelManager  # pyright: ignore[reportMissingImports]
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU  # pyright: ignore[reportMissingImports]

    for layer_class in (BaseLinearLayerWithLoRA, MergedColumnParallelLinearWithLoRA):
        _change_layer(layer_class)
    _change_manager(LoRAModelManager)
    _change_loader(LoRAModel)
    _change_product(PunicaWrapperCPU)


def _change_layer(layer_class: Any) -> None:
    create, reset, put = layer_class.create_lora_weights, layer_class.reset_lora, layer_class.set_lora
    apply = layer_class._apply_lora_to_output

    def create_lora_weights(self: Any, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        if self.tp_size > 1:
            raise ValueError("PICA_VLLM_NATIVE does not work with tensor parallelism; start the server without it.")
        create(self, 1, lora_config, model_config)  # for the shapes; the real ones come with the layer's name

    def reset_lora(self: Any, index: int) -> None:
        if hasattr(self, "pica_shared"):
            none = [None] * self.n_slices
            self.pica_shared.put(index, none, none)
        else:
            reset(self, index)

    def set_lora(self: Any, index: int, lora_a: Any, lora_b: Any) -> None:
        if not hasattr(self, "pica_shared"):
            put(self, index, lora_a, lora_b)
            return
        firsts, seconds = (list(m) if isinstance(m, (list, tuple)) else [m] for m in (lora_a, lora_b))
        if len(firsts) != self.n_slices:
            firsts, seconds = self.expand_packed_lora(firsts, seconds)
        self.pica_shared.put(index, firsts, seconds)

    def _apply_lora_to_output(self: Any, x: Tensor, output: Tensor) -> Tensor:
        if not hasattr(self, "pica_shared"):
            return apply(self, x, output)
        found = self.punica_wrapper.pica_batch
        if found is not None:
            flat = output.view(-1, output.shape[-1])
            apply_shared(flat, x.reshape(-1, x.shape[-1]), self.pica_shared, self.output_slices, *found)
        return output

    layer_class.create_lora_weights, layer_class.reset_lora = create_lora_weights, reset_lora
    layer_class.set_lora, layer_class._apply_lora_to_output = set_lora, _apply_lora_to_output


def _change_manager(manager_class: Any) -> None:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA  # pyright: ignore[reportMissingImports]
    from vllm.lora.lora_model import LoRAModel  # pyright: ignore[reportMissingImports]

    create = manager_class._create_lora_modules

    def _create_lora_modules(self: Any) -> None:
        create(self)
        stacks: dict[tuple[str, int, int], Stack] = {}
        for name, module in self.modules.items():
            if not isinstance(module, BaseLinearLayerWithLoRA):
                continue
            rank, columns = module.lora_a_stacked[0].shape[-2:]
            role, own = _DIGITS.sub("*", name), []
            for part, b in enumerate(module.lora_b_stacked):
                key = (role, part, b.shape[-2])
                own.append(stacks.setdefault(key, Stack(self.lora_slots, b.shape[-2], rank, b.dtype)))
            module.pica_shared = SharedSlots(len(own), rank, columns, own)
            module.lora_a_stacked, module.lora_b_stacked = module.pica_shared.views(self.lora_slots)
        roles = Counter(_DIGITS.sub("*", name) for name in self.modules)
        counts: dict[str, set[int]] = {}
        for role, count in roles.items():
            counts.setdefault(role.rpartition(".")[0], set()).add(count)
        LoRAModel.pica_counts = counts

    manager_class._create_lora_modules = _create_lora_modules


def _change_loader(model_class: Any) -> None:
    reader = CompactReader()

    def from_local_checkpoint(
        cls: Any, lora_dir: str, expected_lora_modules: Any, peft_helper: Any, **options: Any
    ) -> Any:
        if not (Path(lora_dir) / SHARED).is_file():
            raise ValueError("With PICA_VLLM_NATIVE vLLM serves adapters of PICA_VLLM_ADAPTERS only.")
        tensors = reader.read(Path(lora_dir), options["dtype"])
        odd = sorted({name.split(".")[-3] for name in tensors} - set(expected_lora_modules))
        if odd:
            raise ValueError(f"vLLM adapts no {', '.join(odd)} of this model.")
        _check_roles(tensors, cls.pica_counts)
        kept = {k: options[k] for k in ("device", "dtype", "model_vocab_size", "weights_mapper", "skip_prefixes")}
        return cls.from_lora_tensors(options["lora_model_id"], tensors, peft_helper, **kept)

    model_class.from_local_checkpoint = classmethod(from_local_checkpoint)


def _check_roles(tensors: dict[str, Tensor], counts: dict[str, set[int]]) -> None:
    """All layers of a role have one B, which their stack holds once.

    Args:
        tensors: An adapter's, by PEFT's names.
        counts: For the path that leads to layers, with `*` for numbers, how many there are of each kind.
    Raises:
        ValueError: they have not, or some layers of a role have none.
    """
    found: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        if name.endswith(_B):
            found.setdefault(_DIGITS.sub("*", name.removeprefix(_PREFIX).removesuffix(_B)), []).append(tensor)
    for role, own in found.items():
        if any(tensor is not own[0] for tensor in own) or len(own) not in counts.get(role.rpartition(".")[0], ()):
            raise ValueError(f"not all layers {role} have the same matrix; start the server without PICA_VLLM_NATIVE.")


def _change_product(wrapper_class: Any) -> None:
    update = wrapper_class.update_metadata

    def update_metadata(self: Any, *arguments: Any, **options: Any) -> None:
        update(self, *arguments, **options)
        slots = self.token_lora_indices
        runs, lengths = torch.unique_consecutive(slots, return_counts=True)
        segments, begin = [], 0
        for slot, length in zip(runs.tolist(), lengths.tolist()):
            if slot >= 0:  # -1 is the base model
                segments.append((begin, begin + length, slot))
            begin += length
        index = torch.nonzero(slots >= 0).flatten()
        self.pica_batch = (segments, index, slots[index]) if segments else None

    wrapper_class.update_metadata = update_metadata
    wrapper_class.pica_batch = None
