"""What each serving engine accepts of a LoRA adapter, in one table.

An engine that meets a field it does not know tends to ignore it without a word, so the table says what has to hold
for the adapter to have its full effect. Versions looked at: vLLM 0.33, SGLang 0.5.23, llama.cpp of llama-cpp-python
0.3, PEFT 0.21, diffusers 0.42; LoRAX by its source. docs/export.md gives the sources of each rule.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Literal

from pica.errors import ConfigError, RankError

EngineName = Literal["vllm", "sglang", "lorax", "llama.cpp", "diffusers", "peft"]

# Projections that engines stack into one weight: an adapter on one member goes wrong, or fails, without the others.
SIBLINGS: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Engine:
    """Rules of one engine.

    Attributes:
        name: As in `export_lora(engine=...)`.
        ranks: Ranks it accepts, in rising order; None: any.
        fast_rank: Largest rank on its fast path; None: no such limit is known.
        half_only: It computes adapters in float16 or bfloat16 only.
        complete_groups: q/k/v and gate/up must be adapted together (zero adapters do).
        every_layer: A module type must be adapted in every block, or it is dropped.
        plain_names: `target_modules` must be bare names such as "q_proj".
        modules_to_save: Fully trained modules that it takes; None: any.
        modules: Module names it can adapt; None: whatever the model has.
        serve: The command that serves the result, a format string; fields: base, folder, name, rank.
        in_python: `serve` is a line of Python rather than of a shell.
    """

    name: str
    serve: str
    ranks: tuple[int, ...] | None = None
    fast_rank: int | None = None
    half_only: bool = False
    complete_groups: bool = False
    every_layer: bool = False
    plain_names: bool = False
    modules_to_save: tuple[str, ...] | None = ()
    modules: tuple[str, ...] | None = None
    in_python: bool = False

    def legal_rank(self, rank: int) -> int:
        """Round a rank up to one that the engine serves.

        Returns:
            The smallest such rank that holds `rank` directions.
        Raises:
            RankError: There is none.
        """
        if self.ranks is None:
            return rank
        for legal in self.ranks:
            if legal >= rank:
                return legal
        raise RankError(
            f"{self.name} serves no LoRA of rank {rank}: its largest is {self.ranks[-1]}. "
            f"Export with rank={self.ranks[-1]} or less; the error of each layer is known beforehand."
        )

    def command(self, *, base: str, folder: str, name: str, rank: int) -> str:
        """The command line (or line of Python) that serves the exported folder."""
        quote = repr if self.in_python else shlex.quote
        return self.serve.format(base=quote(base), folder=quote(folder), name=quote(name), rank=rank)


_LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(
            "vllm",
            serve="vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules {name}={folder}",
            ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),
            half_only=True,
            modules_to_save=("classifier", "score"),
        ),
        Engine(
            "sglang",
            serve="python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank} "
            "--lora-paths {name}={folder}",
            half_only=True,
            complete_groups=True,
            plain_names=True,
        ),
        Engine(
            "lorax",
            serve="lorax-launcher --model-id {base} --adapter-id {folder} --adapter-source local",
            ranks=(8, *range(16, 513, 16)),
            fast_rank=128,
            half_only=True,
            every_layer=True,
            modules=_LLAMA_LAYERS,
        ),
        Engine("llama.cpp", serve="llama-server -m BASE.gguf --lora {folder}/adapter.gguf"),
        Engine("diffusers", serve="pipeline.load_lora_weights({folder})", in_python=True),
        Engine("peft", serve="PeftModel.from_pretrained(base_model, {folder})", modules_to_save=None, in_python=True),
    )
}


def find_engine(name: str | None) -> Engine | None:
    """Find an engine's rules.

    Args:
        name: A key of `ENGINES`.
    Returns:
        The rules; None for None.
    Raises:
        ConfigError: No such engine.
    """
    if name is None:
        return None
    if name not in ENGINES:
        raise ConfigError(f"engine={name!r} is unknown; use one of {', '.join(ENGINES)}.")
    return ENGINES[name]
