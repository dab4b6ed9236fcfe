"""How much text a model can take: positions, where it has a table of them, and token ids."""

import inspect
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from pica.errors import ConfigError, DataError
from pica.experiments.models import load_config
from pica.experiments.recipes.recipe import ModelSection
from pica.foreign_code import code_options

logger = logging.getLogger(__name__)

_TABLES = ("position_embeddings", "embed_positions", "positions_embed", "wpe")  # of learned positions, in transformers
_REMEDY = "add the embeddings to the model, or use the tokenizer that it was trained with."


@dataclass(frozen=True)
class Limits:
    """What a model can take.

    Attributes:
        positions: Longest sequence in tokens; None where there is no end, as with rotary or relative positions.
        tokens: Number of token embeddings; ids are below it. None: unknown.
    """

    positions: int | None = None
    tokens: int | None = None


def limits_of(model: Any) -> Limits:
    """The limits of a model with or without an adapter, on any device."""
    config = model.config.get_text_config()
    embeddings = model.get_input_embeddings()
    tokens = getattr(embeddings, "num_embeddings", None)
    most = getattr(config, "max_position_embeddings", None)
    found = None
    for name, module in model.named_modules():
        if not isinstance(most, int):
            break
        if isinstance(module, nn.Embedding) and name.removesuffix(".base_layer").rpartition(".")[2] in _TABLES:
            # RoBERTa and its kin count from the padding token's id on, OPT and BART from 2.
            first = getattr(module, "offset", None) or (0 if module.padding_idx is None else module.padding_idx + 1)
            if most <= module.num_embeddings:  # else that of another part, such as an image encoder
                found = min(module.num_embeddings - first, most)
                break
    return Limits(found, tokens)


def takes_positions(model: Any) -> bool:
    """Whether a model, with or without an adapter, can be told each token's position."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "position_ids" in inspect.signature(base.forward).parameters


def planned_limits(section: ModelSection, auto_class: Any) -> Limits:
    """The limits of a model whose weights are not loaded; none where its class comes with its own code."""
    config = load_config(section)
    text = config.get_text_config()
    if getattr(text, "rope_parameters", None):  # rotary: no table, and such models can be large
        return Limits(None, getattr(text, "vocab_size", None))
    try:
        with torch.device("meta"):
            return limits_of(auto_class.from_config(config, **code_options()))
    except Exception as error:  # whatever is wrong with it, loading the weights will say so better
        logger.debug("No limits of %s: %s", section.path, error)
        return Limits()


def fit_padding(tokenizer: PreTrainedTokenizerBase, limits: Limits, model: str) -> None:
    """Have a tokenizer pad with a token that the model knows: padding is masked, so that any does.

    Raises:
        ConfigError: It has none.
    """
    pad = tokenizer.pad_token_id
    if limits.tokens is None or not isinstance(pad, int) or pad < limits.tokens:
        return
    known = [tokenizer.eos_token, tokenizer.sep_token, tokenizer.unk_token, tokenizer.bos_token]
    for token in known:
        number = tokenizer.convert_tokens_to_ids(token) if isinstance(token, str) else None
        if isinstance(number, int) and number < limits.tokens:
            tokenizer.pad_token = token
            return
    raise ConfigError(
        f"The tokenizer of {model!r} pads with token {pad}, and the model has embeddings for {limits.tokens} tokens only "
        f"(the tokenizer knows {len(tokenizer)}); {_REMEDY}"
    )


def check_tokens(
    rows: Iterable[Sequence[int]], places: Sequence[str], tokenizer: PreTrainedTokenizerBase, limits: Limits
) -> None:
    """Check that the model has an embedding for every token.

    Raises:
        DataError: It has none for one; the message names the row, the token, and both sizes.
    """
    if limits.tokens is None or len(tokenizer) <= limits.tokens:
        return
    for ids, place in zip(rows, places):
        if ids and (number := max(ids)) >= limits.tokens:
            token = tokenizer.convert_ids_to_tokens(number)
            where = f"{place}: the text" if place else "A text"
            raise DataError(
                f"{where} has token {token!r}, number {number}, and the model has embeddings for {limits.tokens} tokens "
                f"only (its tokenizer knows {len(tokenizer)}); {_REMEDY}"
            )


def longest(max_length: int, limits: Limits) -> int:
    """The longest sequence: `trainer.max_length`, or what the model has positions for, which is said."""
    if limits.positions is None or max_length <= limits.positions:
        return max_length
    logger.warning(
        "trainer.max_length = %d is more than the model's %d positions: texts are cut off there",
        max_length,
        limits.positions,
    )
    return limits.positions
