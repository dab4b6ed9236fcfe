"""DreamBooth end to end: what is trained, drawn, measured, stored, gone on with, merged and exported."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

import pica
from pica.cli import main
from pica.errors import BasisMismatchError, ConfigError, DataError, TargetError
from pica.experiments.adapters import peft_config
from pica.experiments.data import load_splits
from pica.experiments.evaluate.assessing import Request, assess
from pica.experiments.interrupts import Interrupted
from pica.experiments.merge.merging import merge
from pica.experiments.pipelines import make_pipeline
from pica.experiments.pipelines.diffusion.drawing import generator_of
from pica.experiments.pipelines.diffusion.families import Flow, Variance
from pica.experiments.recipes.parsing import builtin_recipes, load_recipe
from pica.experiments.recipes.recipe import Recipe
from pica.experiments.reporting import Silent
from pica.experiments.results.run import SplitSizes
from pica.experiments.train.run import resume, start
from pica.experiments.train.training import save_adapter
from pica.report.pictures_page import write_picture_page
from pica.tasks import get_task
from pica.tasks.base import Source
from tests import results
from tests.experiments.tiny_diffusion import WIDTH, WRITERS, write_subject
from tests.experiments.train.test_run import Recorder


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = WRITERS[kind](tmp_path_factory.mktemp(kind) / "pipeline")
        return made[kind]

    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_subject(tmp_path_factory.mktemp("subject"))


@pytest.fixture
def recipe(pipelines: Callable[[str], Path], pictures: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """A quick recipe; keyword arguments with "__" for the dot override its fields."""

    def make(kind: str = "sd", **overrides: object) -> Recipe:
        quick = {
            "output": str(tmp_path / "out"),
            "evaluate_base": False,
            "model.path": str(pipelines(kind)),
            "data.train": str(pictures),
            "task.name": "dreambooth",
            "dreambooth.instance_prompt": "a sks disc",
            "dreambooth.validation_pictures": 1,
            "dreambooth.inference_steps": 2,
            "dreambooth.noise_levels": 4,
            "adapter.r": 4,
            "trainer.max_steps": 4,
            "trainer.batch_size": 2,
            "trainer.log_steps": 2,
            "trainer.learning_rate": 0.05,
        }
        quick |= {key.replace("__", "."): value for key, value in overrides.items()}
        return load_recipe(None, list(quick.items()))

    return make


def drawn(pipeline: Any) -> torch.Tensor:
    """A picture with values from 0 to 1, always from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        ["a sks disc"],
        num_inference_steps=2,
        height=WIDTH,
        width=WIDTH,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    )
    return made.images


def plain(folder: Path) -> Any:
    """The pipeline as a user of diffusers reads it."""
    index = json.loads((folder / "model_index.json").read_text())
    absent: dict[str, Any] = {}
    if index["_class_name"] == "StableDiffusion3Pipeline":
        absent = {"text_encoder_3": None, "tokenizer_3": None}
    return DiffusionPipeline.from_pretrained(folder, **absent)


