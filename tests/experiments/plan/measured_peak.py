"""A script: measures what a training step really takes, each case in a process of its own. Cases come as JSON on stdin.

Each case has the folder of a config.json, method, r, batch, length, dtype, quantization, target_parameters and
checkpointing; answers are bytes, as JSON.
"""

import ctypes
import gc
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import AutoConfig

import pica
from pica.experiments.models import quantisation
from pica.experiments.plan.tracing import _enable_checkpointing, example_inputs
from pica.experiments.recipes.recipe import ModelSection


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


def prepared(case: dict[str, Any], config: Any) -> tuple[Any, Any]:
    config.use_cache = False
    kind = getattr(transformers, config.architectures[0])
    model = kind._from_config(config, dtype=getattr(torch, case["dtype"]))
    if case["quantization"]:
        section = ModelSection(quantization=case["quantization"], dtype=case["dtype"])
        with tempfile.TemporaryDirectory() as place:
            model.save_pretrained(place)
            packing = quantisation(section)
            model = kind.from_pretrained(place, dtype=getattr(torch, case["dtype"]), quantization_config=packing)
            for parameter in model.parameters():  # what is not quantised keeps the whole file mapped, which counts too
                if type(parameter) is torch.nn.Parameter:
                    parameter.data = parameter.data.clone()
    own = pica.PicaConfig(r=case["r"], target_parameters=case["target_parameters"])
    if case["method"] == "lora":
        config_of: Any = peft.get_peft_model(model, own).peft_config["default"]
        targets = sorted(config_of.target_modules)
        model = kind._from_config(config, dtype=getattr(torch, case["dtype"]))
        model = peft.get_peft_model(model, peft.LoraConfig(r=case["r"], target_modules=targets))
    else:
        model = peft.get_peft_model(model, own)
    if case["checkpointing"]:
        _enable_checkpointing(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model.train(), torch.optim.AdamW(trained, lr=1e-3)


def step(model: Any, optimizer: Any, inputs: dict[str, torch.Tensor]) -> None:
    model(**inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def measure(case: dict[str, Any]) -> int:
    libc = ctypes.CDLL("libc.so.6")
    config = AutoConfig.from_pretrained(case["folder"])
    # a small step of the same kind first: libraries, kernels and their workspaces are then in memory
    model, optimizer = prepared(case, config)
    step(model, optimizer, example_inputs(model, 1, 8))
    del model, optimizer
    gc.collect()
    libc.malloc_trim(0)
    before = resident("VmRSS")
    model, optimizer = prepared(case, config)
    inputs = example_inputs(model, case["batch"], case["length"])
    step(model, optimizer, inputs)  # the moments exist from here on
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    step(model, optimizer, inputs)
    return resident("VmHWM") - before


def main() -> None:
    torch.set_num_threads(1)
    answers = []
    for case in json.load(sys.stdin):
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.write(writing, str(measure(case)).encode("ascii"))
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as answer:
            answers.append(int(answer.read() or -1))
        os.waitpid(child, 0)
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
