"""DreamBooth (Ruiz et al. 2023): a text-to-image pipeline learns one subject from a few pictures.

The loss is that of denoising pictures of the subject under the instance prompt, plus, with prior preservation, that of
denoising pictures of the subject's class under the class prompt.
"""

import contextlib
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Trainer

from pica.adapters.pipelines import TEXT_ENCODER, adapter_folders
from pica.errors import AdapterFileError, ConfigError, DataError, TargetError
from pica.experiments.adapters import attach
from pica.experiments.distributed import launched
from pica.experiments.evaluate.evaluation import Evaluation
from pica.experiments.methods import changes_base
from pica.experiments.models import load_adapter, locate
from pica.experiments.pipelines.base import HeldOut, Pipeline
from pica.experiments.pipelines.diffusion.drawing import (
    complete_class_pictures,
    draw,
    fitted,
    generator_of,
    moments,
    picture_size,
    rest,
    write_picture,
)
from pica.experiments.pipelines.diffusion.grid import picture_grid
from pica.experiments.pipelines.diffusion.loading import load_pipeline, local_folder, read_index
from pica.experiments.pipelines.diffusion.scores import SCORES, SubjectScores
from pica.experiments.pipelines.diffusion.subject import SubjectModel, latents_of
from pica.experiments.pipelines.diffusion.trainer import subject_trainer
from pica.experiments.recipes.recipe import AdapterSection, Recipe
from pica.experiments.reporting import Reporter, Silent
from pica.experiments.train.trainers import Steps
from pica.tasks import LabelledPicture
from pica.tasks.decoding import decode
from pica.tasks.dreambooth import read_folder

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Attention projections of diffusers' UNets and transformers, those of a second stream last; a model has some of them."""
FEED_FORWARD = ("net.0.proj", "net.2")
TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
GRID = "grid.png"
CLASS_PICTURES = "class-pictures"
"""Folder in the output folder for drawn pictures of the class, where the recipe names none."""


