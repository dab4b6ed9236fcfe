"""Token sequences of examples: what a model is given, and on which of it there is a loss."""

import logging
from collections.abc import Sequence
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from pica.errors import DataError
from pica.experiments.limits import Limits, check_tokens
from pica.tasks import Example

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of tokens without loss, as torch's cross entropy has it."""
_NO_LIMITS = Limits()


def special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Ids of the end-of-text and the padding token, both of which `load_tokenizer` has made sure of."""
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert isinstance(end, int)
    assert isinstance(padding, int)
    return end, padding


def prompt_ids(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, limits: Limits = _NO_LIMITS
) -> list[list[int]]:
    """Encode prompts.

    Returns:
        Token ids, with the tokenizer's start token if it has one and never with an end token.
    Raises:
        DataError: One has a token that the model has no embedding for.
    """
    encoded = tokenizer([example.prompt for example in examples], verbose=False)["input_ids"]
    end, _ = special_ids(tokenizer)
    prompts = [list(ids[:-1] if ids and ids[-1] == end else ids) for ids in encoded]  # pyright: ignore[reportArgumentType]
    check_tokens(prompts, [example.place for example in examples], tokenizer, limits)
    return prompts


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    limits: Limits = _NO_LIMITS,
    whole: bool = False,
) -> datasets.Dataset:
    """Token sequences for training or for measuring a loss.

    Prompt and completion are tokenized apart and joined, so that the loss begins exactly where generation would; an
    end-of-text token closes the completion.

    Args:
        examples: What to encode.
        tokenizer: Tokenizer with an end-of-text token.
        max_length: Sequences are cut off here at the end; those with no completion left are dropped.
        limits: What the model can take.
        whole: Keep every example: where there are too few positions, the prompt loses its beginning, and after it the
            completion its end.

    Returns:
        Columns `input_ids` and `labels`, both lists of the sequence's length; labels are -100 on the prompt.

    Raises:
        DataError: No sequence is left, or one has a token that the model has no embedding for.
    """
    prompts = prompt_ids(examples, tokenizer, limits)
    completions: Any = tokenizer([example.completion for example in examples], add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    check_tokens(completions, [example.place for example in examples], tokenizer, limits)
    end, _ = special_ids(tokenizer)
    if whole and limits.positions is not None:
        completions = [list(completion)[: limits.positions - 2] for completion in completions]
        room = [limits.positions - len(completion) - 1 for completion in completions]
        prompts = [prompt[-most:] for prompt, most in zip(prompts, room)]
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    cut, dropped = 0, list[str]()
    for example, prompt, completion in zip(examples, prompts, completions):
        ids: list[int] = (prompt + list(completion) + [end])[:max_length]
        cut += max_length is not None and len(prompt) + len(completion) + 1 > max_length
        if len(ids) > len(prompt):
            rows["input_ids"].append(ids)
            rows["labels"].append([IGNORED] * len(prompt) + ids[len(prompt) :])
        else:
            dropped.append(example.place)
    if not rows["input_ids"]:
        raise DataError(f"All prompts are longer than trainer.max_length = {max_length}, so nothing can be learnt.")
    if cut:
        logger.warning("%d of %d sequences are cut off at trainer.max_length = %d", cut, len(examples), max_length)
    if dropped:
        first = f", the first at {dropped[0]}" if dropped[0] else ""
        logger.warning("%d sequences are dropped: nothing but their prompt was left%s", len(dropped), first)
    return datasets.Dataset.from_dict(rows)