# Training, and all that others need of it


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (
            "sd",
            {
                "dreambooth__train_text_encoder": True,
                "dreambooth__class_prompt": "a disc",
                "dreambooth__class_count": 3,
            },
        ),
        pytest.param("sdxl", {}, marks=pytest.mark.slow),
        ("sd3", {"dreambooth__feed_forward": True}),
    ],
)
def test_a_subject_is_learnt_loaded_fused_merged_and_exported(
    recipe: Callable[..., Recipe], tmp_path: Path, pipelines: Callable[[str], Path], kind: str, more: dict[str, Any]
):
    """The same picture five ways: in the run, with pica in a pipeline, fused, merged, and as a LoRA without pica."""
    metrics = start(recipe(kind, evaluate_base=True, trainer__max_steps=12, **more), reporter=Silent()).metrics
    out = tmp_path / "out"
    results.check_file("metrics", tmp_path / "out" / "metrics.json")
    assert metrics.adapter.loss < metrics.models["base"].loss
    assert metrics.adapter.scores["r2"] > metrics.models["base"].scores["r2"]
    with Image.open(out / "grid.png") as grid:
        assert grid.size[0] > 2 * WIDTH

    base = plain(pipelines(kind))
    before = drawn(base)
    parts = pica.load_into_pipeline(base, out / "adapter")
    denoiser = "transformer" if kind == "sd3" else "unet"
    assert parts == ((denoiser, "text_encoder") if more.get("dreambooth__train_text_encoder") else (denoiser,))
    wanted = drawn(base)
    assert (wanted - before).abs().max() > 1e-3
    base.fuse_lora(components=list(parts))
    torch.testing.assert_close(drawn(base), wanted, atol=1e-4, rtol=0)
    base.unfuse_lora(components=list(parts))
    base.disable_lora()
    assert torch.equal(drawn(base), before)

    merged = merge(out / "adapter", tmp_path / "merged")
    torch.testing.assert_close(drawn(plain(merged)), wanted, atol=1e-4, rtol=0)

    done = pica.export_lora(out / "adapter", tmp_path / "lora", engine="diffusers")
    assert done.command == f"pipeline.load_lora_weights({str(tmp_path / 'lora')!r})"
    assert done.max_logit_difference is not None
    other = plain(pipelines(kind))
    other.load_lora_weights(str(tmp_path / "lora"))
    torch.testing.assert_close(drawn(other), wanted, atol=1e-4, rtol=0)
    prefixes = {name.partition(".")[0] for name in load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")}
    assert prefixes == set(parts)

    again = assess(Request(str(out)), reporter=Silent())
    assert again.result.loss == metrics.adapter.loss


def test_resumed_run_equals_one_that_was_left_alone(recipe: Callable[..., Recipe], tmp_path: Path):
    settings = {
        "dreambooth__class_prompt": "a disc",
        "dreambooth__class_count": 3,
        "dreambooth__train_text_encoder": True,
    }
    whole = start(recipe(output=str(tmp_path / "whole"), **settings), reporter=Silent())
    with pytest.raises(Interrupted) as stopped:
        start(recipe(**settings), reporter=Recorder(interrupt_in="rate 0.05"))
    assert stopped.value.checkpoint is not None
    resumed = resume(tmp_path / "out", reporter=Silent())
    for part in (Path(), Path("text_encoder")):
        files = [run.output / "adapter" / part / "adapter_model.safetensors" for run in (whole, resumed)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert resumed.metrics.adapter.loss == whole.metrics.adapter.loss
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_another_seed_trains_another_adapter_and_is_measured_on_the_same_noise(
    recipe: Callable[..., Recipe], tmp_path: Path
):
    runs = [
        start(recipe(output=str(tmp_path / str(seed)), evaluate_base=True, trainer__seed=seed), reporter=Silent())
        for seed in (0, 1)
    ]
    assert runs[0].metrics.models["base"].loss == runs[1].metrics.models["base"].loss
    assert runs[0].metrics.adapter.loss != runs[1].metrics.adapter.loss
    pictures = [(run.output / "pictures-base" / "00-00.png").read_bytes() for run in runs]
    assert pictures[0] == pictures[1]


def test_rivals_are_trained_beside_and_a_learning_rate_is_chosen(recipe: Callable[..., Recipe], tmp_path: Path):
    made = recipe(
        evaluate_base=True,
        trainer__learning_rates=[1e-5, 0.05],
        baseline__method="lora",
        baseline__learning_rates=[0.02],
        trainer__eval_steps=3,
    )
    metrics = start(made, reporter=Silent()).metrics
    assert metrics.problems == SplitSizes(train=2, validation=1, test=2)
    losses = {c.learning_rate: c.validation_loss or 0.0 for c in metrics.adapter.usable}
    assert metrics.adapter.learning_rate == min(losses, key=losses.__getitem__)
    assert metrics.trained["baseline"].loss != metrics.adapter.loss
    folders = {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("pictures")}
    assert folders == {"pictures-base", "pictures-adapter", "pictures-baseline-lora"}
    rows = list(csv.DictReader((tmp_path / "out" / "loss_curve.csv").open()))
    assert {row["run"] for row in rows} == {"adapter", "baseline"}
    assert set(rows[0]) >= {"step", "loss", "learning_rate", "grad_norm"}
    assert [row["step"] for row in rows if row["validation_loss"]] == 3 * ["3", "4"]
    write_picture_page(tmp_path / "out")  # with steps that have no training loss


# What is trained


def test_the_default_targets_are_the_attention_projections(recipe: Callable[..., Recipe]):
    def names(made: Recipe) -> set[str]:
        model = make_pipeline(made).adapt(made.adapter, seed=0)
        return {row.pattern for row in pica.coverage(model).rows}

    attention = {"to_q", "to_k", "to_v", "to_out.0"}
    assert names(recipe()) == attention
    assert names(recipe(dreambooth__feed_forward=True)) == attention | {"net.0.proj", "net.2"}
    streams = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"}
    assert names(recipe("sd3")) == attention | streams
    assert names(recipe(adapter__target_modules=["to_q"])) == {"to_q"}


def test_a_target_that_is_not_there_is_refused(recipe: Callable[..., Recipe]):
    made = recipe(adapter__target_modules=["to_q", "q_proj"])
    with pytest.raises(TargetError, match="q_proj"):
        start(made, reporter=Silent())


def test_the_loss_weighs_subject_and_class(recipe: Callable[..., Recipe], tmp_path: Path):
    """As the paper of DreamBooth has it: the mean over the subject's pictures plus a weight times that over the class's."""
    made = recipe(dreambooth__class_prompt="a disc", dreambooth__class_count=3, dreambooth__prior_weight=0.25)
    pipeline: Any = make_pipeline(made)
    examples = get_task("dreambooth").load("train", Source(str(made.data.train)))
    rows = pipeline.encode(examples)
    model = pipeline.adapt(made.adapter, seed=0)
    pipeline.prepare(model, tmp_path, Silent())
    assert [path.name for path in sorted((tmp_path / "class-pictures").iterdir())] == [
        f"generated-00000{number}.png" for number in range(3)
    ]
    model.know(["a sks disc", "a disc"])
    batch = pipeline._collate([rows[0], rows[1]])
    assert batch["prompt"].tolist() == [0, 0, 1, 1]
    noise, level = torch.randn(batch["mean"].shape), torch.tensor([10, 200, 500, 900])
    with torch.no_grad():
        found = model(batch["mean"], noise, level, batch["prompt"], batch["weight"])
    expected = found["errors"][:2].mean() + 0.25 * found["errors"][2:].mean()
    torch.testing.assert_close(found["loss"], expected)


def test_gradients_reach_the_adapters_and_nothing_else(recipe: Callable[..., Recipe]):
    made = recipe(dreambooth__train_text_encoder=True, adapter__options={"init_weights": False})
    model: Any = make_pipeline(made).adapt(made.adapter, seed=0)
    model.know(["a sks disc"])
    shape = (2, 4, WIDTH // 2, WIDTH // 2)
    model(torch.randn(shape), torch.randn(shape), torch.tensor([3, 700]), torch.tensor([0, 0]))["loss"].backward()
    for part in model.peft_models().values():
        trained = [parameter for parameter in part.parameters() if parameter.requires_grad]
        assert trained
        assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in trained)
    assert all(parameter.grad is None for parameter in model.pipeline.vae.parameters())


# Noise, targets and seeds


def test_variance_process_follows_its_formula_in_float64():
    def scheduler(kind: str) -> Any:
        return DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=kind,  # pyright: ignore[reportArgumentType]
        ).config

    latents, noise = torch.randn(3, 4, 5, 5, dtype=torch.float64), torch.randn(3, 4, 5, 5, dtype=torch.float64)
    level = torch.tensor([0, 499, 999])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - betas).cumprod(0)[level].view(3, 1, 1, 1)
    wanted = {
        "epsilon": noise,
        "v_prediction": kept.sqrt() * noise - (1 - kept).sqrt() * latents,
        "sample": latents,
    }
    for kind, target in wanted.items():
        process = Variance(scheduler(kind))
        noisy, found = process.noised(latents, noise, level)
        torch.testing.assert_close(noisy, kept.sqrt() * latents + (1 - kept).sqrt() * noise, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found, target, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="score"):
        Variance(scheduler("score"))


