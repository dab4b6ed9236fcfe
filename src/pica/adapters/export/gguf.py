"""A LoRA as the GGUF adapter that llama.cpp loads.

llama.cpp's names for tensors come from the `gguf` package. It rotates queries and keys in pairs (2i, 2i + 1) where
Llama's weights in transformers hold them as halves (i, i + d/2), so those rows are permuted in the base model's file, and
the rows of B have to follow them. The rows of A belong to the rank and stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pica.errors import ExportError

# transformers' model type: (llama.cpp's architecture, whether query and key rows are permuted)
ARCHITECTURES: dict[str, tuple[str, bool]] = {
    "llama": ("LLAMA", True),
    "mistral": ("LLAMA", True),
    "qwen2": ("QWEN2", False),
}


def write_gguf_adapter(tensors: Mapping[str, Tensor], config: Any, file: Path, *, alpha: float) -> None:
    """Write LoRA tensors as a GGUF adapter.

    Args:
        tensors: {"<path>.lora_A.weight": (r, in), "<path>.lora_B.weight": (out, r)}; all of one dtype.
        config: The base model's transformers configuration, of a type in `ARCHITECTURES`.
        file: The file to write. bfloat16 becomes float32, which every build of llama.cpp computes with; others stay.
        alpha: LoRA's alpha; llama.cpp scales by alpha / r.
    Raises:
        ExportError: a layer has no name in llama.cpp, or a tensor is no LoRA factor.
    """
    import gguf

    name, permutes = ARCHITECTURES[config.model_type]
    architecture = gguf.MODEL_ARCH[name]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type("adapter")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    for key, tensor in tensors.items():
        path, found, factor = key.removesuffix(".weight").rpartition(".lora_")
        known = names.get_name(f"{path}.weight", try_suffixes=(".weight",)) if found else None
        if known is None:
            raise ExportError(f"{key} has no name in llama.cpp's {name} models, so it cannot be written as GGUF.")
        if factor == "B" and permutes and path.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if path.endswith("q_proj") else config.num_key_value_heads
            tensor = pair_rows(tensor, heads)
        if tensor.dtype == torch.bfloat16:
            tensor = tensor.float()
        writer.add_tensor(f"{known}.lora_{factor.lower()}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def pair_rows(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, (heads * d, n), from halves (i, i + d/2) to pairs (2i, 2i + 1), head by head."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])  # (heads, 2, d/2, n)
    return halves.transpose(1, 2).reshape(rows.shape)
