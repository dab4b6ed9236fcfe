"""Several conversations in one row, none of which sees another: positions start again, and attention does not cross."""

from typing import Any

import datasets
import torch
from trl import pack_dataset

from pica.errors import ConfigError
from pica.experiments.batches import padded
from pica.experiments.chat.rendering import Rows
from pica.experiments.encoding import IGNORED


def as_dataset(rows: Rows) -> datasets.Dataset:
    """Columns `input_ids` and `labels`."""
    return datasets.Dataset.from_dict({"input_ids": rows.input_ids, "labels": rows.labels})


def packed(dataset: datasets.Dataset, max_length: int) -> datasets.Dataset:
    """Rows of up to `max_length` tokens, each of whole sequences (best fit first), with their lengths as `seq_lengths`."""
    return pack_dataset(dataset, seq_length=max_length, strategy="bfd")


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


@torch.no_grad()
def check_packing(model: Any, padding: int) -> None:
    """Make sure that packed sequences do not see each other in this model.

    Raises:
        ConfigError: They do: recurrent models and attention of their own do not heed positions.
    """
    top = min(int(model.get_input_embeddings().weight.shape[0]), 1000)
    one, other = ([(7 * n + start) % top for n in range(5)] for start in (1, 3))
    collate = PackedCollator(padding)

    def logits(*parts: list[int]) -> torch.Tensor:
        ids = [token for part in parts for token in part]
        batch = collate([{"input_ids": ids, "labels": ids, "seq_lengths": [len(part) for part in parts]}])
        del batch["labels"]
        return (
            model(**{name: value.to(model.device) for name, value in batch.items()}, use_cache=False).logits[0].float()
        )

    was_training = model.training
    model.eval()
    try:
        together, alone = logits(one, other), torch.cat([logits(one), logits(other)])
        apart = float((together - alone).abs().max()) <= 0.05 * max(float(alone.abs().max()), 1e-6)
    except TypeError:  # a model without positions
        apart = False
    finally:
        model.train(was_training)
    if not apart:
        raise ConfigError(
            "trainer.packing: in this model packed sequences see each other (it does not heed where positions start again), "
            "so training would be wrong. Leave packing out, or set model.attention to sdpa or eager."
        )