def test_flow_follows_its_formula_and_draws_middle_levels_most():
    process = Flow(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    latents, noise = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    level = torch.tensor([0, 700])
    plain_share = 1 - level / 1000
    sigma = (3 * plain_share / (1 + 2 * plain_share)).view(2, 1, 1, 1)
    noisy, target = process.noised(latents, noise, level)
    torch.testing.assert_close(noisy, (1 - sigma) * latents + sigma * noise, atol=1e-5, rtol=0)
    torch.testing.assert_close(target, noise - latents)
    torch.testing.assert_close(process.timesteps(level), 1000 * sigma.flatten(), atol=1e-2, rtol=0)
    levels = process.draw(4000, torch.Generator().manual_seed(0)).double()
    assert 470 < levels.mean() < 530
    assert ((levels > 250) & (levels < 750)).double().mean() > 0.7


def test_a_generator_depends_on_all_its_parts():
    draws = [torch.randn(2, generator=generator_of(*parts)) for parts in ((1, 2), (1, 2), (12,), (2, 1))]
    assert torch.equal(draws[0], draws[1])
    assert len({tuple(draw.tolist()) for draw in draws}) == 3


def test_pictures_of_the_class_are_completed_never_drawn_twice(recipe: Callable[..., Recipe], tmp_path: Path):
    folder = write_subject(tmp_path / "class", 1)
    settings = {
        "dreambooth__class_prompt": "a disc",
        "dreambooth__class_count": 6,
        "dreambooth__class_pictures": str(folder),
        "dreambooth__draw_batch_size": 2,
    }

    def prepare() -> None:
        made = recipe(**settings)
        pipeline: Any = make_pipeline(made)
        pipeline.prepare(pipeline.adapt(made.adapter, seed=0), tmp_path, Silent())

    prepare()
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(first) == ["00.png", *(f"generated-{number:06d}.png" for number in range(5))]
    assert len(set(first.values())) == 6
    (folder / "generated-000003.png").unlink()
    prepare()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


# Built-in recipes, the page, and the command line


@pytest.mark.parametrize("name", ["dreambooth-sd15", "dreambooth-tiny"])
def test_a_recipe_trains_two_steps_in_miniature_and_has_its_page(
    name: str, pipelines: Callable[[str], Path], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fields = {
        "model.path": pipelines("sd"),
        "data.train": pictures,
        "dreambooth.class_count": 2,
        "dreambooth.validation_prompts": "[a sks disc, a sks disc in the snow]",
        "dreambooth.validation_pictures": 1,
        "dreambooth.inference_steps": 2,
        "dreambooth.dino": tmp_path / "nowhere",
        "dreambooth.clip": tmp_path / "nowhere",
        "adapter.r": 4,
        "trainer.max_steps": 2,
    }
    given = [word for key, value in fields.items() for word in (f"--{key}", str(value))]
    out = tmp_path / "out"
    assert main(["train", name, *given, "-o", str(out)]) == 0
    shown = capsys.readouterr()
    assert "dino: not measured: model" in shown.err
    assert f"Report:      {out / 'report.html'}" in shown.out
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "DINO: not measured" in page
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.html").read_text() == page
    rows = [json.loads(line) for line in (out / "predictions-adapter.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows if "prompt" in row] == ["a sks disc", "a sks disc in the snow"]
    assert all((out / "pictures-adapter" / row["file"]).is_file() for row in rows if "file" in row)


def test_the_recipe_of_stable_diffusion_trains_as_many_parameters_as_it_says(pictures: Path):
    made = load_recipe("dreambooth-sd15", [("data.train", str(pictures))])
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8, sample_size=64)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964  # as published
    model = peft.get_peft_model(unet, peft_config(made.adapter, task_type=None))  # pyright: ignore[reportArgumentType]
    count = pica.coverage(model).trainable
    assert count == 32 * (2 * 8 * (320 + 640 + 1280) + 8 * 1280)
    assert f"{count:,}" in builtin_recipes()["dreambooth-sd15"]


def test_pointwise_convolutions_are_adapted_and_exported(
    recipe: Callable[..., Recipe], tmp_path: Path, pipelines: Callable[[str], Path]
):
    """Stable Diffusion 1 has them before and after its attention blocks."""
    made = recipe(adapter__target_modules=["to_q", "proj_in", "proj_out"], adapter__options={"init_weights": False})
    save_adapter(make_pipeline(made).adapt(made.adapter, seed=0), tmp_path / "adapter")
    pipeline, other = plain(pipelines("sd")), plain(pipelines("sd"))
    assert isinstance(pipeline.unet.mid_block.attentions[0].proj_in, torch.nn.Conv2d)
    before = drawn(pipeline)
    pica.load_into_pipeline(pipeline, tmp_path / "adapter")
    pica.export_lora(tmp_path / "adapter", tmp_path / "lora", engine="diffusers")
    other.load_lora_weights(str(tmp_path / "lora"))
    assert (drawn(other) - before).abs().max() > 1e-3
    torch.testing.assert_close(drawn(other), drawn(pipeline), atol=1e-4, rtol=0)
    larger = recipe(adapter__target_modules=["conv1"])
    with pytest.raises(TargetError, match="conv1"):
        make_pipeline(larger).adapt(larger.adapter, seed=0)


# Bad input


def test_a_picture_that_cannot_be_read_is_named_or_left_out(recipe: Callable[..., Recipe], tmp_path: Path):
    folder = write_subject(tmp_path / "some", 2)
    (folder / "broken.jpg").write_bytes(b"no picture at all")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        start(recipe(data__train=str(folder)), reporter=Silent())
    assert not (tmp_path / "out").exists()
    kept = load_splits(recipe(data__train=str(folder), data__skip_unreadable=True), get_task("dreambooth"))
    assert [Path(example.place).name for example in kept.train] == ["00.png", "01.png"]


def test_pictures_of_all_sizes_and_modes_become_one_kind(recipe: Callable[..., Recipe], tmp_path: Path):
    folder = tmp_path / "mixed"
    folder.mkdir()
    Image.new("RGBA", (50, 20), (255, 0, 0, 128)).save(folder / "rgba.png")
    Image.new("L", (7, 90), 100).save(folder / "grey.png")
    Image.new("P", (24, 24), 3).save(folder / "palette.gif")
    turned = Image.new("RGB", (40, 20), "blue")
    turned.putpixel((0, 0), (255, 255, 255))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif)
    (folder / "notes.txt").write_text("no one's business")
    result = start(recipe(data__train=str(folder), dreambooth__validation_pictures=0), reporter=Silent())
    assert result.metrics.problems.train == 4
    assert not (tmp_path / "out" / "grid.png").exists()
    assert result.metrics.not_measured["dino"] == "dreambooth.validation_pictures is 0"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data.train": "missing"}, "'missing' does not exist"),
        ({"data.train": "empty"}, "holds no pictures"),
        ({"data.train": "embedded"}, "data.train is not set"),
        ({"dreambooth.instance_prompt": None}, "instance_prompt is not set"),
        ({"dreambooth.class_pictures": "empty"}, "dreambooth.class_prompt"),
        ({"model.path": "empty"}, "no model_index.json"),
        ({"model.path": "classifier"}, "no model_index.json"),
        ({"task.metric": "accuracy"}, "task.metric"),
        ({"task.metric": "dino"}, "--dreambooth.dino"),
        ({"task.name": "images"}, "dreambooth"),
        ({"dreambooth.class_count": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_read(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], said: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "classifier").mkdir()
    (tmp_path / "classifier" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=said):
        recipe(**{key.replace(".", "__"): value for key, value in change.items()})


def test_a_wrong_model_folder_is_one_sentence(recipe: Callable[..., Recipe], tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        recipe(model__path=str(tmp_path))
    assert str(caught.value).count("model.path") == 1
    assert "config.json" not in str(caught.value)


def test_a_wrong_pipeline_or_size_is_refused(recipe: Callable[..., Recipe], tmp_path: Path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "AudioLDM2Pipeline"}')
    with pytest.raises(ConfigError, match="AudioLDM2Pipeline; task dreambooth knows StableDiffusionPipeline"):
        start(recipe(model__path=str(tmp_path / "other")), reporter=Silent())
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ConfigError, match="cannot be loaded"):
        start(recipe(model__path=str(tmp_path / "other")), reporter=Silent())
    with pytest.raises(ConfigError, match="multiple of 2"):
        start(recipe(dreambooth__resolution=25), reporter=Silent())
    with pytest.raises(ConfigError, match="at most 64"):
        start(recipe("sd3", dreambooth__resolution=128), reporter=Silent())
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_other_weights_is_refused_and_leaves_the_pipeline_alone(
    recipe: Callable[..., Recipe], tmp_path: Path, pipelines: Callable[[str], Path]
):
    made = recipe(adapter__options={"init_weights": False})
    adapter = tmp_path / "adapter"
    save_adapter(make_pipeline(made).adapt(made.adapter, seed=0), adapter)
    pipeline = plain(pipelines("sd"))
    before = drawn(pipeline)
    layer = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    kept = layer.weight.detach().clone()
    layer.weight.data = torch.randn_like(kept)
    with pytest.raises(BasisMismatchError, match="mid_block"):
        pica.load_into_pipeline(pipeline, adapter)
    pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.data = kept
    assert torch.equal(drawn(pipeline), before)
    pica.load_into_pipeline(pipeline, adapter)
    with pytest.raises(ConfigError, match="already"):
        pica.load_into_pipeline(pipeline, adapter)
    with pytest.raises(pica.errors.AdapterFileError, match="UNet2DConditionModel"):
        pica.load_into_pipeline(plain(pipelines("sd3")), adapter)
