"""What the base model, the adapter and the baseline of one run share: data, pipeline, folder, and how they are measured."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft

from pica.basis import alone
from pica.experiments.data import Splits
from pica.experiments.evaluate.evaluation import Evaluation, shown_score
from pica.experiments.models import device
from pica.experiments.pipelines import AnsweringPipeline, Pipeline
from pica.experiments.recipes.recipe import AdapterSection, Recipe
from pica.experiments.reporting import Reporter
from pica.experiments.results.run import Attempt
from pica.experiments.train.calibrating import adapted
from pica.experiments.train.phases import Phases
from pica.experiments.train.progress import RunLog
from pica.experiments.watching import Watch
from pica.files import output as files
from pica.text import in_words

CHECKPOINTS = "checkpoints"
"""Folder inside the output folder that holds what an unfinished run needs to go on."""
LOGS = "logs"
"""Folder inside the output folder for what `trainer.report_to` writes."""


@dataclass
class Setting:
    """One recipe's models are trained, read and measured in here.

    Attributes:
        recipe: With its classes.
        folder: Of the run.
        reporter: Is told how it goes.
        phases: What is done already.
        splits: The examples.
        pipeline: Of the recipe's task.
        rows: The training examples, encoded.
        target: What the folder will be called once the run is complete.
        log: What there is to show while it goes on.
    """

    recipe: Recipe
    folder: Path
    reporter: Reporter
    phases: Phases
    splits: Splits
    pipeline: Pipeline
    rows: Any
    target: Path
    log: RunLog = field(init=False)

    def __post_init__(self) -> None:
        attempts = {name: self.phases.read(name, Attempt) for name in self.phases.names() if is_attempt(name)}
        self.log = RunLog(self.folder, self.recipe, attempts, self.reporter)

    @property
    def checkpoints(self) -> Path:
        """Folder with one for each training."""
        return self.folder / CHECKPOINTS

    def adapted(self, section: AdapterSection) -> peft.PeftModel:
        """A base model with a new adapter."""
        return adapted(self.pipeline, section, self.rows, self.recipe, self.folder, self.target)

    def read(self, adapter: Path) -> peft.PeftModel:
        """A base model with a saved adapter, in one of the processes."""
        with alone():  # the other processes are waiting
            return self.pipeline.read(adapter)

    def evaluate(self, model: Any, label: str) -> Evaluation:
        """Measure a model on the test problems."""
        return self.pipeline.evaluate(model.to(device()), self.splits.test, reporter=self.reporter, label=label)

    def report(self, title: str, found: Evaluation, file: str) -> None:
        """Write what a model answered or drew, and say how it did."""
        files.write_jsonl(self.folder / file, found.rows())
        score = shown_score(found.metric, found.score, found.stderr, found.examples)
        self.reporter.say(
            f"{title}: {in_words(found.metric)} {score} on {found.examples} {self.pipeline.measured} loss {found.loss:.4f}"
        )
        if found.pictures:
            from pica.experiments.pipelines.diffusion.drawing import write_picture

            for name, picture in found.pictures.items():
                write_picture(self.folder / pictures_of(file) / name, picture)
        for name, group in found.groups.items():
            score = shown_score("accuracy", group.accuracy, group.stderr, group.examples)
            self.reporter.say(f"  {name}: {score}")

    def watch(self, key: str, rate: float, *, everything: bool) -> Watch:
        """What is looked at while the training `key` goes on; see `Search` for `everything`."""
        pipeline, section, validation = self.pipeline, self.recipe.trainer, self.splits.validation
        asked = validation or self.splits.test
        measures = section.eval_steps is not None and validation and not everything
        asks = section.sample_steps is not None and isinstance(pipeline, AnsweringPipeline)
        return Watch(
            measure=(lambda model: pipeline.held_out(model, validation)) if measures else None,
            sample=(lambda model: pipeline.samples(model, asked)) if asks else None,  # pyright: ignore[reportAttributeAccessIssue]
            sampled=(lambda rows, new: self.log.sampled(key, rows, new)) if asks else None,
            logged=lambda history: self.log.logged(key, rate, history),
            logs=self.folder / LOGS / key,
            name=f"{self.target.name}-{key}",
            project=self.target.name if self.recipe.name == Recipe().name else self.recipe.name,
        )


def attempt_name(name: str, rate: float) -> str:
    """Of the phase of training with one rate: no two rates have the same, also where six digits do not tell them apart."""
    short = f"{rate:g}"
    return f"{name}-lr{short if float(short) == rate else repr(rate)}"


def refit_name(name: str) -> str:
    """Of the phase of training on the validation problems too."""
    return f"{name}-refit"


def is_attempt(phase: str) -> bool:
    """Whether a phase is one training: none of the others has a hyphen in its name."""
    return "-" in phase


def pictures_of(predictions: str) -> str:
    """The folder for the pictures that a predictions file lists."""
    return Path(predictions).stem.replace("predictions", "pictures")
