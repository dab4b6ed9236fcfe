"""Asking a model: one answer as it is written, or many at a time."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, TextIteratorStreamer

from pica.errors import ConfigError
from pica.experiments.batches import left_padded, length_batches
from pica.experiments.chat.rendering import Renderer
from pica.experiments.encoding import special_ids
from pica.experiments.reporting import Advance
from pica.tasks.chat import Message

Asked = tuple[Sequence[Message], Sequence[Any]]
"""The messages before an answer, and the tools that are on offer."""


@dataclass(frozen=True)
class Sampling:
    """How words are chosen.

    Attributes:
        temperature: 0 always takes the likeliest.
        top_p: Share of the probability that is chosen from.
        seed: Decides the choices.
        max_new_tokens: Longest answer.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 256


def check_sampling(sampling: Sampling) -> None:
    """Raise `ConfigError` on settings that are out of range."""
    if not 0 <= sampling.temperature <= 100:
        raise ConfigError(f"temperature = {sampling.temperature}: must be between 0 and 100.")
    if not 0 < sampling.top_p <= 1:
        raise ConfigError(f"top_p = {sampling.top_p}: must be above 0 and at most 1.")
    if not 1 <= sampling.max_new_tokens <= 1_000_000:
        raise ConfigError(f"max_new_tokens = {sampling.max_new_tokens}: must be between 1 and 1,000,000.")
    if not 0 <= sampling.seed < 2**63:
        raise ConfigError(f"seed = {sampling.seed}: must be between 0 and 2^63 - 1.")


class _Stopped(StoppingCriteria):
    """Stops generation from another thread."""

    def __init__(self) -> None:
        self.asked = threading.Event()

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.asked.is_set(), device=input_ids.device)


class Speaker:
    """A model that answers in its chat template, and stops where it learnt to."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, renderer: Renderer) -> None:
        """`model` is on the device to use; `renderer` has the tokenizer's chat template."""
        self.model, self.tokenizer, self.renderer = model.eval(), tokenizer, renderer

    def answer_all(
        self, asked: Sequence[Asked], *, max_new_tokens: int, batch_size: int, advance: Advance | None = None
    ) -> list[str]:
        """Answer questions greedily.

        Args:
            asked: The questions.
            max_new_tokens: Longest answer.
            batch_size: Questions at once.
            advance: Is told the questions that are done.
        Returns:
            The answers, in the order of the questions.
        """
        prompts = [self.renderer.prompt(messages, tools) for messages, tools in asked]
        texts = [""] * len(prompts)
        settings = self._settings(Sampling(max_new_tokens=max_new_tokens))
        for indices in length_batches([len(prompt) for prompt in prompts], batch_size):
            batch = self._batch([prompts[index] for index in indices])
            with torch.inference_mode():
                written = self.model.generate(**batch, generation_config=settings)
            for index, row in zip(indices, written[:, batch["input_ids"].shape[1] :]):
                texts[index] = self.tokenizer.decode(row, skip_special_tokens=True).strip()  # pyright: ignore[reportAttributeAccessIssue]
            if advance is not None:
                advance(len(indices))
        return texts

    def stream(self, messages: Sequence[Message], sampling: Sampling, tools: Sequence[Any] = ()) -> Iterator[str]:
        """The answer in pieces, as it is written, from its first word on; closing the iterator stops the writing."""
        question = self._batch([self.renderer.prompt(messages, tools)])
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)  # pyright: ignore[reportArgumentType]
        stopped, failed = _Stopped(), list[BaseException]()

        def write() -> None:
            try:
                with torch.inference_mode():
                    torch.manual_seed(sampling.seed)
                    self.model.generate(
                        **question,
                        generation_config=self._settings(sampling),
                        streamer=streamer,
                        stopping_criteria=[stopped],
                    )
            except BaseException as error:  # given to whoever reads, who otherwise waits for ever
                failed.append(error)
                streamer.end()

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        try:
            begun = False
            for piece in streamer:
                piece = piece if begun else piece.lstrip()
                if piece:
                    begun = True
                    yield piece
        finally:
            stopped.asked.set()
            writer.join()
        if failed:
            raise failed[0]

    def _settings(self, sampling: Sampling) -> GenerationConfig:
        end, padding = special_ids(self.tokenizer)
        tokenizer: Any = self.tokenizer
        own = getattr(self.model, "generation_config", None)
        theirs = getattr(own, "eos_token_id", None)
        stops = {end, *(theirs if isinstance(theirs, list) else [theirs] if isinstance(theirs, int) else [])}
        stops |= {tokenizer.convert_tokens_to_ids(stop) for stop in self.renderer.stops}
        chosen: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens, eos_token_id=sorted(stops), pad_token_id=padding, **chosen
        )

    def _batch(self, prompts: Sequence[list[int]]) -> dict[str, torch.Tensor]:
        ids, mask = left_padded(prompts, special_ids(self.tokenizer)[1])
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}
