# pyright: strict
"""What one run measured: the content of metrics.json, and what is noted of its parts while it is under way."""

import math
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, ClassVar

from pydantic import GetJsonSchemaHandler, SerializerFunctionWrapHandler, model_serializer

from pica.experiments.results.documents import Completed, Document, Number, flattened, gathered
from pica.experiments.results.standing import StandingResult

METRICS = "metrics.json"
"""File in a run's folder with its `RunMetrics`; the last that a run writes."""
CURVE = "loss_curve.csv"
"""File beside it with the points of all trainings."""


@dataclass(frozen=True, kw_only=True)
class GroupScore:
    """Accuracy on one of several data sets, its standard error, and the number of its examples."""

    accuracy: Number
    stderr: Number
    examples: int


@dataclass(frozen=True, kw_only=True)
class Measurement(Completed):
    """What one model does on the test problems.

    Attributes:
        metric: Name of the metric that the task is judged by.
        score: Its value, higher is better; NaN where it is undefined, as a correlation with constant answers is.
        stderr: Its standard error over the test problems; NaN where it is not known.
        loss: Mean loss on the gold answers; see `pica.experiments.evaluate.evaluation.Evaluation`.
        examples: Number of test problems.
        tokens: Number of tokens that the loss is the mean of, where it is one of tokens.
        groups: By data set, where there are several; the score is then the mean of theirs.
        scores: This and the task's other metrics, by name. In a file they stand beside the other fields.
    """

    metric: str
    score: Number
    stderr: Number
    loss: Number
    examples: int
    tokens: int | None = None
    groups: dict[str, GroupScore] = field(default_factory=dict[str, GroupScore])
    scores: dict[str, Number] = field(default_factory=dict[str, Number])

    @property
    def loss_stderr(self) -> float | None:
        """Standard error of the loss, of tasks that know it."""
        found = self.scores.get("loss_stderr", math.nan)
        return found if math.isfinite(found) else None

    @model_serializer(mode="wrap")
    def _flattened(self, serialize: SerializerFunctionWrapHandler) -> Document:
        return flattened(serialize(self), "scores")

    @classmethod
    def completed(cls, document: Document) -> Document:
        """Files from before there were other metrics than accuracy lack its name."""
        earlier: Document = {"metric": "accuracy", "score": document.get("accuracy"), "stderr": None, "examples": 0}
        return gathered({**earlier, **document}, "scores", _names(cls))

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> Document:
        made = handler(core)
        own = handler.resolve_ref_schema(made)
        own["additionalProperties"] = own["properties"].pop("scores")["additionalProperties"]
        return made


@cache
def _names(kind: type[Measurement]) -> frozenset[str]:
    return frozenset(each.name for each in fields(kind))


@dataclass(frozen=True, kw_only=True)
class ParameterCounts(Completed):
    """Parameters of a model with an adapter.

    Attributes:
        trainable: Trained ones.
        head: How many of them belong to modules trained in full, such as a classifier's head.
        total: All of the model's.
    """

    EARLIER: ClassVar[Document] = {"head": 0}

    trainable: int
    head: int
    total: int


@dataclass(frozen=True, kw_only=True)
class BestStep:
    """The step whose adapter was kept as the best of a training, and what was measured then."""

    step: int
    validation_loss: float
    validation_score: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingResult(Completed):
    """What one training took.

    Attributes:
        steps: Optimizer steps.
        seconds: Time of the steps, those before a resume included, and of nothing else.
        step_seconds: Median time of a step, the first two left out; None for fewer than three steps.
        peak_memory: Highest memory use in MiB: "host", and "gpu" where there is one.
        first_loss, last_loss: The ends of the loss curve; None where no loss was logged.
        sharded: Whether the model was split between processes.
        best: Of the adapter that was written, where that is the best of several.
        stopped_early: Whether `trainer.patience` ran out.
    """

    EARLIER: ClassVar[Document] = {"sharded": False}

    steps: int
    seconds: float
    step_seconds: float | None
    peak_memory: dict[str, float]
    first_loss: float | None = None
    last_loss: float | None = None
    sharded: bool
    best: BestStep | None = None
    stopped_early: bool = False

    @classmethod
    def completed(cls, document: Document) -> Document:
        """While a run was under way, earlier versions had the whole curve in the place of its ends."""
        losses = [point["loss"] for point in document.get("curve", ()) if "loss" in point]
        ends = {"first_loss": losses[0], "last_loss": losses[-1]} if losses else {}
        return super().completed({**ends, **document})

    @property
    def peak(self) -> float:
        """Highest memory use in MiB: the GPU's where there is one, else the process's."""
        return self.peak_memory.get("gpu", self.peak_memory["host"])


