"""A recipe: everything that decides a training run. The text under each field is its help on the command line.

Fields that a method's own configuration has too take their help, and what can be wrong with them, from there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from pica.tuners.pica.settings import PicaSettings, Projection
from pica.tuners.svft.settings import Pattern, SvftSettings


def _setting(method: str, settings: type[Any], name: str, more: str = "") -> Any:
    """A field of a method's own configuration, with its default and, after the method's name, its help."""
    found = next(found for found in fields(settings) if found.name == name)
    text = found.metadata["help"]
    return field(default=found.default, metadata={"help": f"{method}: {text[0].lower()}{text[1:]}{more}"})


@dataclass
class ModelSection:
    """The pre-trained model that is adapted."""

    path: str = "embedded"
    """Folder or hub name of a model; "embedded" is the small language model inside this package."""
    revision: str | None = None
    """Branch, tag or commit of a model on the hub."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Precision of the frozen weights; "auto" takes that of the model's files."""
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    """Quantise the frozen weights by bitsandbytes on loading; tasks that generate text only. Unquantised if unset."""
    attention: str | None = None
    """Attention implementation, for instance sdpa or eager; the model's own choice if unset."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; only for authors you trust. Same as --trust-remote-code."""


@dataclass
class DataSection:
    """Where the problems come from.

    A source is "embedded", a .json, .jsonl, .tsv, .csv (or .gz of these) or .parquet file, a folder with train, validation
    (dev) and test files, also as on the hub or saved by datasets, or hub:OWNER/NAME[/CONFIG][:SPLIT]. For pictures a file
    may also be .txt or .arrow, and a folder may hold folders.
    """

    train: dict[str, float] | list[str] | str = "embedded"
    """Source of the training problems. Tasks that write text: also several, [a.jsonl, b.jsonl], or each with its weight,
    {a.jsonl: 1, b.jsonl: 0.5}: how often each of its problems is learnt from in one pass."""
    validation: str | None = None
    """Source of the problems that choose between learning rates; if unset, the folder's, or out of the training ones."""
    test: dict[str, str] | str | None = None
    """Source of the problems that results are reported on, never used to choose anything; required with files, but for
    chat and preference, which take some of the training ones out. Tasks whose answers are scored: also several with names
    of yours, {gsm8k: gsm8k.jsonl, math: math.jsonl}; each gets its score, and their mean counts."""
    train_limit: int | None = None
    """Use at most this many training problems."""
    validation_limit: int | None = None
    """Use, or take out, this many for validation; if unset, all of a file, or a tenth of the training problems."""
    test_limit: int | None = None
    """Use at most this many test problems, of several sources of each; of classification files the seed draws them, of
    others they are the first."""
    columns: dict[str, str | dict[str, str]] = field(default_factory=dict)
    """Names of the task's fields in your files, for instance {question: prompt, solution: target}; of one split below its
    name: {train: {question: prompt}, test: {question: problem}}; of one of several sources below that, or below the name
    that data.test gives it."""
    hold_out: bool = False
    """Take validation problems out also where nothing is chosen by them, so that runs which choose learn from the same."""
    refit: bool = False
    """Train once more with the chosen learning rate, on training and validation problems together, and report on that."""
    skip_unreadable: bool = False
    """Pictures: leave those out that cannot be decoded, with a warning that names them, instead of refusing the data."""
    keep_test_problems: bool = False
    """Learn from training problems even if they are test problems too; published sets often overlap."""
    seed: int = 0
    """Decides which problems are generated or taken out for validation; the training seed does not."""


