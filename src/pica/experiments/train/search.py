"""One adapter of a run: trained with each learning rate, the best kept and measured as read back from its file."""

import logging
import math
import shutil
from collections.abc import Sequence

import peft

from pica.errors import TrainingError
from pica.experiments import distributed
from pica.experiments.adapters import parameter_counts, size_of, title_of
from pica.experiments.models import device
from pica.experiments.recipes.recipe import AdapterSection
from pica.experiments.results.run import Attempt, Candidate, FailedCandidate, Trained
from pica.experiments.standings import predictions_file
from pica.experiments.train.setting import Setting, attempt_name, refit_name
from pica.experiments.train.training import Training, train
from pica.files import output as files

logger = logging.getLogger(__name__)


def preference(candidate: Candidate) -> tuple[float, float]:
    """Order trained candidates, the best first: by validation score where the task has a cheap one, else by loss.

    A value that is no number (None, once it is noted) comes last: compared as it is, it would win or lose by its place in
    the list.

    Args:
        candidate: One of them.
    Returns:
        What to sort by.
    """
    score, loss = candidate.validation_score, candidate.validation_loss
    return (
        math.inf if score is None or math.isnan(score) else -score,
        math.inf if loss is None or math.isnan(loss) else loss,
    )


class Search:
    """Finds the learning rate of one adapter."""

    def __init__(self, setting: Setting, name: str, section: AdapterSection) -> None:
        """Args: setting: of the run; name: "adapter" or "baseline"; section: what is trained."""
        self._setting, self._name, self._section, self._title = setting, name, section, title_of(section)
        self._phases, self._reporter = setting.phases, setting.reporter

    def fit(self, rates: Sequence[float], model: peft.PeftModel | None) -> Trained:
        """Train with each rate, keep the best on the validation problems, and measure it as read back from its file.

        Args:
            rates: One or more.
            model: What to train with the first of them, if it has been made already.
        Returns:
            What was measured.
        Raises:
            TrainingError: None of them trained.
        """
        name = self._name
        if name in self._phases:
            return self._phases.read(name, Trained)
        everything = self._setting.recipe.data.refit and len(rates) == 1  # nothing to choose: at once on all
        candidates = []
        for rate in rates:
            key = attempt_name(name, rate)
            if key not in self._phases:
                try:
                    label = f"{self._title}, rate {rate:g}"
                    self._try(key, rate, model or self._setting.adapted(self._section), label, everything=everything)
                except TrainingError as error:
                    if len(rates) == 1:
                        raise
                    logger.warning("Learning rate %g is out: %s", rate, error)
                    failed = Attempt(result=FailedCandidate(learning_rate=rate, failed=str(error)))
                    self._phases.done(key, lambda: failed, Attempt)  # noqa: B023 - called at once
                model = None
            candidates.append(self._phases.read(key, Attempt).result)
        usable = [candidate for candidate in candidates if isinstance(candidate, Candidate)]
        if not usable:
            raise TrainingError(f"None of the learning rates {list(rates)} trained; add lower ones.")
        best = min(usable, key=preference)
        if len(rates) > 1:
            quality = "lowest validation loss" if best.validation_score is None else "best validation score"
            self._reporter.say(f"{self._title}: learning rate {best.learning_rate:g} has the {quality}")
        key, final = attempt_name(name, best.learning_rate), best
        if refit := self._setting.recipe.data.refit and len(rates) > 1:
            key = refit_name(name)
            if key not in self._phases:
                label = f"{self._title}, rate {best.learning_rate:g}, validation problems too"
                self._try(key, best.learning_rate, self._setting.adapted(self._section), label, everything=True)
            again = self._phases.read(key, Attempt).result
            assert isinstance(again, Candidate)
            final = again
        return self._phases.done(name, lambda: self._measure(key, candidates, best, final, refit=refit), Trained)

    def _measure(
        self,
        key: str,
        candidates: list[Candidate | FailedCandidate],
        best: Candidate,
        final: Candidate,
        *,
        refit: bool,
    ) -> Trained:
        """Measure the adapter of `key` as read back from its file, and put it where it belongs."""
        setting, section = self._setting, self._section
        written = setting.checkpoints / key / "adapter"
        found = setting.evaluate(setting.read(written), f"{self._title}: answering")
        if not math.isfinite(found.loss):
            self._discard(key)
            raise TrainingError(
                f"{self._title}: the trained model's loss on the test problems is {found.loss}, so no adapter was written; "
                "lower the learning rate."
            )
        setting.report(self._title, found, predictions_file(self._name, section.method))
        with files.atomic_folder(setting.folder / self._name) as partial:
            shutil.copytree(written, partial, dirs_exist_ok=True)
            setting.pipeline.accompany(partial)
        return Trained(
            **vars(found.measurement()),
            method=section.method,
            title=self._title,
            **size_of(section),
            learning_rate=best.learning_rate,
            parameters=best.parameters,
            validation_loss=best.validation_loss,
            validation_score=best.validation_score,
            training=final.training,
            file_bytes=(written / "adapter_model.safetensors").stat().st_size,
            candidates=candidates,
            refit=refit,
        )

    def _try(self, key: str, rate: float, model: peft.PeftModel, label: str, *, everything: bool) -> None:
        """One full training; with `everything` on the validation problems too, which then measure nothing."""
        setting, splits = self._setting, self._setting.splits
        pipeline, place, whole = setting.pipeline, setting.checkpoints / key, parameter_counts(model)
        training = train(
            model,
            pipeline,
            pipeline.encode([*splits.train, *splits.validation]) if everything else setting.rows,
            setting.recipe.trainer,
            learning_rate=rate,
            checkpoints=place,
            adapter=place / "adapter",
            reporter=self._reporter,
            label=label,
            watch=setting.watch(key, rate, everything=everything),
        )
        measures, took = splits.validation and not everything, training.result
        if said := ended(training):
            self._reporter.say(f"{label}: {said}")

        def result() -> Candidate | FailedCandidate:
            loss = score = None
            if took.best:  # it has been measured, and the model in memory has gone on since
                loss, score = took.best.validation_loss, took.best.validation_score
            elif measures:
                trained = setting.read(place / "adapter").to(device()) if took.sharded else model
                found = pipeline.held_out(trained, splits.validation)
                if not math.isfinite(found.loss):
                    shutil.rmtree(place / "adapter", ignore_errors=True)
                    reason = f"its loss on the validation problems is {found.loss}; lower the learning rate."
                    return FailedCandidate(learning_rate=rate, failed=reason)
                loss, score = found.loss, found.score
            return Candidate(
                learning_rate=rate,
                validation_loss=loss,
                validation_score=score,
                parameters=whole if took.sharded else parameter_counts(model),
                training=took,
            )

        def attempt() -> Attempt:
            made = result()
            if isinstance(made, FailedCandidate):
                return Attempt(result=made)
            return Attempt(result=made, curve=training.curve, samples=training.samples)

        noted = self._phases.done(key, attempt, Attempt).result
        if isinstance(noted, FailedCandidate):
            raise TrainingError(f"{label}: {noted.failed}")
        if distributed.leads():
            for left in (*place.glob("checkpoint-*"), *place.glob("best-*")):
                shutil.rmtree(left, ignore_errors=True)

    def _discard(self, key: str) -> None:
        """Forget a training whose adapter is of no use."""
        self._phases.forget(key)
        shutil.rmtree(self._setting.checkpoints / key, ignore_errors=True)


def ended(training: Training) -> str:
    """Which adapter a training has written and why it ended, where that is not the last step's and the end."""
    took = training.result
    said = [f"stopped at step {took.steps}, where trainer.patience ran out"] if took.stopped_early else []
    if took.best:
        said.append(f"kept that of step {took.best.step}, held-out loss {took.best.validation_loss:.4f}")
    return "; ".join(said)
