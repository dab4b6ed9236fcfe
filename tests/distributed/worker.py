"""What each process of a distributed test runs: jobs from a file, one after another in one process group.

To start two processes takes as long as many of these jobs, so they share them (see `work`). Tests call `fit` for the same
training in one process.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed.fsdp as fsdp_module
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import fully_shard
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import pica
from pica.basis import _progress, _split
from pica.experiments.interrupts import Interrupted
from pica.experiments.recipes.parsing import load_recipe
from pica.experiments.reporting import Silent
from pica.experiments.results.documents import result_document
from pica.experiments.train.run import resume as resume_run
from pica.experiments.train.run import start
from pica.tuners.base.sharding import in_parts, is_dtensor

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
CONFIGS = Path(__file__).parents[2] / "docs" / "accelerate"


def fsdp(version: int, **changes: Any) -> dict[str, Any]:
    """Arguments of a trainer: what the documentation's configuration file says, but for what a CPU cannot do."""
    fields = yaml.safe_load((CONFIGS / f"fsdp{version}.yaml").read_text())["fsdp_config"]
    plain = {key.removeprefix("fsdp_"): value for key, value in fields.items()}
    # Accelerate wants an accelerator to hand the weights of the first process on in FSDP1
    plain |= {"sync_module_states": False} if version == 1 else {"cpu_ram_efficient_loading": False}
    return {"fsdp": True, "fsdp_config": plain | changes}


def zero(stage: int, **changes: Any) -> dict[str, Any]:
    """Arguments of a trainer with the documentation's DeepSpeed settings, `changes` to those of ZeRO."""
    settings = json.loads((CONFIGS / f"zero{stage}.json").read_text())
    settings["zero_optimization"] |= changes
    return {"deepspeed": settings}


def tiny_model(**overrides: Any) -> LlamaForCausalLM:
    """A Llama with random weights, the same in each process."""
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides}))


def tiny_mixture() -> Qwen3MoeForCausalLM:
    """A mixture of four experts with random weights, the same in each process."""
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))


def adapted(model: Any = None, method: str = "pica", **settings: Any) -> peft.PeftModel:
    config = pica.PicaConfig if method == "pica" else pica.SvftConfig
    options = {"target_modules": TARGETS, **({"r": 8} if method == "pica" else {}), **settings}
    found = peft.get_peft_model(model or tiny_model(), config(**options))
    assert isinstance(found, peft.PeftModel)
    return found


def write_basis(folder: Path) -> None:
    """Directions of what the layers of `tiny_model` are given while it reads `rows`."""
    config = pica.PicaConfig(r=8, projection="activation", target_modules=TARGETS)
    pica.make_basis(tiny_model(), folder, config, data=[collate(rows())])


def rows() -> list[dict[str, list[int]]]:
    """Twelve sequences of five lengths."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 96, (12 + i % 5,), generator=generator).tolist() for i in range(12)]
    return [{"input_ids": text, "labels": text} for text in texts]


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], 0) for row in batch]),
        "labels": torch.tensor([padded(row["labels"], -100) for row in batch]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in batch]),
    }


def make_trainer(make: Callable[[], Any], folder: str, *, accumulation: int = 1, **arguments: Any) -> Trainer:
    """A trainer on global batches of four, whatever the number of processes.

    The model is made once the arguments are there, as DeepSpeed wants it: ZeRO-3 then loads it in parts.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": 4 // processes // accumulation,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 3,
        "learning_rate": 0.1,
        "optim": "sgd",  # Adam's first steps divide by gradients that are rounding in some entries
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
        **arguments,
    }
    _start_anew(fsdp=bool(settings.get("fsdp")), efficient=os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == "true")
    made = TrainingArguments(**settings)
    if settings.get("fsdp"):
        # Accelerate turns FSDP on for accelerators only. On a CPU everything else works, so it is told to.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        PartialState._shared_state["device"] = torch.device("cpu")
    model = make()
    return Trainer(model=model, args=made, train_dataset=rows(), data_collator=collate)  # pyright: ignore[reportArgumentType]


def resume(folder: str, **arguments: Any) -> dict[str, Any]:
    """Train for three steps, with a checkpoint after two; then the third anew from there, into `again`."""
    _start_anew(fsdp=False)
    # torch cannot restore the state of an optimizer that has none, as plain SGD
    settings = {"optim": "adamw_torch", "learning_rate": 0.01, **arguments}
    once = make_trainer(adapted, folder, save_strategy="steps", save_steps=2, **settings)
    once.train()
    once.save_model(folder)
    _start_anew(fsdp=False)
    again = make_trainer(adapted, folder, **settings)
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    again.save_model(f"{folder}/again")
    return {"once": outcome(once, folder), "again": outcome(again, folder)}


def load_when_sharded(folder: str, saved: str) -> dict[str, Any]:
    """A trained adapter, read into a model that FSDP2 has sharded; then a save that nobody has gathered."""
    trainer = make_trainer(adapted, folder, learning_rate=0.0, **fsdp(2))
    trainer.train()
    model: Any = trainer.model
    model.load_adapter(saved, "default", is_trainable=True)
    trainer.save_model(folder)
    return {
        "ungathered": complaint(lambda: pica.save_adapter(model, f"{folder}/ungathered")),
        "by PEFT": complaint(lambda: model.save_pretrained(f"{folder}/by PEFT")),
        "merged": complaint(model.merge_adapter),
    }


