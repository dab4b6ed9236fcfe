"""How good a model is at a task: answers that it generates, and the loss on the gold ones."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from pica.experiments.batches import guesses, left_padded, length_batches
from pica.experiments.encoding import encode, prompt_ids, special_ids
from pica.experiments.limits import limits_of, takes_positions
from pica.experiments.reporting import Advance, Reporter
from pica.experiments.results.run import GroupScore, Measurement
from pica.experiments.uncertainty import near_the_end, score_interval, shown, shown_interval
from pica.tasks import Example, GenerationTask

logger = logging.getLogger(__name__)


_OPTIONAL = ("group", "loss", "tokens")  # columns of a predictions file


@dataclass(frozen=True)
class Prediction:
    """One generated answer, as it is written to a predictions file."""

    prompt: str
    completion: str
    extracted: str | None
    gold: str
    correct: bool
    group: str = ""
    loss: float | None = field(default=None, compare=False)
    """Of the gold completion, in nats, its end-of-text token included; None where there is none."""
    tokens: int | None = None
    """How many tokens that is the sum of."""


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
        groups: Accuracy, standard error and number of examples of each data set, where there are several; the score is
            then the mean of theirs.
        pictures: What the model drew, as PIL images by the name of their file.
    """

    metric: str
    score: float
    stderr: float
    metrics: Mapping[str, float]
    loss: float
    examples: int
    tokens: int | None
    predictions: Sequence[Any]
    groups: Mapping[str, GroupScore] = field(default_factory=dict)
    pictures: Mapping[str, Any] = field(default_factory=dict)

    def measurement(self) -> Measurement:
        """All numbers, without the predictions."""
        return Measurement(
            metric=self.metric,
            score=self.score,
            stderr=self.stderr,
            loss=self.loss,
            examples=self.examples,
            tokens=self.tokens,
            groups=dict(self.groups),
            scores=dict(self.metrics),
        )

    def rows(self) -> Iterator[dict[str, Any]]:
        """The predictions as they are written to a file."""
        for row in self.predictions:
            given = row if isinstance(row, dict) else asdict(row)
            yield {name: value for name, value in given.items() if name not in _OPTIONAL or value}


