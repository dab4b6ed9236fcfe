"""Several conversations in one row, none of which sees another: positions start again, and attention does not cross.

The rows of a batch are joined into one, so that no padding is computed, and attention is worked out sequence by sequence, so
that a long row costs no more than its sequences do. Where a model's attention cannot be worked out so (eager, for one), the
rows of a batch stay apart, and a mask keeps their sequences from each other.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import datasets
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from pica.errors import ConfigError
from pica.experiments.batches import padded
from pica.experiments.chat.rendering import Rows
from pica.experiments.encoding import IGNORED

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]
BY_SEQUENCE = "sdpa_by_sequence"
"""What transformers knows `attention_by_sequence` as."""


def as_dataset(rows: Rows) -> datasets.Dataset:
    """Columns `input_ids` and `labels`."""
    return datasets.Dataset.from_dict({"input_ids": rows.input_ids, "labels": rows.labels})


def packed(dataset: datasets.Dataset, max_length: int) -> datasets.Dataset:
    """Rows of up to `max_length` tokens, each of whole sequences (best fit first), with their lengths as `seq_lengths`."""
    return pack_dataset(dataset, seq_length=max_length, strategy="bfd")


def packing_collator(model: Any, padding: int) -> Collate:
    """Choose how packed rows become a batch of this model: joined into one where that is quick, else apart.

    Args:
        model: Causal language model, with or without an adapter. Its sdpa attention is exchanged for the same by sequence.
        padding: Id that shorter rows are filled up with where rows stay apart.
    Returns:
        From rows of `packed` to a batch in which no sequence sees another.
    Raises:
        ConfigError: They do: recurrent models and attention of their own do not heed positions.
    """
    rows, alone = _probe(model)
    before = model.config._attn_implementation
    if before == "sdpa":
        AttentionInterface.register(BY_SEQUENCE, attention_by_sequence)
        AttentionMaskInterface.register(BY_SEQUENCE, sdpa_mask)
        model.set_attn_implementation(BY_SEQUENCE)
    if model.config._attn_implementation == BY_SEQUENCE or "flash" in str(before):
        joined = DataCollatorForLanguageModeling(pad_token_id=padding, padding_free=True)
        if _same(model, joined(rows), alone):
            return joined
        model.set_attn_implementation(before)
    apart = PackedCollator(padding)
    if not _same(model, apart(rows), alone):
        raise ConfigError(
            "trainer.packing: in this model packed sequences see each other (it does not heed where positions start again), "
            "so training would be wrong. Leave packing out, or set model.attention to sdpa or eager."
        )
    return apart


class PackedCollator:
    """Rows of packed sequences as one batch. Positions tell transformers where a sequence begins, so no mask is given."""

    def __init__(self, padding: int) -> None:
        """`padding` is the id that shorter rows are filled up with."""
        self.padding = padding

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` and `position_ids`, each (rows, longest row)."""
        lengths = [row.get("seq_lengths") or [len(row["input_ids"])] for row in rows]
        positions = [[position for length in each for position in range(length)] for each in lengths]
        return {
            "input_ids": padded([row["input_ids"] for row in rows], self.padding),
            "labels": padded([row["labels"] for row in rows], IGNORED),
            "position_ids": padded(positions, 0),  # each token of padding is a sequence of its own
        }


def attention_by_sequence(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa attention, of one joined row sequence by sequence.

    The mask is the one that transformers makes of the positions, windows and all; of it only the blocks of single sequences
    are computed, as all else is masked. Without `cu_seq_lens_q`, as outside of training, this is sdpa itself.

    Args:
        module: The attention layer.
        query: (1, heads, tokens, width) of a joined row, else (batch, heads, tokens, width).
        key: The same, with as many heads or a divisor of it.
        value: As `key`.
        attention_mask: True where a query sees a key, (1, 1, tokens, tokens); None where each sees all before it.
        args: As sdpa's.
        kwargs: As sdpa's. `cu_seq_lens_q`, int32 (sequences + 1), says where the sequences begin and end.
    Returns:
        (1, tokens, heads, width), and None.
    """
    starts = kwargs.get("cu_seq_lens_q")
    whole = len(query) == 1 and query.shape[2] == key.shape[2] and kwargs.get("position_bias") is None
    if starts is None or not whole:
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
    outputs = []
    for begin, end in pairwise(starts.tolist()):
        part = slice(begin, end)
        mask = None if attention_mask is None else attention_mask[..., part, part]
        outputs.append(
            sdpa_attention_forward(
                module, query[:, :, part], key[:, :, part], value[:, :, part], mask, *args, **kwargs
            )[0]
        )
    return torch.cat(outputs, dim=1), None


def _probe(model: Any) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Two packed rows of the same length, and the logits of their sequences one by one, (tokens, vocabulary)."""
    top = min(int(model.get_input_embeddings().weight.shape[0]), 1000)
    sequences = [[(7 * n + start) % top for n in range(length)] for start, length in ((1, 5), (3, 4), (2, 3), (5, 6))]
    alone = torch.cat([_logits(model, {"input_ids": torch.tensor([ids])}) for ids in sequences])
    rows = [
        {"input_ids": one + other, "labels": one + other, "seq_lengths": [len(one), len(other)]}
        for one, other in (sequences[:2], sequences[2:])
    ]
    return rows, alone


def _same(model: Any, batch: dict[str, Any], alone: torch.Tensor) -> bool:
    """Whether a batch's logits are those of its sequences alone, but for rounding."""
    try:
        together = _logits(model, {name: value for name, value in batch.items() if name != "labels"})
    except TypeError:  # a model without positions, or that takes nothing it does not know
        return False
    return float((together - alone).abs().max()) <= 0.05 * max(float(alone.abs().max()), 1e-6)


@torch.no_grad()
def _logits(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """float32 (tokens, vocabulary), row after row."""
    was_training = model.training
    model.eval()
    try:
        moved = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
        return model(**moved, use_cache=False).logits.flatten(0, 1).float()
    finally:
        model.train(was_training)