def complaint(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def load(base: str, **placement: Any) -> LlamaForCausalLM:
    """A model from its folder, split between the processes if so asked."""
    if not placement:
        return LlamaForCausalLM.from_pretrained(base)
    from transformers.distributed import DistributedConfig

    return LlamaForCausalLM.from_pretrained(base, distributed_config=DistributedConfig(**placement))


def _start_anew(*, fsdp: bool, efficient: bool = False) -> None:
    """Forget the kind of training of the job before."""
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [n for n in os.environ if n.startswith("FSDP_") or "DEEPSPEED" in n]:
        del os.environ[name]
    os.environ["ACCELERATE_USE_FSDP"] = str(fsdp).lower()
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(efficient).lower()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=True)


def fit(
    folder: str,
    *,
    base: str | None = None,
    mixture: str | None = None,
    placement: dict[str, Any] | None = None,
    adapter: dict[str, Any] | None = None,
    reentrant: bool | None = None,
    efficient: bool = False,
    before: bool = False,
    **arguments: Any,
) -> dict[str, Any]:
    """Train for three steps and save as users do; what came of it.

    Args:
        folder: Where to save.
        base: Folder of the base model; without one it is made anew.
        mixture: Folder of a mixture of experts, to adapt attention and experts of it in place of the base model.
        placement: Fields of a `DistributedConfig` to load it with.
        adapter: See `adapted`.
        reentrant: Which checkpointing, if any.
        efficient: Whether FSDP loads the weights in the first process only.
        before: Whether the model is made before the trainer's arguments, so that ZeRO-3 does not load it in parts.
        arguments: Of the trainer.
    """
    _start_anew(fsdp=efficient, efficient=efficient)
    if reentrant is not None:
        arguments |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    found: dict[str, Any] = {}

    def make() -> peft.PeftModel:
        loaded = None if base is None else load(base, **(placement or {}))
        settings = dict(adapter or {})
        if mixture is not None:
            loaded = Qwen3MoeForCausalLM.from_pretrained(mixture)
            settings |= {"target_modules": ["q_proj"], "target_parameters": STACKS, "basis_from": mixture}
        found["in parts"] = loaded is not None and in_parts(next(loaded.parameters()))
        with solved() as names:
            model = adapted(loaded, **settings)
        found["solved"] = names
        if reentrant is not None:
            model.enable_input_require_grads()
        return model

    made = make() if before else None
    trainer = make_trainer(lambda: made or make(), folder, **arguments)
    trainer.train()
    trainer.save_model(folder)
    return outcome(trainer, folder) | found


def outcome(trainer: Trainer, folder: str) -> dict[str, Any]:
    """Losses, gradient norms, bases and files."""
    history = [point for point in trainer.state.log_history if "loss" in point]
    return {
        "kind": str(trainer.accelerator.distributed_type.value),
        "losses": [point["loss"] for point in history],
        "norms": [float(point["grad_norm"]) for point in history],
        "bases": digest(trainer.model),  # pyright: ignore[reportArgumentType]
        "files": sorted(os.listdir(folder)) if trainer.is_world_process_zero() else None,
    }


