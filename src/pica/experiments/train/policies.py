"""Trainers that learn from preferences and from rewards: TRL's, with the guards of all trainers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from pica.errors import ConfigError
from pica.experiments.encoding import special_ids
from pica.experiments.methods import changes_base
from pica.experiments.preference.encoding import PairCollator
from pica.experiments.recipes.recipe import AdapterSection, PreferenceSection, RewardSection
from pica.experiments.train.trainers import Guards, Steps, common_arguments
from pica.text import first_line


class PreferenceTrainer(Guards, DPOTrainer):
    """TRL's trainer on pairs that are tokens already, with our guards."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


class RewardTrainer(Guards, GRPOTrainer):
    """TRL's trainer with our guards; it says how the answers of the last step were rewarded.

    The order of the problems follows from the seed and the epoch: TRL's own goes on from that of the epochs before, and
    would begin again with the first one's when a run is resumed in a later one.
    """

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return _EpochSampler(super()._get_train_sampler(*args, **kwargs), self.args.seed)

    @property
    def answers_a_row(self) -> int:
        """How many answers a row of the data becomes."""
        return self.num_generations or 1


class _EpochSampler(Sampler[int]):
    """A sampler with a generator of its own, which is set anew for each epoch."""

    def __init__(self, sampler: Any, seed: int) -> None:
        self._sampler, self._seed = sampler, seed

    def set_epoch(self, epoch: int) -> None:
        self._sampler.generator.manual_seed(self._seed + epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(self._sampler)

    def __len__(self) -> int:
        return len(self._sampler)


def preference_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    steps: Steps,
    preference: PreferenceSection,
) -> PreferenceTrainer:
    """Make a trainer on rows of `as_pair_dataset`.

    Returns:
        The trainer; its reference is the model with its (new) adapter switched off.

    Raises:
        ConfigError: TRL refuses the model or the settings.
    """
    _, padding = special_ids(tokenizer)
    with _as_settings(), _without_copy(model):
        arguments = DPOConfig(
            **common_arguments(steps),
            beta=preference.beta,
            max_length=steps.section.max_length,
            remove_unused_columns=False,  # all columns are ours
        )
        return PreferenceTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=PairCollator(padding),
            processing_class=tokenizer,
            callbacks=list(steps.callbacks),
        )


def reward_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: datasets.Dataset,
    steps: Steps,
    reward: RewardSection,
    *,
    rewards: Callable[..., list[float]],
    max_new_tokens: int,
) -> RewardTrainer:
    """Make a trainer on rows with a `prompt`, and whatever else `rewards` asks for.

    Args:
        model: The model with its adapter.
        tokenizer: Its tokenizer.
        rows: Problems.
        steps: How they are done.
        reward: Settings of the answers.
        rewards: From prompts, completions and the rows' other columns to a reward for each.
        max_new_tokens: Longest answer.

    Returns:
        The trainer.

    Raises:
        ConfigError: TRL refuses the model or the settings, or the tokenizer ends every prompt as if it were a whole text.
    """
    end, _ = special_ids(tokenizer)
    if list(tokenizer("1")["input_ids"])[-1] == end:  # pyright: ignore[reportArgumentType]
        raise ConfigError(
            "This model's tokenizer puts an end-of-text token after every text, and so after every prompt, which no answer "
            "could follow; task reward needs a tokenizer that does not."
        )
    trainer: RewardTrainer | None = None

    def reward_of_answers(**given: Any) -> list[float]:
        found = rewards(given.pop("prompts"), given.pop("completions"), **given)
        if trainer is not None:
            trainer.note = f"reward {sum(found) / len(found):.2f}"
        return found

    with _as_settings(), _without_copy(model):
        arguments = GRPOConfig(
            **common_arguments(steps),
            num_generations=reward.num_generations,
            max_completion_length=max_new_tokens,
            temperature=reward.temperature,
            top_p=reward.top_p,
            beta=reward.beta,
        )
        trainer = RewardTrainer(
            model=model,
            reward_funcs=reward_of_answers,  # pyright: ignore[reportArgumentType] -- all of them have a reward
            args=arguments,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=list(steps.callbacks),
        )
    return trainer


def check_reference(section: AdapterSection) -> None:
    """Raise `ConfigError` on a method whose adapter, switched off, leaves another model than the one that is trained."""
    if changes_base(section):
        raise ConfigError(
            f"adapter.method = {section.method}: it changes the frozen weights, so that the model with its adapter switched "
            "off, which training is measured against, would be another one; choose another, for instance pica or lora."
        )


@contextmanager
def _as_settings() -> Iterator[None]:
    """What TRL refuses, in its first sentence."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"TRL refuses these settings: {first_line(error)}") from error


@contextmanager
def _without_copy(model: Any) -> Iterator[None]:
    """Keep TRL from giving a model that comes with an adapter a second one, called ref and a copy of the first.

    That copy would be the reference. A new adapter changes nothing yet, so that the model with its adapter switched off is
    the same; TRL takes that where there is no adapter called ref. Copying would cost memory, and not all methods can do it.
    """
    parameters = dict(model.named_parameters())

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    def like(name: str) -> torch.Tensor:
        return torch.empty_like(parameters[name.replace(".ref.", ".default.")])

    model.add_adapter, model.get_parameter = nothing, like
    try:
        yield
    finally:
        del model.add_adapter, model.get_parameter