@dataclass
class TaskSection:
    """What is asked and how answers are scored."""

    name: str = "arithmetic"
    """Task: arithmetic, chat, commonsense, dreambooth, glue, images, math, preference, reward, sentiment or vtab."""
    subset: str | None = None
    """glue: which of the eight, for instance mrpc; vtab: which of the nineteen, for instance cifar; reward: whose problems,
    arithmetic, commonsense or math."""
    labels: list[str] | None = None
    """Classification: the classes in the order of the model's outputs; those of the training data if unset."""
    metric: str | None = None
    """Classification: what comes first: accuracy, f1, matthews; or pearson, spearman, which make it a regression.
    dreambooth: r2, dino, clip_i or clip_t."""
    scoring: Literal["generation", "likelihood"] = "generation"
    """commonsense: read the answer out of what the model writes, or take the likeliest of the choices."""
    template: str | None = None
    """Prompt: alpaca, question or plain; the task's own choice if unset."""
    max_new_tokens: int | None = None
    """Longest answer that is generated, in tokens; the task's own choice if unset."""
    loss: Literal["assistant", "last", "all"] = "assistant"
    """chat: learn all that the assistant says, only its last turn, or everything."""
    chat_template: str | None = None
    """chat, preference: alpaca, chatml or plain, a file, or the template itself; the model's own if unset."""
    system: str | None = None
    """chat, preference: a system prompt for conversations that have none."""
    answers: int = 3
    """chat, preference: answer the last question of this many held-out conversations, without and with the adapter."""


@dataclass
class DreamBoothSection:
    """Task dreambooth: words for the subject, pictures of its class, what is drawn."""

    instance_prompt: str | None = None
    """What the pictures of data.train show, with a rare word for the subject, for instance "a photo of sks dog"."""
    class_prompt: str | None = None
    """What anything of the subject's kind is called, for instance "a photo of a dog"; turns prior preservation on."""
    class_pictures: str | None = None
    """Folder of pictures of the class; missing ones are drawn into it before training. In the output folder if unset."""
    class_count: int = 100
    """Pictures of the class to learn from."""
    prior_weight: float = 1.0
    """Weight of the loss on pictures of the class."""
    resolution: int | None = None
    """Side of the pictures in pixels; the model's own if unset."""
    feed_forward: bool = False
    """Adapt the feed-forward layers beside the attention, where adapter.target_modules is unset."""
    train_text_encoder: bool = False
    """Adapt the attention of the (first) text encoder too, with the same method and rank."""
    validation_prompts: list[str] = field(default_factory=list)
    """Texts to draw before and after training; the instance prompt if empty."""
    validation_pictures: int = 4
    """Pictures of each of them, from noise that is the same before and after; 0 draws none."""
    inference_steps: int = 30
    """Denoising steps of a drawn picture."""
    guidance: float = 7.5
    """Classifier-free guidance of drawn pictures."""
    draw_batch_size: int = 4
    """Pictures that are drawn, or whose loss is measured, at a time."""
    noise_levels: int = 8
    """Levels, spread evenly, at which the loss on each picture is measured before and after."""
    dino: str | None = None
    """Folder or hub name of a ViT for the DINO score of drawn pictures, for instance facebook/dino-vits16."""
    clip: str | None = None
    """Folder or hub name of a CLIP for CLIP-I and CLIP-T, for instance openai/clip-vit-base-patch32."""


@dataclass
class PreferenceSection:
    """Task preference: direct preference optimisation (DPO)."""

    beta: float = 0.1
    """How strongly the model is held to what it was: what rewards are scaled by; lower lets it move further away."""


@dataclass
class RewardSection:
    """Task reward: group relative policy optimisation (GRPO).

    The reward is 1 for a right answer and 0 for another.
    """

    num_generations: int = 8
    """Answers to each problem, which are held against each other."""
    temperature: float = 1.0
    """Temperature at which they are sampled."""
    top_p: float = 1.0
    """Share of the probability that their words are chosen from."""
    beta: float = 0.0
    """Weight of the divergence from the model without its adapter; 0, which is usual, saves a forward pass."""
    test_generations: int = 4
    """Answers to each test problem that are sampled to measure the mean reward; 0 measures accuracy only."""


