"""What each process of a distributed test runs: jobs from a file, one after another in one process group.

To start two processes that import torch and transformers takes as long as a hundred of these jobs, so they share them.
Run by itself it does the jobs of a JSON file (see `main`); tests call `fit` for the same training in one process.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import pica

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
FSDP = {
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "state_dict_type": "FULL_STATE_DICT",
}
FSDP1 = {**FSDP, "version": 1, "use_orig_params": True, "sync_module_states": False}
"""Accelerate looks for an accelerator when it is to send the weights of the first process to the others."""
FSDP2 = {**FSDP, "version": 2}


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


def adapted(model: Any = None, method: str = "pica", **settings: Any) -> peft.PeftModel:
    config = pica.PicaConfig if method == "pica" else pica.SvftConfig
    options = {"r": 8, **settings} if method == "pica" else settings
    found = peft.get_peft_model(model or tiny_model(), config(target_modules=TARGETS, **options))
    assert isinstance(found, peft.PeftModel)
    return found


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


def make_trainer(model: Any, folder: str, *, accumulation: int = 1, **arguments: Any) -> Trainer:
    """A trainer on global batches of four, whatever the number of processes."""
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
    _start_anew(fsdp=bool(settings.get("fsdp")))
    made = TrainingArguments(**settings)
    if settings.get("fsdp"):
        # Accelerate turns FSDP on for accelerators only. On a CPU everything else works, so it is told to.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        PartialState._shared_state["device"] = torch.device("cpu")
    return Trainer(model=model, args=made, train_dataset=rows(), data_collator=collate)  # pyright: ignore[reportArgumentType]


def _start_anew(*, fsdp: bool) -> None:
    """Forget the kind of training of the job before."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [n for n in os.environ if n.startswith("FSDP_")]:
        del os.environ[name]
    os.environ["ACCELERATE_USE_FSDP"] = str(fsdp).lower()


def fit(
    folder: str, *, adapter: dict[str, Any] | None = None, reentrant: bool | None = None, **arguments: Any
) -> dict[str, Any]:
    """Train for three steps and save as users do; what came of it."""
    model = adapted(**(adapter or {}))
    if reentrant is not None:
        arguments |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        model.enable_input_require_grads()
    trainer = make_trainer(model, folder, **arguments)
    trainer.train()
    trainer.save_model(folder)
    history = [point for point in trainer.state.log_history if "loss" in point]
    return {
        "kind": str(trainer.accelerator.distributed_type.value),
        "losses": [point["loss"] for point in history],
        "norms": [float(point["grad_norm"]) for point in history],
        "bases": digest(model),
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


JOBS: dict[str, Callable[..., Any]] = {"fit": fit}


def main(jobs_file: str) -> None:
    """Do the jobs [{"name", "job", "arguments"}] and write each process's results beside the file."""
    torch.set_num_threads(1)
    # torch 2.13 frees the storage of gathered FSDP1 parameters on a CPU before their copies "offloaded" to it are read
    whole = torch.distributed.fsdp.FullStateDictConfig
    torch.distributed.fsdp.FullStateDictConfig = lambda **_: whole(offload_to_cpu=False, rank0_only=False)  # pyright: ignore
    results: dict[str, Any] = {}
    for job in json.loads(Path(jobs_file).read_text()):
        try:
            results[job["name"]] = partial(JOBS[job["job"]], **job["arguments"])()
        except Exception as error:
            results[job["name"]] = {
                "error": type(error).__name__,
                "message": str(error),
                "trace": traceback.format_exc(),
            }
        Path(f"{jobs_file}.{os.environ['RANK']}").write_text(json.dumps(results))
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    PartialState(cpu=True)
    main(sys.argv[1])
