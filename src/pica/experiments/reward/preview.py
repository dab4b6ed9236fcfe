"""What a model would be asked when it learns from rewards, before any training: prompts, and the right answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from pica.experiments.chat.preview import Stretch
from pica.experiments.pipelines.reward import RewardPipeline
from pica.experiments.recipes.recipe import Recipe
from pica.tasks import Example, get_task


@dataclass(frozen=True)
class PromptPreview:
    """What training would ask.

    Attributes:
        lengths: Tokens of each prompt.
        room: Most tokens that leave room for an answer; longer prompts are left out.
        duplicates: How many problems are there more than once; those that a weight repeats are none.
        shared: Places of problems that are test problems too.
        step: How an optimizer step is made up, in words.
        examples: (place and right answer, the prompt) of the first few.
    """

    lengths: list[int]
    room: int
    duplicates: int
    shared: list[str]
    step: str
    examples: list[tuple[str, list[Stretch]]]

    def facts(self, max_length: int) -> dict[str, str]:
        """The numbers, by what they are called; `max_length` is `trainer.max_length`."""
        found = {
            "prompts": f"{min(self.lengths):,} to {max(self.lengths):,} tokens, median {median(self.lengths):,.0f}",
            "step": self.step,
        }
        for name, count, what in (
            (
                "left out",
                sum(length > self.room for length in self.lengths),
                f"longer than {self.room:,} tokens, which leave no room for an answer (trainer.max_length = {max_length:,})",
            ),
            ("duplicates", self.duplicates, "there before"),
            (
                "in the test",
                len(self.shared),
                f"are test problems too{': ' if any(self.shared) else ''}{', '.join(filter(None, self.shared[:3]))}",
            ),
        ):
            if count:
                found[name] = f"{count:,} {what}"
        return found


def preview_prompts(
    recipe: Recipe, train: Sequence[Example], test: Sequence[Example] = (), *, examples: int = 3
) -> PromptPreview:
    """Look at problems as training would.

    Args:
        recipe: Whose model and settings they are.
        train: What would be learnt from.
        test: What would be measured on.
        examples: How many to show.

    Returns:
        What was found.

    Raises:
        PicaError: The model's tokenizer or configuration is not to be had, or does not fit the problems.
    """
    pipeline = RewardPipeline(recipe, get_task(recipe.task.name))
    single = {id(example): example for example in train}.values()
    tested = {example.identity for example in test}
    answers, each = recipe.trainer.batch_size * recipe.trainer.accumulation, recipe.reward.num_generations
    problems = answers // each
    return PromptPreview(
        pipeline.prompt_lengths(train),
        pipeline.room,
        len(single) - len({example.identity for example in single}),
        [example.place for example in train if example.identity in tested],
        f"{answers:,} answers, {each} to each of {problems:,} problem{'s' if problems != 1 else ''}",
        [
            (f"{example.place or f'problem {number}'}, right: {example.answer}", [Stretch(example.prompt, False)])
            for number, example in enumerate(train[:examples], start=1)
        ],
    )