@dataclass
class AdapterSection:
    """The method that adapts the model."""

    method: str = "pica"
    """Method: pica, svft, full (the target modules' own weights), head (new layers only), or PEFT's lora, rslora, dora,
    pissa, mica, eva, adalora, vera, randlora, vblora, boft, psoft, ia3, miss."""
    r: int = 32
    """Rank, for methods that have one."""
    target_modules: list[str] | str | None = None
    """Layers to adapt: a list of names, one regular expression, or all-linear; the method's default if unset."""
    exclude_modules: list[str] | str | None = None
    """Layers to leave alone: a list of names or one regular expression."""
    layers_to_transform: list[int] | int | None = None
    """Indices of the blocks to adapt; all if unset."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks that differ from r, by layer name or regular expression, for instance {k_proj: 8}."""
    share: int | str | dict[str, str] | None = None
    """pica, svft: which layers share one matrix: role, none, a number of consecutive layers, or {regex: group}; if unset,
    role for pica and none for svft."""
    projection: Projection = _setting("pica", PicaSettings, "projection")
    basis_from: str | None = _setting(
        "pica", PicaSettings, "basis_from", " Projections that look at data make one if this is unset."
    )
    calibration: str = "train"
    """pica: what such a basis is made from: train (the training problems), embedded (a text in here), or a source."""
    calibration_tokens: int = 16384
    """pica: about how many tokens of it are read."""
    save_basis: bool = _setting("pica", PicaSettings, "save_basis")
    pattern: Pattern = _setting("svft", SvftSettings, "pattern")
    off_diagonals: int | None = _setting("svft", SvftSettings, "off_diagonals")
    lora_alpha: float | None = None
    """lora and its kin: numerator of the scale lora_alpha / r; if unset twice the rank (rslora: 16, pissa: r)."""
    lora_dropout: float = 0.0
    """lora: dropout on the adapter's input."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further fields of the method's PEFT configuration, for instance {boft_block_size: 8}."""


