"""Pre-train the tiny Llama that ships inside the package, from nothing but a seed.

    python tools/pretrain_tiny.py --out src/pica/assets/tiny-llama

generates the text (tiny_corpus.py), trains a tokenizer and a LlamaForCausalLM on it, and writes an ordinary
transformers folder together with training.json, which says how it came about. `--steps 5` is a quick check that
everything works; the model is then as good as untrained.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

import tiny_corpus

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
SPECIAL = (PAD, BOS, EOS)
"""In the order of their token numbers, from 0."""

VOCABULARY = 768
DEFAULT_STEPS = 2500
BLOCK = 128
"""Tokens of one training example: whole documents, one after the other, then padding."""

TOKENIZER_DOCUMENTS = 20_000
HELD_OUT_DOCUMENTS = 2_000
DOCUMENTS_PER_BLOCK = 4
"""Documents generated for each block needed: more than fit into one, so that no block is missing."""


@dataclass(frozen=True)
class Settings:
    """What decides the weights: two runs with equal settings on one machine see the same tokens in the same order."""

    steps: int
    seed: int
    batch: int = 32
    learning_rate: float = 3e-3
    bf16: bool = True


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE over `texts` in which every digit is a token of its own.

    Starting from all 256 bytes, it encodes any text and decodes it again exactly; each sequence begins with BOS.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue] -- stub is read-only
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue] -- stub is read-only
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue] -- as above
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, SPECIAL.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The architecture: a Llama in small, with narrow keys and values (one key head for four query heads)."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL.index(BOS),
        eos_token_id=SPECIAL.index(EOS),
        pad_token_id=SPECIAL.index(PAD),
        dtype="float32",
    )


def blocks(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Documents between BOS and EOS, in order, as many as fit into each block: (blocks, BLOCK), int64.

    No document is split over two blocks, so every block begins as every prompt will: with BOS at position 0. (Blocks
    cut out of one long row rarely do, and a model trained on those calculates badly at the beginning of a text.)
    A document longer than a block loses its end.
    """
    rows: list[list[int]] = [[]]
    for encoding in tokenizer.backend_tokenizer.encode_batch([text + EOS for text in texts]):
        if len(rows[-1]) + len(encoding.ids) > BLOCK:
            rows.append([])
        rows[-1] += encoding.ids[:BLOCK]
    return torch.tensor([row + [SPECIAL.index(PAD)] * (BLOCK - len(row)) for row in rows])


def labels(examples: Tensor) -> Tensor:
    """What is to be predicted: the examples themselves, with -100 where the loss must ignore padding."""
    return examples.masked_fill(examples == SPECIAL.index(PAD), -100)


def mean_loss(model: PreTrainedModel, examples: Tensor) -> float:
    """Cross-entropy in nats per predicted token over `examples` (blocks, BLOCK), in the model's own dtype."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for part in examples.split(32):
            predicted = int((labels(part)[:, 1:] >= 0).sum())
            total += model(input_ids=part, labels=labels(part)).loss.item() * predicted
            count += predicted
    return total / count


def unigram_loss(examples: Tensor) -> float:
    """Cross-entropy in nats per token of the best model that ignores all context: the entropy of the frequencies."""
    frequencies = torch.bincount(examples[examples != SPECIAL.index(PAD)]).double()
    return torch.special.entr(frequencies / frequencies.sum()).sum().item()


class _Blocks(torch.utils.data.Dataset):
    """Blocks as Trainer wants them."""

    def __init__(self, examples: Tensor) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.examples[index], "labels": labels(self.examples[index])}


def pretrain(settings: Settings, folder: Path) -> dict[str, object]:
    """Train and save into the existing `folder`; returns what is also written to its training.json."""
    started = time.monotonic()
    # The tokenizer's and the held-out text come from seeds far from the training text's.
    tokenizer = train_tokenizer(list(tiny_corpus.corpus(settings.seed + 1_000_000, TOKENIZER_DOCUMENTS)))
    needed = settings.steps * settings.batch
    documents = max(needed * DOCUMENTS_PER_BLOCK, 100)
    examples = blocks(list(tiny_corpus.corpus(settings.seed, documents)), tokenizer)[:needed]
    assert len(examples) == needed, f"{documents} documents fill only {len(examples)} of {needed} blocks"
    held_out = blocks(list(tiny_corpus.corpus(settings.seed + 2_000_000, HELD_OUT_DOCUMENTS)), tokenizer)

    transformers.set_seed(settings.seed)
    model = LlamaForCausalLM(model_config(tokenizer))
    untrained = mean_loss(model, held_out)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            train_dataset=_Blocks(examples),
            args=TrainingArguments(
                output_dir=scratch,
                max_steps=settings.steps,
                per_device_train_batch_size=settings.batch,
                learning_rate=settings.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=min(200, settings.steps // 10),
                weight_decay=0.1,
                adam_beta2=0.95,
                bf16=settings.bf16,
                use_cpu=True,
                seed=settings.seed,
                save_strategy="no",
                report_to="none",
                logging_steps=max(1, settings.steps // 20),
            ),
        )
        trainer.train()

    # Half the file at an eighth of bfloat16's rounding error. config.json keeps saying float32, the model's own dtype,
    # so that a plain from_pretrained gives the precision in which adapters are trained.
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    model.config.use_cache = True  # Trainer turned it off for training; generation from this folder wants it
    model.save_pretrained(folder, state_dict=half)
    tokenizer.save_pretrained(folder)
    stored = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    record: dict[str, object] = {
        "command": f"python tools/pretrain_tiny.py --steps {settings.steps} --seed {settings.seed}",
        "settings": vars(settings),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": int((labels(examples) >= 0).sum()),
        "seconds": round(time.monotonic() - started, 1),
        "held_out_loss": {
            "untrained": round(untrained, 4),
            "unigram": round(unigram_loss(held_out), 4),
            "trained": round(mean_loss(stored, held_out), 4),
        },
        "training_loss": [
            {"step": entry["step"], "loss": round(entry["loss"], 4)}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
    }
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def write_model(settings: Settings, out: Path) -> dict[str, object]:
    """Pre-train beside `out` and move the finished folder there, so that `out` never holds half a model.

    Raises:
        FileExistsError: `out` exists and is not a model folder of this tool, so nothing is overwritten.
    """
    if out.exists() and not (out / "training.json").is_file():
        raise FileExistsError(f"{out} exists and was not written by this tool; choose another --out or remove it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        record = pretrain(settings, fresh)
        if out.exists():
            out.rename(Path(scratch) / "previous")
        fresh.rename(out)
    return record


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Pre-train the tiny model that ships inside the package.",
        epilog="example: python tools/pretrain_tiny.py --out src/pica/assets/tiny-llama",
    )
    parser.add_argument("--out", type=Path, required=True, help="Model folder to write; a previous one is replaced.")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, help="Optimizer steps (default: %(default)s).")
    parser.add_argument("--seed", type=int, default=0, help="Seed of text, initial weights and order (default: 0).")
    parser.add_argument("--fp32", action="store_true", help="No bfloat16 autocast: for a CPU that lacks it.")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: at least one step is needed.")
    settings = Settings(steps=arguments.steps, seed=arguments.seed, bf16=not arguments.fp32)
    record = write_model(settings, arguments.out)
    print(json.dumps({key: record[key] for key in ("parameters", "tokens", "seconds", "held_out_loss")}, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