@dataclass(frozen=True, kw_only=True)
class FailedCandidate:
    """A learning rate with which no adapter was trained, and why."""

    learning_rate: float
    failed: str


@dataclass(frozen=True, kw_only=True)
class Candidate(Completed):
    """A learning rate with which an adapter was trained.

    Attributes:
        learning_rate: Its highest value.
        validation_loss: Of the trained model; None where there is nothing to choose between.
        validation_score: The task's metric, where it costs no more than the loss; it goes before the loss.
        parameters: How many there are.
        training: What the training took.
    """

    EARLIER: ClassVar[Document] = {"validation_score": None}

    learning_rate: float
    validation_loss: float | None
    validation_score: float | None
    parameters: ParameterCounts
    training: TrainingResult


@dataclass(frozen=True, kw_only=True)
class Attempt(Completed):
    """One training as it is noted while its run is under way.

    Attributes:
        result: What the run's results keep of it.
        curve: Points with step, epoch, and what was logged there; see `pica.experiments.train.training.Training`.
        samples: Answers that were given as training went on; see `pica.experiments.watching.Samples`.
    """

    result: Candidate | FailedCandidate
    curve: list[dict[str, int | float]] = field(default_factory=list[dict[str, int | float]])
    samples: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])

    @classmethod
    def completed(cls, document: Document) -> Document:
        """Earlier versions noted the result alone, with the curve and the samples inside."""
        if "result" in document:
            return document
        training = document.get("training", {})
        return {"result": document} | {name: training[name] for name in ("curve", "samples") if name in training}


@dataclass(frozen=True, kw_only=True)
class Trained(Measurement):
    """A model with a trained adapter, as read back from its file.

    Attributes:
        method: Name of the method in a recipe.
        title: Method and size in a few words.
        r: Rank, of methods that have one.
        pattern, off_diagonals: Of SVFT.
        learning_rate, parameters, validation_loss, validation_score: As the chosen candidate has them.
        training: Of the adapter that was measured.
        file_bytes: Size of its file.
        candidates: All learning rates that were tried.
        refit: Whether it was trained anew on the validation problems too once the learning rate was chosen.
    """

    method: str
    title: str
    r: int | None = None
    pattern: str | None = None
    off_diagonals: int | None = None
    learning_rate: float
    parameters: ParameterCounts
    validation_loss: float | None
    validation_score: float | None
    training: TrainingResult
    file_bytes: int
    candidates: list[Candidate | FailedCandidate]
    refit: bool = False

    @property
    def usable(self) -> list[Candidate]:
        """The candidates with which an adapter was trained."""
        return [one for one in self.candidates if isinstance(one, Candidate)]

    @classmethod
    def completed(cls, document: Document) -> Document:
        """The first versions gave no titles, and had no scores to choose a learning rate by."""
        rank = f" r={document['r']}" if "r" in document else ""
        earlier: Document = {"title": f"{document.get('method')}{rank}", "validation_score": None}
        return super().completed({**earlier, **document})


@dataclass(frozen=True, kw_only=True)
class SplitSizes:
    """Number of examples of each part of the data."""

    train: int
    validation: int
    test: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a run was: its system, the cores that it might use, torch's threads, and the accelerators by name."""

    system: str
    cores: int | None
    threads: int
    accelerators: list[str]


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """What a finished run measured: the content of metrics.json.

    Attributes:
        name: Of the recipe.
        seed: Of the training.
        model: The base model, as the recipe names it.
        task: Name of the task.
        problems: How much data there was.
        versions: Of Python and the packages that decide results, by name.
        machine: Where it was.
        processes: How many trained together.
        base: The model without an adapter, where it was measured.
        adapter: What the recipe trains.
        baseline: What it holds beside it, if anything.
        not_measured: Why a score of drawn pictures is missing, by its name.
        standing: Which of them is best, where there are several and problems to tell by.
    """

    FORMAT: ClassVar[int] = 1

    name: str
    seed: int
    model: str
    task: str
    problems: SplitSizes
    versions: dict[str, str]
    machine: Machine
    processes: int = 1
    base: Measurement | None = None
    adapter: Trained
    baseline: Trained | None = None
    not_measured: dict[str, str] = field(default_factory=dict[str, str])
    standing: StandingResult | None = None

    @property
    def trained(self) -> dict[str, Trained]:
        """The adapter, and the baseline if there is one, by these names."""
        found = {"adapter": self.adapter, "baseline": self.baseline}
        return {kind: result for kind, result in found.items() if result is not None}

    @property
    def models(self) -> dict[str, Measurement]:
        """All that were measured, by "base", "adapter" and "baseline"."""
        return ({"base": self.base} if self.base is not None else {}) | self.trained