@dataclass
class TrainerSection:
    """How long and with what optimizer."""

    max_steps: int | None = None
    """Number of optimizer steps; overrides epochs."""
    epochs: float = 1.0
    """Passes over the training problems."""
    batch_size: int = 8
    """Problems in one forward pass."""
    accumulation: int = 1
    """Forward passes to one optimizer step; batch_size x accumulation is the effective batch."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    learning_rates: list[float] = field(default_factory=list)
    """Rates to choose from on validation problems, each trained in full; overrides learning_rate."""
    head_learning_rate: float | None = None
    """Classification: peak rate of newly made layers (the head); that of the adapter if unset."""
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Course of the learning rate after warm-up."""
    warmup: float = 0.1
    """Warm-up: a share of all steps if below 1, else a number of steps."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the trained parameters."""
    optimizer: str = "adamw_torch"
    """Any optimizer name that transformers' TrainingArguments.optim takes."""
    max_grad_norm: float = 1.0
    """Clip the gradient's norm here; 0 does not clip."""
    max_length: int = 512
    """Longest training sequence in tokens; longer ones are cut off at the end."""
    overflow: Literal["cut", "split", "drop"] = "cut"
    """chat: longer conversations are cut off, split into several rows, or left out; preference: cut off or left out."""
    packing: bool = False
    """chat: several conversations in one row of max_length, none of which sees another: no padding is computed."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the forward pass; the half ones use autocast."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    group_by_length: bool = False
    """Batch problems of similar length: less padding, but no longer uniformly random batches."""
    log_steps: int = 10
    """Steps between two points of the loss curve."""
    save_steps: int | None = None
    """Steps between two checkpoints; if unset only an interruption makes one."""
    eval_steps: int | None = None
    """Steps between two measurements of the loss on validation problems, which are then held out; none if unset."""
    keep_best: bool = True
    """With eval_steps: write the adapter with the lowest validation loss, not the last one."""
    patience: int | None = None
    """With eval_steps: stop after this many measurements in a row without a lower validation loss; never if unset."""
    sample_steps: int | None = None
    """chat, preference, reward: steps between two times that task.answers held-out questions are answered, into
    samples.jsonl; unset: never."""
    report_to: list[str] = field(default_factory=list)
    """Also log to these: tensorboard, wandb (files in the output folder's logs), trackio; each has to be installed."""
    eval_batch_size: int = 32
    """Problems in one forward pass when answering and measuring losses."""
    seed: int = 0
    """Decides the order of the data and random initial values."""
    threads: int | None = None
    """CPU threads; torch's choice if unset. The same adapter to the last bit needs the same number."""


@dataclass
class BaselineSection:
    """An optional second method, trained on the same data for as many steps."""

    method: str | None = None
    """Method to compare with, for instance lora; none if unset. Takes the adapter section's target_modules."""
    r: int = 1
    """Its rank."""
    learning_rates: list[float] = field(default_factory=lambda: [1e-3])
    """Its learning rates to choose from on validation problems, each trained in full."""


@dataclass
class Recipe:
    """A training run."""

    name: str = "run"
    """What the run is called."""
    output: str | None = None
    """Folder to write into; pica-NAME in the current folder if unset."""
    evaluate_base: bool = True
    """Measure the model before training too."""
    model: ModelSection = field(default_factory=ModelSection)
    """Model."""
    data: DataSection = field(default_factory=DataSection)
    """Data."""
    task: TaskSection = field(default_factory=TaskSection)
    """Task."""
    dreambooth: DreamBoothSection = field(default_factory=DreamBoothSection)
    """DreamBooth."""
    preference: PreferenceSection = field(default_factory=PreferenceSection)
    """Preference."""
    reward: RewardSection = field(default_factory=RewardSection)
    """Reward."""
    adapter: AdapterSection = field(default_factory=AdapterSection)
    """Adapter."""
    trainer: TrainerSection = field(default_factory=TrainerSection)
    """Trainer."""
    baseline: BaselineSection = field(default_factory=BaselineSection)
    """Baseline."""


def weights_of(train: Mapping[str, float] | Sequence[str] | str) -> dict[str, float]:
    """The sources of `data.train`, each with its weight."""
    if isinstance(train, Mapping):
        return dict(train)
    return {place: 1.0 for place in ([train] if isinstance(train, str) else train)}


def tests_of(test: Mapping[str, str] | str | None) -> dict[str, str]:
    """The sources of `data.test` by name; one alone has none, ""."""
    if isinstance(test, str):
        return {"": test}
    return dict(test or {})


def places_of(data: DataSection, split: str) -> list[str]:
    """Where the problems of one split are, as the recipe has it: none, one or several places."""
    if split == "train":
        return list(weights_of(data.train))
    if split == "test":
        return list(tests_of(data.test).values())
    return [data.validation] if data.validation is not None else []


def columns_of(columns: Mapping[str, str | Mapping[str, str]], split: str, place: str | None = None) -> dict[str, str]:
    """Find out what the columns of one split are called.

    Args:
        columns: As `data.columns`.
        split: Whose columns they are; validation problems that have no names of their own have those of the training
            problems.
        place: One of several sources of the split, of the test problems its name; what is named for that goes before.
    Returns:
        What is named for all splits, for this one and for the place.
    """
    chosen = {name: value for name, value in columns.items() if isinstance(value, str)}
    for own in (columns.get(split, columns.get("train") if split == "validation" else None), columns.get(place or "")):
        chosen |= dict(own) if isinstance(own, Mapping) else {}
    return chosen


def with_absolute_paths(recipe: Recipe) -> Recipe:
    """A copy whose local places are found from any folder, so that a run can be resumed and evaluated from anywhere."""

    def absolute(place: str | None) -> str | None:
        path = Path(place).expanduser() if place else None
        return str(path.resolve()) if path and place != "embedded" and path.exists() else place

    train = recipe.data.train
    tests = {name: absolute(place) for name, place in tests_of(recipe.data.test).items()}
    data: dict[str, Any] = {"validation": absolute(recipe.data.validation), "test": tests.get("", tests or None)}
    if isinstance(train, str):
        data["train"] = absolute(train)
    else:
        moved = {place: absolute(place) or place for place in train}
        weights = {moved[place]: weight for place, weight in weights_of(train).items()}
        data["train"] = weights if isinstance(train, dict) else list(weights)
        data["columns"] = {moved.get(name, name): value for name, value in recipe.data.columns.items()}
    pictures = {name: absolute(getattr(recipe.dreambooth, name)) for name in ("dino", "clip")}
    folder = recipe.dreambooth.class_pictures  # may be a folder that is still to be made
    return replace(
        recipe,
        model=replace(recipe.model, path=absolute(recipe.model.path)),
        data=replace(recipe.data, **data),
        adapter=replace(
            recipe.adapter,
            basis_from=absolute(recipe.adapter.basis_from),
            calibration=recipe.adapter.calibration
            if recipe.adapter.calibration == "train"
            else absolute(recipe.adapter.calibration) or "train",
        ),
        dreambooth=replace(
            recipe.dreambooth, **pictures, class_pictures=str(Path(folder).expanduser().resolve()) if folder else None
        ),
    )