class DreamBoothPipeline(Pipeline):
    """See `Pipeline`. Learning rates are chosen by the denoising loss on validation pictures.

    Raises:
        ConfigError: The model is no pipeline that can be trained, or the metric asks for a model that is not to be had.
    """

    measured = "pictures, denoising"

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._section = recipe, recipe.dreambooth
        self._base = locate(recipe.model.path)
        read_index(local_folder(recipe.model), recipe.model.path)
        self._scores = SubjectScores(self._section.dino, self._section.clip)
        self._metric = recipe.task.metric or "r2"
        if self._metric != "r2":
            self._scores.load()
            if reason := self._scores.missing.get(self._metric):
                raise ConfigError(f"task.metric = {self._metric!r} cannot be measured: {reason}.")
        self._pictures, self._class = list[LabelledPicture](), list[LabelledPicture]()
        self._latents: dict[str, tuple[Tensor, Tensor]] = {}
        self._numbers: list[int] = []
        self._folder: Path | None = None
        self._reporter: Reporter = Silent()

    def load_base(self) -> Any:
        """See `Pipeline.load_base`."""
        pipeline, family = load_pipeline(self._recipe.model)
        return self._subject(pipeline, family, {family.component: pipeline.components[family.component]})

    def adapt(self, section: AdapterSection, *, seed: int) -> Any:
        """See `Pipeline.adapt`; without targets the denoiser's attention projections are adapted."""
        pipeline, family = load_pipeline(self._recipe.model)
        denoiser = pipeline.components[family.component]
        targets = section.target_modules or self._default_targets(denoiser)
        chosen = dataclasses.replace(section, target_modules=targets)
        parts: dict[str, nn.Module] = {family.component: attach(denoiser, chosen, seed=seed, task_type=None)}
        if self._section.train_text_encoder:
            if getattr(pipeline, TEXT_ENCODER, None) is None:
                raise TargetError("dreambooth.train_text_encoder: this pipeline has no text encoder; leave it out.")
            text = dataclasses.replace(
                section,
                target_modules=list(TEXT_ATTENTION),
                exclude_modules=None,
                layers_to_transform=None,
                rank_pattern={},
            )
            parts[TEXT_ENCODER] = attach(pipeline.text_encoder, text, seed=seed, task_type=None)
        model = self._subject(pipeline, family, parts)
        for part in model.peft_models().values():
            part.peft_config["default"].base_model_name_or_path = self._base
        return model

    def read(self, folder: Path) -> Any:
        """See `Pipeline.read`."""
        pipeline, family = load_pipeline(self._recipe.model)
        parts: dict[str, nn.Module] = {}
        for name, place in adapter_folders(folder).items():
            target = name or family.component
            if (model := pipeline.components.get(target)) is None:
                raise AdapterFileError(f"{str(place)!r} belongs to a {target}, which the pipeline has not.")
            parts[target] = load_adapter(model, place)
        return self._subject(pipeline, family, parts)

    def encode(self, examples: Sequence[LabelledPicture]) -> datasets.Dataset:
        """Numbers of a picture of the subject and of one of its class; each of the larger set comes once an epoch.

        Args:
            examples: The pictures.
        Returns:
            Columns `picture` and `prior`.
        Raises:
            ConfigError: There are several processes.
        """
        if launched():
            raise ConfigError(f"Task {self._recipe.task.name} trains in one process; start it without a launcher.")
        begin = len(self._pictures)
        self._pictures.extend(examples)
        count = self._section.class_count if self._with_prior else 0
        rows = range(max(len(examples), count))
        numbers = {"picture": [begin + row % len(examples) for row in rows]}
        return datasets.Dataset.from_dict(numbers | {"prior": [row % max(count, 1) for row in rows]})

    def prepare(self, model: Any, folder: Path, reporter: Reporter) -> None:
        """See `Pipeline.prepare`: draws what is missing of the class, and encodes all pictures."""
        self._folder, self._reporter = folder, reporter
        if model is not None:
            self._ready(model)

    def trainer(self, model: Any, rows: datasets.Dataset, steps: Steps) -> Trainer:
        """transformers' `Trainer` on latents and texts that are encoded once; see `SubjectTrainer`."""
        self._ready(model)
        return subject_trainer(
            model,
            rows,
            steps,
            collate=self._collate,
        )

    def evaluate(
        self, model: Any, examples: Sequence[LabelledPicture], *, reporter: Reporter, label: str
    ) -> Evaluation:
        """The denoising loss at fixed noise, pictures drawn from fixed noise, and their scores."""
        section = self._section
        wanted = [prompt for prompt in self._validation_prompts() for _ in range(section.validation_pictures)]
        with reporter.bar(label, len(examples) * section.noise_levels + len(wanted)) as advance:
            errors, powers = self._losses(model, examples, advance)
            numbers = [index % max(section.validation_pictures, 1) for index in range(len(wanted))]
            generators = [generator_of(self._recipe.data.seed, "validation", number) for number in numbers]
            drawn = draw(model.pipeline, wanted, generators, section, size=model.picture_size, advance=advance)
            rest(model.pipeline, model.family.component)
        explained = [1 - one.sum().item() / other.sum().item() for one, other in zip(errors, powers)]
        scores = {"r2": explained}
        if drawn:
            scores |= self._scores.measure(drawn, wanted, [self._decoded(example) for example in examples])
        else:
            self._scores.missing |= dict.fromkeys(SCORES, "dreambooth.validation_pictures is 0")
        means = {name: statistics.fmean(values) for name, values in scores.items()}
        chosen = scores[self._metric]
        stderr = statistics.stdev(chosen) / len(chosen) ** 0.5 if len(chosen) > 1 else 0.0
        rows: list[dict[str, Any]] = [
            {"picture": example.place, "loss": error.mean().item(), "r2": r2}
            for example, error, r2 in zip(examples, errors, explained)
        ]
        files: dict[str, Any] = {}
        for index, (prompt, number, picture) in enumerate(zip(wanted, numbers, drawn)):
            file = f"{index // section.validation_pictures:02d}-{number:02d}.png"
            files[file] = picture
            row = {name: values[index] for name, values in scores.items() if name != "r2"}
            rows.append({"prompt": prompt, "number": number, "file": file, **row})
        loss = errors.mean().item()
        return Evaluation(
            self._metric, means[self._metric], stderr, means, loss, len(examples), None, rows, pictures=files
        )

    def held_out(self, model: Any, examples: Sequence[LabelledPicture]) -> HeldOut:
        """The denoising loss at fixed noise."""
        errors, _ = self._losses(model, examples, lambda count: None)
        return HeldOut(errors.mean().item())

    def finish(self, folder: Path, examples: Sequence[LabelledPicture], titles: Mapping[str, str]) -> Mapping[str, str]:
        """See `Pipeline.finish`: puts the drawn pictures side by side in one file."""
        number = self._section.validation_pictures
        labels = [prompt for prompt in self._validation_prompts() for _ in range(number)]
        columns: dict[str, list[Image.Image]] = {}
        for name, title in titles.items():
            files = sorted((folder / name).glob("*.png"))
            if len(files) == len(labels) > 0:
                columns[title] = [_read(file) for file in files]
        if columns:
            subject = [fitted(self._decoded(example), 256) for example in examples]
            write_picture(folder / GRID, picture_grid(columns, labels, subject))
        return dict(self._scores.missing)

    @property
    def _with_prior(self) -> bool:
        return self._section.class_prompt is not None

    def _prompts(self) -> list[str]:
        return [prompt for prompt in (self._section.instance_prompt, self._section.class_prompt) if prompt is not None]

    def _validation_prompts(self) -> list[str]:
        return self._section.validation_prompts or [self._section.instance_prompt or ""]

    def _subject(self, pipeline: Any, family: Any, parts: dict[str, nn.Module]) -> SubjectModel:
        size = picture_size(pipeline, family.component, self._section)
        return SubjectModel(pipeline, family, parts, picture_size=size)

    def _default_targets(self, denoiser: nn.Module) -> list[str]:
        wanted = (*ATTENTION, *FEED_FORWARD) if self._section.feed_forward else ATTENTION
        linear = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
        return [end for end in wanted if any(name.endswith(f".{end}") for name in linear)]

    def _ready(self, model: SubjectModel) -> None:
        """Have every picture and text that training needs, encoded."""
        if self._with_prior and not self._class:
            self._class = self._class_pictures(model)
        self._encode(model, [*self._pictures, *self._class])
        self._numbers = model.know(self._prompts())

    def _class_pictures(self, model: SubjectModel) -> list[LabelledPicture]:
        named = self._section.class_pictures
        if named is None and self._folder is None:
            raise ConfigError("dreambooth.class_pictures is not set, and there is no output folder to draw them into.")
        folder = Path(named).expanduser() if named else self._folder / CLASS_PICTURES  # pyright: ignore[reportOptionalOperand]
        chosen = self.load_base() if changes_base(self._recipe.adapter) else model
        without = chosen.disable_adapter() if chosen is model else contextlib.nullcontext()
        with without:
            complete_class_pictures(
                chosen.pipeline,
                folder,
                self._section,
                size=model.picture_size,
                seed=self._recipe.data.seed,
                reporter=self._reporter,
            )
        rest(chosen.pipeline, model.family.component)
        found = read_folder(str(folder), skip=self._recipe.data.skip_unreadable)
        if len(found) < self._section.class_count:
            raise DataError(
                f"{str(folder)!r} has {len(found)} usable pictures of {self._section.class_count}: remove those that cannot "
                "be read, so that others are drawn, or set dreambooth.class_count lower."
            )
        return found[: self._section.class_count]

    def _encode(self, model: SubjectModel, examples: Sequence[LabelledPicture]) -> None:
        """Keep the latents of pictures that have none yet."""
        new = list({example.place: example for example in examples if example.place not in self._latents}.values())
        if not new:
            return
        with self._reporter.bar("Encoding pictures", len(new)) as advance:
            for start in range(0, len(new), self._section.draw_batch_size):
                batch = new[start : start + self._section.draw_batch_size]
                found = moments(model.pipeline, [self._decoded(example) for example in batch], model.picture_size)
                for example, mean, deviation in zip(batch, *found):
                    self._latents[example.place] = mean, deviation
                advance(len(batch))
        rest(model.pipeline, model.family.component)

    def _decoded(self, example: LabelledPicture) -> Any:
        try:
            return decode(example.read())
        except OSError as error:
            raise DataError(f"{example.place}: the picture can no longer be read ({error}).") from error

    def _collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pictures of the subject, then of the class; `mean` and `deviation` (count, channels, height, width)."""
        chosen = [self._pictures[row["picture"]] for row in rows]
        weights = [1 / len(rows)] * len(rows)
        prompts = [self._numbers[0]] * len(rows)
        if self._with_prior:
            chosen += [self._class[row["prior"]] for row in rows]
            weights += [self._section.prior_weight / len(rows)] * len(rows)
            prompts += [self._numbers[-1]] * len(rows)
        means, deviations = zip(*(self._latents[example.place] for example in chosen))
        return {
            "mean": torch.stack(means),
            "deviation": torch.stack(deviations),
            "prompt": torch.tensor(prompts),
            "weight": torch.tensor(weights),
        }

    @torch.no_grad()
    def _losses(self, model: SubjectModel, examples: Sequence[LabelledPicture], advance: Any) -> tuple[Tensor, Tensor]:
        """Mean squares of errors and of targets, each (pictures, levels), float32 on the CPU."""
        model.eval()
        self._encode(model, examples)
        levels, device = self._section.noise_levels, model.device
        [prompt] = model.know([self._section.instance_prompt or ""])
        pairs = [(index, number) for index in range(len(examples)) for number in range(levels)]
        errors, powers = [], []
        for start in range(0, len(pairs), self._section.draw_batch_size):
            batch = pairs[start : start + self._section.draw_batch_size]
            latents, noise = [], []
            for index, number in batch:
                mean, deviation = self._latents[examples[index].place]
                generator = generator_of(self._recipe.data.seed, "loss", index, number)
                latents.append(
                    latents_of(model.pipeline, mean, deviation, torch.randn(mean.shape, generator=generator))
                )
                noise.append(torch.randn(mean.shape, generator=generator))
            level = torch.tensor([int((number + 0.5) / levels * model.process.levels) for _, number in batch])
            outputs = model(
                torch.stack(latents).to(device),
                torch.stack(noise).to(device),
                level.to(device),
                torch.full((len(batch),), prompt, device=device),
            )
            errors.append(outputs["errors"].cpu())
            powers.append(outputs["powers"].cpu())
            advance(len(batch))
        return torch.cat(errors).view(-1, levels), torch.cat(powers).view(-1, levels)


def _read(file: Path) -> Image.Image:
    with Image.open(file) as opened:
        return opened.convert("RGB")