def digest(model: torch.nn.Module) -> str:
    """Hash of all bases, bit for bit."""
    found = hashlib.sha256()
    for name, buffer in model.named_buffers():
        if "_basis_" in name:
            plain = ".".join(part for part in name.split(".") if part != "_fsdp_wrapped_module")
            found.update(plain.encode() + buffer.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextmanager
def solved() -> Iterator[list[str]]:
    """Names of the layers that this process solves (or reads from the cache) in the block."""
    names: list[str] = []
    original = _progress._solve

    def noting(request: Any, *arguments: Any) -> Any:
        names.append(request.name)
        return original(request, *arguments)

    _progress._solve = noting
    try:
        yield names
    finally:
        _progress._solve = original


def share(*, base: str | None = None, placement: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """Add an adapter; who solved what."""
    _start_anew(fsdp=False)
    model = None if base is None else load(base, **(placement or {}))
    with solved() as names:
        found = adapted(model, **settings)
    return {"solved": names, "bases": digest(found), "dtensors": sum(map(is_dtensor, found.parameters()))}


def share_without_switch() -> dict[str, Any]:
    """As `share`, with the work not shared out."""
    os.environ["PICA_SPLIT_BASIS"] = "0"
    try:
        return share()
    finally:
        del os.environ["PICA_SPLIT_BASIS"]


def share_a_broken_model() -> None:
    """One layer, and so one process, cannot be solved."""
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 4] = float("nan")
    adapted(model)


def different_models() -> dict[str, Any]:
    """Each process has weights of its own."""
    _split.LEAST_PATIENCE = 1.0
    model = tiny_model()
    torch.manual_seed(torch.distributed.get_rank())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    with solved() as names:
        found = adapted(model)
    return {"solved": names, "bases": digest(found)}


def first_process_alone() -> dict[str, Any]:
    """Only the first process adds an adapter, as a script that merges at its end may do."""
    _split.LEAST_PATIENCE = 1.0
    with solved() as names:
        if torch.distributed.get_rank() == 0:
            adapted(r=4)
    return {"solved": names}


def shard_first() -> None:
    """The wrong order: fully_shard, then the adapter."""
    model = tiny_model()
    fully_shard(model)
    adapted(model)


class _Interrupter(Silent):
    """Sends this process a SIGINT at the first step of the first training, if it is the second process."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted and torch.distributed.get_rank() == 1

    @contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[..., None]]:
        def advance(count: int = 1, note: str = "") -> None:
            if self.wanted and "rate" in label:
                self.wanted = False
                os.kill(os.getpid(), signal.SIGINT)

        yield advance


def run_recipe(
    fields: dict[str, Any], *, interrupt: bool = False, launch: str | None = None, **changes: Any
) -> dict[str, Any]:
    """What `pica train` does, interrupted in the second process if so asked, and then gone on with.

    Args:
        fields: The recipe.
        interrupt: Whether to.
        launch: The documentation's configuration file for `accelerate launch` that it is as if launched with.
        changes: See `launched_with`.
    """
    _start_anew(fsdp=False)
    reporter = _Interrupter(interrupt)
    stopped, otherwise = None, ""
    with launched_with(launch, **changes):
        try:
            result = start(load_recipe(None, list(fields.items())), reporter=reporter)
        except Interrupted as error:
            stopped = str(error.checkpoint)
            with _launched_otherwise(launch):
                otherwise = complaint(lambda: resume_run(Path(fields["output"]), reporter=reporter))
            result = resume_run(Path(fields["output"]), reporter=reporter)
    return {"stopped": stopped, "otherwise": otherwise, "metrics": result_document(result.metrics)}


@contextmanager
def _launched_otherwise(launch: str | None) -> Iterator[None]:
    """Without what `launch` tells, or with FSDP2 where that is nothing."""
    switches = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    with launched_with(None if launch else "fsdp2"):
        hidden = {name: os.environ.pop(name) for name in switches if launch and name in os.environ}
        try:
            yield
        finally:
            os.environ.update(hidden)


@contextmanager
def launched_with(launch: str | None, *, on_cpu: bool = True, **changes: str) -> Iterator[None]:
    """What `accelerate launch` with this file in docs/ tells its processes.

    Args:
        launch: Name of the file; None: nothing.
        on_cpu: Whether FSDP is to be used here, which Accelerate does on accelerators only.
        changes: Of the variables.
    """
    if launch is None:
        yield
        return
    arguments = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{launch}.yaml"), "-m", "pica"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    fields = getattr(defaults, "deepspeed_config", {})
    arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)  # as the command does
    told = prepare_deepspeed_cmd_env(arguments)[1] if arguments.use_deepspeed else prepare_multi_gpu_env(arguments)
    told = {key: value for key, value in told.items() if "FSDP" in key or "DEEPSPEED" in key} | changes
    if file := told.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):  # as seen from the folder that holds docs/
        told["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(CONFIGS.parents[1] / file)
    before = {name: os.environ.get(name) for name in told}
    original = PartialState.__init__

    def init(self: PartialState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        self._shared_state["device"] = torch.device("cpu")

    if on_cpu and "ACCELERATE_USE_FSDP" in told:
        PartialState.__init__ = init
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    os.environ.update(told)
    try:
        yield
    finally:
        PartialState.__init__ = original
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


JOBS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        fit,
        resume,
        load_when_sharded,
        share,
        share_without_switch,
        share_a_broken_model,
        different_models,
        first_process_alone,
        shard_first,
        run_recipe,
    )
}


def work(jobs_file: str) -> None:
    """Do the jobs [{"name", "job", "arguments"}] and write each process's results beside the file."""
    PartialState(cpu=True)
    torch.set_num_threads(1)
    # torch 2.13 frees the storage of gathered FSDP1 parameters on a CPU before their copies "offloaded" to it are read
    whole = fsdp_module.FullStateDictConfig
    fsdp_module.FullStateDictConfig = lambda **_: whole(offload_to_cpu=False, rank0_only=False)  # pyright: ignore
    if importlib.util.find_spec("deepspeed"):
        import deepspeed.comm.torch  # pyright: ignore[reportMissingImports]

        deepspeed.comm.torch.build_shm_op = lambda: None  # it would be compiled, for minutes; gloo does the same
    results: dict[str, Any] = {}
    for job in json.loads(Path(jobs_file).read_text()):
        begun = time.process_time()
        try:
            results[job["name"]] = partial(JOBS[job["job"]], **job["arguments"])()
        except Exception as error:
            results[job["name"]] = {
                "error": type(error).__name__,
                "message": str(error),
                "trace": traceback.format_exc(),
            }
        sys.stdout.write(f"{job['name']}: {time.process_time() - begun:.2f} s\n")
        Path(f"{jobs_file}.{os.environ['RANK']}").write_text(json.dumps(results))
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()
