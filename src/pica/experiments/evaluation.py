"""How good a model is at a task: answers that it generates, and the loss on the gold ones."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from pica.experiments.data import IGNORED, encode, prompt_ids, special_ids
from pica.experiments.reporting import Reporter
from pica.tasks import Example, GenerationTask


@dataclass(frozen=True)
class Prediction:
    """One generated answer, as it is written to a predictions file."""

    prompt: str
    completion: str
    extracted: str | None
    gold: str
    correct: bool


@dataclass(frozen=True)
class Evaluation:
    """What was measured on a set of examples.

    Attributes:
        metric: Name of the metric that the task is judged by.
        score: Its value; higher is better.
        stderr: Its standard error; sqrt(p (1 - p) / n) for a share of right answers.
        metrics: This and the task's other metrics by name.
        loss: Generation: mean negative log-likelihood of the gold completions, in nats a token, the end-of-text token
            included. Classification: mean cross-entropy in nats an example; regression: mean squared error.
        examples: Number of examples.
        tokens: Number of tokens that a generation task's loss is the mean of.
        predictions: One for each example, in the examples' order.
    """

    metric: str
    score: float
    stderr: float
    metrics: Mapping[str, float]
    loss: float
    examples: int
    tokens: int | None
    predictions: Sequence[Any]

    def summary(self) -> dict[str, Any]:
        """All numbers, without the predictions, the metrics by their names."""
        chosen = {"metric": self.metric, "score": self.score, "stderr": self.stderr, **self.metrics, "loss": self.loss}
        counts = {"examples": self.examples, "tokens": self.tokens}
        return chosen | {name: count for name, count in counts.items() if count is not None}

    def rows(self) -> Iterator[dict[str, Any]]:
        """The predictions as they are written to a file."""
        return (row if isinstance(row, dict) else asdict(row) for row in self.predictions)


def shown_score(metric: str, score: float, stderr: float) -> str:
    """A score with its standard error: shares in percent, correlations as they are."""
    if metric in ("accuracy", "f1"):
        return f"{score:.1%} ± {stderr:.1%}"
    return f"{score:.4f} ± {stderr:.4f}"


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: GenerationTask,
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_new_tokens: int,
    reporter: Reporter,
    label: str,
) -> Evaluation:
    """Answer every example greedily and measure the loss on the gold answers.

    Args:
        model: Causal language model or PeftModel, on the device to use.
        tokenizer: Its tokenizer, with padding and end-of-text tokens.
        task: Reads and scores the answers.
        examples: What to answer; at least one.
        batch_size: Examples in one forward pass.
        max_new_tokens: Longest answer.
        reporter: Is shown a bar with the accuracy so far.
        label: What the bar is called.
    """
    texts = answers(model, tokenizer, task, examples, batch_size, max_new_tokens, reporter, label)
    predictions = []
    for example, text in zip(examples, texts):
        extracted = task.extract(text)
        correct = task.correct(extracted, example.answer)
        predictions.append(Prediction(example.prompt, text, extracted, example.answer, correct))
    accuracy = sum(prediction.correct for prediction in predictions) / len(predictions)
    loss, tokens = held_out_loss(model, tokenizer, examples, batch_size=batch_size)
    stderr = math.sqrt(accuracy * (1 - accuracy) / len(predictions))
    metrics = {"accuracy": accuracy}
    return Evaluation("accuracy", accuracy, stderr, metrics, loss, len(predictions), tokens, predictions)


@torch.inference_mode()
def answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: GenerationTask,
    examples: Sequence[Example],
    batch_size: int,
    max_new_tokens: int,
    reporter: Reporter,
    label: str,
) -> list[str]:
    """Greedy continuations of the prompts, in the examples' order, without special tokens."""
    model.eval()
    prompts = prompt_ids(examples, tokenizer)
    end, padding = special_ids(tokenizer)
    # Sampling options in a model's own generation_config would only cause warnings, as greedy decoding ignores them.
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        eos_token_id=end,
        pad_token_id=padding,
    )
    texts = [""] * len(examples)
    right = done = 0
    with reporter.bar(label, len(examples)) as advance:
        for indices in length_batches([len(ids) for ids in prompts], batch_size):
            ids, mask = _left_padded([prompts[index] for index in indices], padding)
            ids, mask = ids.to(model.device), mask.to(model.device)
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            new = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(indices, new):
                texts[index] = text
                right += task.correct(task.extract(text), examples[index].answer)
            done += len(indices)
            advance(len(indices), f"{right}/{done} right")
    return texts


@torch.inference_mode()
def held_out_loss(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, batch_size: int
) -> tuple[float, int]:
    """Mean negative log-likelihood of the gold completions in nats a token, and the number of tokens."""
    model.eval()
    rows = encode([example for example in examples if example.completion.strip()] or examples, tokenizer)
    ids, labels = rows["input_ids"], rows["labels"]
    lengths = [len(row) for row in ids]
    _, padding = special_ids(tokenizer)
    total, tokens = 0.0, 0
    for indices in length_batches(lengths, batch_size):
        width = max(lengths[index] for index in indices)
        batch = torch.full((len(indices), width), padding)
        target = torch.full((len(indices), width), IGNORED)
        mask = torch.zeros((len(indices), width), dtype=torch.long)
        for row, index in enumerate(indices):
            batch[row, : lengths[index]] = torch.tensor(ids[index])
            target[row, : lengths[index]] = torch.tensor(labels[index])
            mask[row, : lengths[index]] = 1
        logits = model(input_ids=batch.to(model.device), attention_mask=mask.to(model.device)).logits
        counted = target[:, 1:].to(logits.device) != IGNORED  # (batch, width - 1)
        # Only completion positions are upcast: all of them in float32 are the largest tensor of the whole run.
        scores = logits[:, :-1][counted].float()  # (tokens, vocabulary)
        gold = target[:, 1:].to(logits.device)[counted]
        total += torch.nn.functional.cross_entropy(scores, gold, reduction="sum").item()
        tokens += gold.numel()
    return total / tokens, tokens


def length_batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first, so that memory runs out at once or never."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _left_padded(rows: Sequence[list[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (rows, longest); generation continues at the right edge."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), padding)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    return ids, mask
