# pyright: strict
"""What `pica analyze` found: the content of analysis.json."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_serializer

from pica.experiments.results.documents import Document, Number
from pica.experiments.results.screening import Screen
from pica.theory import INTRUDER_THRESHOLD, INTRUDER_TOP

ANALYSIS = "analysis.json"
"""File in an analysis's folder with its `AnalysisResult`; the last that it writes."""


@dataclass(frozen=True)
class Settings:
    """What is analysed and how. `base` and `tuned` are locations as given.

    Attributes:
        rank: r of angles, Lemma 3.1 and Theorem 1; layers with fewer directions use all they have.
        only: Regular expression; analyse only the layers whose path it is found in.
        threshold, top: Of intruder dimensions.
        seed: Of the random directions that everything is compared with.
    """

    base: str
    tuned: str | None = None
    rank: int = 32
    only: str | None = None
    threshold: float = INTRUDER_THRESHOLD
    top: int = INTRUDER_TOP
    seed: int = 0

    @model_serializer
    def _all(self) -> Document:
        """What was left as it is by default was analysed so all the same."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class NearZero:
    """Share of the entries of E_P and E_Q below `threshold`; both are None for a base model alone.

    Attributes:
        threshold: In magnitude.
        measured: Of this pair of models.
        unrelated: Of weights of the same shapes that have nothing to do with each other.
    """

    threshold: float
    measured: float | None
    unrelated: float | None


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A rank for each role.

    Attributes:
        share: What was asked for.
        source: "update": share of the fine-tune's update in the column space. "spectrum": share of the base weight's
            squared singular values, the reviewers' proposal; it knows nothing of any task.
        ranks: By role; for "update" None where even all min(out, in) directions do not hold the share.
        limits: Most directions that the role's layers have.
    """

    share: float
    source: Literal["update", "spectrum"]
    ranks: dict[str, int | None]
    limits: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class RoleSummary:
    """What a role's layers have in common; shares are pooled: captured energy of all layers over all energy.

    Where none of them changed, or there is no fine-tuned model, what is of an update is None.

    Attributes:
        role, layers, out, inn: Name, number of (changed) layers, shape of the first.
        base_effective_rank, base_stable_rank: Means over the base weights.
        rank: r of everything below.
        relative: ||dW||_F / ||W0||_F over all layers.
        column, row, minor, random, best: Share of the update's energy in the top-r column space, top-r row space, the last r
            directions of the column space, r seeded random directions, and the update's own best r (Eckart and Young).
        chance, row_chance: r / in and r / out, the expectations for random spaces of the input and the output.
        angle, largest_angle: Principal angles of the top-r column spaces before and after, in degrees: their mean, and the
            largest in any layer.
        intruders: Mean number among the leading directions of the input.
        update_effective_rank, update_stable_rank: Means.
        residual_over_optimum: Theorem 1: sum of residuals over sum of optima; None where the optimum is zero.
        wedin_informative: Share of all ranks of all layers at which Lemma 3.1 excludes anything (its bound is below 1).
    """

    role: str
    layers: int
    out: int
    inn: int
    base_effective_rank: Number
    base_stable_rank: Number
    rank: int | None
    relative: float | None
    column: float | None
    chance: float | None
    random: float | None
    row: float | None
    row_chance: float | None
    minor: float | None
    best: float | None
    angle: float | None
    largest_angle: float | None
    intruders: float | None
    update_effective_rank: float | None
    update_stable_rank: float | None
    residual_over_optimum: float | None
    wedin_informative: float | None


@dataclass(frozen=True, kw_only=True)
class RoleCurves:
    """Shares of a role's update in the first `r` directions, pooled over its layers, one a rank; see `RoleSummary`."""

    r: list[int]
    column: list[float]
    row: list[float]
    minor: list[float]
    random: list[float]
    best: list[float]


@dataclass(frozen=True, kw_only=True)
class RoleResult(RoleSummary):
    """A role with its curves, where some of its layers changed."""

    curves: RoleCurves | None = None


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """A layer: of a base model alone, or one that did not change.

    Attributes:
        path, role, index: Module path; the path without indices; its first index (None where it has none).
        out, inn: Shape; `inn` is "in" in the file.
        norm: ||W0||_F.
        effective_rank, stable_rank: Of W0.
    """

    path: str
    role: str
    index: int | None
    out: int
    inn: Annotated[int, Field(alias="in")]
    norm: Number
    effective_rank: Number
    stable_rank: Number


@dataclass(frozen=True, kw_only=True)
class ChangedLayerResult(LayerResult):
    """A layer that changed: what `RoleSummary` and the paper's statements say, of this one alone.

    Attributes:
        column, random, row, minor, best, chance, row_chance: As of a role.
        relative: ||dW||_F / ||W0||_F; None where W0 is zero.
        rank: r.
        update_effective_rank, update_stable_rank: Of dW.
        sine_in, sine_out, gap, wedin_bound: Lemma 3.1; see `pica.theory.WedinBound`. None: the bound is infinite.
        residual, optimum, misplaced, epsilon, theorem1_bound: Theorem 1; see `pica.theory.ProjectionError`.
        angle_mean_in, angle_max_in, angle_mean_out, angle_max_out: Principal angles in degrees, of either side.
        intruders_in, intruders_out: Number among the leading directions.
    """

    column: float
    random: float
    row: float
    minor: float
    best: float
    relative: float | None
    rank: int
    chance: float
    row_chance: float
    update_effective_rank: Number
    update_stable_rank: Number
    sine_in: Number
    sine_out: Number
    gap: Number
    wedin_bound: float | None
    residual: Number
    optimum: Number
    misplaced: Number
    epsilon: Number
    theorem1_bound: Number
    angle_mean_in: Number
    angle_max_in: Number
    intruders_in: int
    angle_mean_out: Number
    angle_max_out: Number
    intruders_out: int


@dataclass(frozen=True, kw_only=True)
class AnalysisResult:
    """The content of analysis.json.

    Attributes:
        settings: What was analysed and how.
        versions: Of Python and the packages that decide results, by name.
        notes: What a reader should know.
        verdict: What holds of the paper's claims, one sentence each.
        confined: Why shares of the column space are no finding, if so.
        near_zero_entries: Of E_P and E_Q (Figure 2 of the paper).
        suggestion: Where ranks were asked for.
        roles: In the model's order.
        layers: In the model's order.
        screen: Of bases, where that was asked for.
    """

    FORMAT: ClassVar[int] = 1

    settings: Settings
    versions: dict[str, str]
    notes: list[str]
    verdict: list[str]
    confined: str | None
    near_zero_entries: NearZero
    suggestion: Suggestion | None
    roles: list[RoleResult]
    layers: Sequence[ChangedLayerResult | LayerResult]
    screen: Screen | None = None
