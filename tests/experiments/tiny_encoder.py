"""A BERT that fits in a test: real architecture and tokenizer classes, random weights, one token a word."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

GOOD = ("fine", "lovely", "great", "warm")
BAD = ("dull", "awful", "weak", "cold")
REST = ("the", "film", "is", "a", "story", "and", "its", "end", "was", "so")


def write_tiny_bert(folder: Path) -> Path:
    """Write the body of a model, without any head, as encoders are published; the same bytes each time."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *REST]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(config, add_pooling_layer=False)
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


def reviews(count: int, *, offset: int = 0) -> list[tuple[str, str]]:
    """Different sentences and their class, "good" or "bad" by the one telling word in each."""
    made = []
    for number in range(offset, offset + count):
        words = [REST[(number * step + step) % len(REST)] for step in (1, 3, 7)]
        words += [REST[number // 10 % len(REST)], REST[number // 100 % len(REST)]]
        side, choice = ("good", GOOD) if number % 2 else ("bad", BAD)
        made.append((" ".join([*words, choice[number // 2 % 4]]), side))
    return made