def shown_score(metric: str, score: float, stderr: float, examples: int | None = None) -> str:
    """Write a score with its standard error.

    Args:
        metric: What the score is of.
        score: A share in 0 to 1, which is shown in percent, or a correlation, which is shown as it is; may be undefined.
        stderr: Its standard error; may be undefined.
        examples: Number of answers; where fewer than ten of them are right, or wrong, Wilson's 95% interval stands in the
            place of the standard error, in brackets.
    Returns:
        The text.
    """
    if not math.isfinite(score):
        return "undefined"
    if not math.isfinite(stderr):
        return shown(metric, score)
    if near_the_end(metric, score, examples):
        interval = score_interval(metric, score, stderr, examples or 0)
        return f"{shown(metric, score)} ({shown_interval(metric, interval)})"
    return f"{shown(metric, score)} ± {shown(metric, stderr)}"


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
    by_likelihood: bool = False,
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
        by_likelihood: Take the likeliest of each example's choices instead of generating.
    Returns:
        Scores, their uncertainty, and the answers.
    """
    if by_likelihood:
        texts = likeliest(model, tokenizer, examples, batch_size, reporter, label)
    else:
        texts = answers(model, tokenizer, task, examples, batch_size, max_new_tokens, reporter, label)
    losses = gold_losses(model, tokenizer, examples, batch_size=batch_size)
    predictions = []
    for index, (example, text) in enumerate(zip(examples, texts)):
        extracted = task.extract(text, example)
        correct = task.correct(extracted, example.answer)
        of_gold = losses.get(index, (None, None))
        predictions.append(
            Prediction(example.prompt, text, extracted, example.answer, correct, example.group, *of_gold)
        )
    groups = {
        name: _share([one.correct for one in predictions if one.group == name])
        for name in dict.fromkeys(example.group for example in examples)
    }
    # The mean over data sets, each counting the same, as papers report several; of one set it is simply its share.
    accuracy = sum(group.accuracy for group in groups.values()) / len(groups)
    stderr = math.sqrt(sum(group.stderr**2 for group in groups.values())) / len(groups)
    metrics = {"accuracy": accuracy}
    for name, right in task.other_scores.items():
        metrics[name] = sum(right(text, example.answer) for text, example in zip(texts, examples)) / len(texts)
    loss, tokens = _mean_of(losses)
    return Evaluation(
        "accuracy",
        accuracy,
        stderr,
        metrics,
        loss,
        len(predictions),
        tokens,
        predictions,
        groups if len(groups) > 1 else {},
    )


def _share(right: Sequence[bool]) -> GroupScore:
    share = sum(right) / len(right)
    return GroupScore(accuracy=share, stderr=math.sqrt(share * (1 - share) / len(right)), examples=len(right))


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
    *,
    sampling: tuple[float, float] | None = None,
) -> list[str]:
    """Let the model go on with the prompts.

    Args:
        model: Makes them.
        tokenizer: Its tokenizer.
        task: Scores the answers, for the bar.
        examples: Whose prompts they are.
        batch_size: Prompts at a time.
        max_new_tokens: Longest continuation.
        reporter: Is shown a bar.
        label: What the bar is called.
        sampling: Temperature and top_p, to sample from torch's global generators; None for greedy ones.
    Returns:
        Continuations, in the examples' order, without special tokens.
    """
    model.eval()
    limits = limits_of(model)
    prompts = prompt_ids(examples, tokenizer, limits)
    if limits.positions is not None:
        room = max(1, limits.positions - max_new_tokens + 1)  # the last token that is made takes no position
        if cut := sum(len(prompt) > room for prompt in prompts):
            logger.warning(
                "%d of %d prompts lose their beginning: the model has %d positions, and task.max_new_tokens = %d of them "
                "are for the answer",
                cut,
                len(prompts),
                limits.positions,
                max_new_tokens,
            )
        prompts = [prompt[-room:] for prompt in prompts]
    end, padding = special_ids(tokenizer)
    # Always set: greedy decoding ignores those of a model's own generation_config with warnings, sampling would heed them.
    temperature, top_p = sampling or (1.0, 1.0)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampling is not None,
        temperature=temperature,
        top_p=top_p,
        top_k=50 if sampling is None else 0,
        eos_token_id=end,
        pad_token_id=padding,
    )
    texts = [""] * len(examples)
    right = done = 0
    with reporter.bar(label, len(examples)) as advance:
        # Padded on the left, a prompt begins at a later position: a model without `position_ids` cannot be told otherwise.
        alike = limits.positions is not None and not takes_positions(model)
        for indices in length_batches([len(ids) for ids in prompts], batch_size, alike=alike):
            ids, mask = left_padded([prompts[index] for index in indices], padding)
            ids, mask = ids.to(model.device), mask.to(model.device)
            output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
            new = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(indices, new):
                texts[index] = text
                right += task.correct(task.extract(text, examples[index]), examples[index].answer)
            done += len(indices)
            advance(len(indices), f"{right}/{done} right")
    return texts


def likeliest(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch_size: int,
    reporter: Reporter,
    label: str,
) -> list[str]:
    """Choose among the completions that end in one of an example's choices.

    Likelihoods are of all tokens of the completion and the end of the text; choices that are longer get no bonus.

    Args:
        model: Whose likelihoods count.
        tokenizer: Its tokenizer.
        examples: With choices.
        batch_size: Rows at a time.
        reporter: Is shown a bar.
        label: What the bar is called.
    Returns:
        For each example the likeliest completion.
    """
    candidates, owners = [], []
    for index, example in enumerate(examples):
        stem = example.completion.removesuffix(example.answer)
        for choice in example.choices:
            candidates.append(replace(example, completion=stem + choice))
            owners.append(index)
    best: dict[int, tuple[float, str]] = {}
    with reporter.bar(label, len(candidates)) as advance:
        losses = completion_losses(model, tokenizer, candidates, batch_size=batch_size, advance=advance)
    for owner, candidate, (loss, _) in zip(owners, candidates, losses):
        if owner not in best or loss < best[owner][0]:
            best[owner] = loss, candidate.completion
    return [best[index][1] for index in range(len(examples))]


def held_out_loss(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, batch_size: int
) -> tuple[float, int]:
    """Mean negative log-likelihood of the gold completions in nats a token, and the number of tokens."""
    return _mean_of(gold_losses(model, tokenizer, examples, batch_size=batch_size))


def gold_losses(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, batch_size: int
) -> dict[int, tuple[float, int]]:
    """`completion_losses` by the examples' places, without those that have no completion (unless none has one)."""
    places = [place for place, example in enumerate(examples) if example.completion.strip()] or range(len(examples))
    return dict(zip(places, completion_losses(model, tokenizer, [examples[i] for i in places], batch_size=batch_size)))


def _mean_of(losses: Mapping[int, tuple[float, int]]) -> tuple[float, int]:
    tokens = sum(count for _, count in losses.values())
    return sum(loss for loss, _ in losses.values()) / tokens, tokens


def completion_losses(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: int,
    advance: Advance | None = None,
) -> list[tuple[float, int]]:
    """Negative log-likelihood in nats of each example's completion, end-of-text token included, and its tokens."""
    rows = encode(examples, tokenizer, limits=limits_of(model), whole=True)
    ids, labels = rows["input_ids"], rows["labels"]
    _, padding = special_ids(tokenizer)
    losses = [(0.0, 0)] * len(ids)
    for batch in guesses(model, ids, labels, padding, batch_size=batch_size, advance=advance):
        for index, part in zip(batch.indices, batch.losses().split(batch.counts)):
            losses[index] = part.sum().item(), len(part)
    return losses
