"""Serve exported adapters with llama.cpp and compare logits and greedy text with transformers on the same base model.

    python tools/check_llama_cpp.py --llama-python VENV/bin/python --model ./smollm2-135m

VENV is an environment with llama-cpp-python (it compiles llama.cpp; a compiler and cmake are needed), and may lack all
else: it runs this file too, as a child process that reads token ids and writes logits. Two tiny random models are used,
a Llama (whose query and key rows llama.cpp permutes) and a Qwen2 (whose rows it keeps), and the one of --model. Prints a
table, writes JSON, and exits with status 1 where llama.cpp and transformers disagree.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROMPT_TOKENS, NEW_TOKENS = 24, 32
# Largest |difference of logits| allowed, as a share of the largest |logit|. With float16 weights llama.cpp rounds the
# activations that meet them to float16 too, which transformers in float32 does not.
BOUNDS = {"f32": 1e-3, "f16": 3e-2}
TEXT = (
    "The tide tables say that the harbour of Port Ellery is deepest at noon. "
    "The keeper of the harbour writes down each ship, its cargo, and the hour at which it came. "
)


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        return run_llama_cpp(Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--llama-python", type=Path, required=True, help="python of an environment with llama-cpp-python"
    )
    parser.add_argument("--model", type=Path, help="folder of one more model")
    parser.add_argument("--rank", type=int, default=32, help="rank of the PiCa adapter")
    parser.add_argument("--steps", type=int, default=20, help="training steps of the adapter")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, model, source in _models(given.model):
            rows += check_model(name, model, source, Path(folder) / name, given)
    header = ("model", "base", "export", "rank", "max |d logit|", "mean |d logit|", "effect", "top-1", "text", "ok")
    print("  ".join(header))
    for row in rows:
        print(
            f"{row['model']}  {row['base']}  {row['export']}  {row['rank']}  {row['max_difference']:.2e}  "
            f"{row['mean_difference']:.2e}  {row['effect']:.3g}  {row['same_top1']:.1%}  "
            f"{row['same_tokens']}/{row['new_tokens']}  {row['ok']}"
        )
    if given.output:
        report = {
            "what": "llama.cpp serving exported PiCa adapters, against transformers on the same base model",
            "machine": {"processor": platform.machine(), "python": platform.python_version()},
            "versions": {
                "llama_cpp_python": rows[0]["llama_cpp_python"],
                **{package: version(package) for package in ("gguf", "torch", "transformers", "peft")},
            },
            "bounds": BOUNDS,
            "results": [{k: v for k, v in row.items() if k != "llama_cpp_python"} for row in rows],
        }
        given.output.write_text(json.dumps(report, indent=2) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


def check_model(
    name: str, model: Any, source: Path | None, folder: Path, given: argparse.Namespace
) -> list[dict[str, Any]]:
    """Train a small adapter on `model`, export it exactly and truncated, and compare each export on each base file."""
    import torch
    from peft import get_peft_model

    import pica

    folder.mkdir()
    tokens = _tokens(source, model.config.vocab_size)
    rank = min(given.rank, model.config.hidden_size // 2)
    torch.manual_seed(0)
    trained = get_peft_model(model, pica.PicaConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    _train(trained, tokens, given.steps)
    prompt = tokens[:PROMPT_TOKENS]
    rows = []
    for base in BOUNDS:
        _round_weights(model, base)
        write_base(model, folder / f"{base}.gguf", base)
        for label, limit in (("exact", None), ("truncated", rank // 4)):
            target = folder / f"{label}-{base}"
            # float32 factors, so that a float16 base file is the only thing that is rounded
            done = pica.export_lora(trained, target, rank=limit, engine="llama.cpp", dtype="float32")
            job = folder / f"{label}-{base}.json"
            job.write_text(
                json.dumps(
                    {
                        "base": str(folder / f"{base}.gguf"),
                        "lora": str(target / "adapter.gguf"),
                        "prompt": prompt,
                        "new": NEW_TOKENS,
                    }
                )
            )
            subprocess.run([given.llama_python, __file__, "--child", job], check=True)
            served = json.loads(job.with_suffix(".out").read_text())
            reference = _with_lora(model, target)
            rows.append(
                {
                    "model": name,
                    "base": base,
                    "export": label,
                    "rank": done.plan.rank,
                    **_compare(reference, served, prompt, BOUNDS[base], _tokenizer(source)),
                }
            )
    return rows


def _compare(reference: Any, served: dict[str, Any], prompt: list[int], bound: float, tokenizer: Any) -> dict[str, Any]:
    import torch

    ids = torch.tensor([prompt])
    with torch.no_grad():
        wanted = reference(input_ids=ids).logits[0]  # (tokens, vocabulary)
        with reference.disable_adapter():
            without = reference(input_ids=ids).logits[0]
        text = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
        )[0, len(prompt) :].tolist()
    import numpy as np

    found = torch.from_numpy(np.load(served["logits"]))
    gap = (found - wanted).abs()
    same = sum(a == b for a, b in zip(text, served["tokens"]))
    effect = float((wanted - without).abs().max())
    agrees = float(gap.max()) <= bound * float(wanted.abs().max()) and float(gap.max()) < 0.1 * effect
    return {
        "max_difference": float(gap.max()),
        "mean_difference": float(gap.mean()),
        "largest_logit": float(wanted.abs().max()),
        "effect": effect,
        "same_top1": float((found.argmax(1) == wanted.argmax(1)).float().mean()),
        "same_tokens": same,
        "new_tokens": len(text),
        "text_transformers": tokenizer.decode(text) if tokenizer else None,
        "text_llama_cpp": tokenizer.decode(served["tokens"]) if tokenizer else None,
        "llama_cpp_python": served["version"],
        "ok": agrees and same == len(text),
    }


def write_base(model: Any, file: Path, dtype: str, tokenizer: Path | None = None) -> None:
    """A base model as GGUF, with matrices in `dtype`, and the tokens of the tokenizer in a folder: a server wants some."""
    import gguf
    import torch

    from pica.adapters.export.gguf import ARCHITECTURES, pair_rows

    config = model.config
    name, permutes = ARCHITECTURES[config.model_type]
    architecture = gguf.MODEL_ARCH[name]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type("model")
    writer.add_name(file.stem)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        _add_vocabulary(writer, tokenizer)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == "f32" else gguf.LlamaFileType.MOSTLY_F16)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for key, tensor in _plain_state(model).items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise SystemExit(f"{key} has no name in llama.cpp")
        for ending, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if permutes and f".{ending}." in key:
                tensor = pair_rows(tensor, heads)
        kept = torch.float16 if dtype == "f16" and tensor.ndim == 2 else torch.float32
        writer.add_tensor(found, tensor.to(kept).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_vocabulary(writer: Any, folder: Path) -> None:
    """The tokens of a byte-pair tokenizer. How text is cut before that is left out: the tools send token ids."""
    import gguf

    found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = {index: token for token, index in found["model"]["vocab"].items()}
    special = {each["id"]: each["content"] for each in found["added_tokens"]}
    tokens |= special
    kinds = (gguf.TokenType.CONTROL if index in special else gguf.TokenType.NORMAL for index in range(len(tokens)))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([tokens[index] for index in range(len(tokens))])
    writer.add_token_types(list(kinds))
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in found["model"]["merges"]])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def run_llama_cpp(job_file: Path) -> int:
    """In the environment of llama-cpp-python: logits of a prompt and the tokens that follow it greedily."""
    import llama_cpp  # pyright: ignore[reportMissingImports] - in another environment
    import numpy as np

    job = json.loads(job_file.read_text())
    llm = llama_cpp.Llama(
        job["base"],
        lora_path=job["lora"],
        n_ctx=len(job["prompt"]) + job["new"] + 8,
        n_threads=1,
        logits_all=True,
        type_k=0,  # float32 keys and values, as in transformers
        type_v=0,
        verbose=False,
    )
    llm.eval(job["prompt"])
    logits = np.array(llm.scores[: len(job["prompt"])], dtype=np.float32)
    tokens = []
    for _ in range(job["new"]):
        tokens.append(int(np.argmax(llm.scores[llm.n_tokens - 1])))
        llm.eval(tokens[-1:])
    np.save(job_file.with_suffix(".npy"), logits)
    result = {"logits": str(job_file.with_suffix(".npy")), "tokens": tokens, "version": llama_cpp.__version__}
    job_file.with_suffix(".out").write_text(json.dumps(result))
    return 0


def _models(folder: Path | None) -> list[tuple[str, Any, Path | None]]:
    """(name, model, folder of its tokenizer)."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 128,
        "intermediate_size": 224,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.1,
        "tie_word_embeddings": False,
    }
    models: list[tuple[str, Any, Path | None]] = [
        ("tiny-llama", LlamaForCausalLM(LlamaConfig(**sizes)).eval(), None),
        ("tiny-qwen2", Qwen2ForCausalLM(Qwen2Config(**sizes)).eval(), None),
    ]
    if folder is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        models.append((folder.name, model.eval(), folder))
    return models


def _tokenizer(folder: Path | None) -> Any:
    from transformers import AutoTokenizer

    return None if folder is None else AutoTokenizer.from_pretrained(folder)


def _tokens(folder: Path | None, vocabulary: int) -> list[int]:
    if folder is not None:
        return _tokenizer(folder)(TEXT).input_ids
    return [3 + (7 * i * i + 3 * i) % (vocabulary - 3) for i in range(2 * PROMPT_TOKENS)]


def _train(model: Any, tokens: list[int], steps: int) -> None:
    """Teach the adapter the text, so that it is a trained one and changes what follows."""
    import torch

    ids = torch.tensor([tokens])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    print(f"trained {steps} steps, loss {float(loss.detach()):.3f}", file=sys.stderr)


def _round_weights(model: Any, dtype: str) -> None:
    """Give transformers the very numbers that are in the base file; it computes with them in float32."""
    import torch

    from pica.tuners.pica.layer import PicaLinear

    if dtype == "f16":
        inner = {id(m.base_layer.weight) for m in model.modules() if isinstance(m, PicaLinear)}
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2 and (id(parameter) in inner or not parameter.requires_grad):
                    parameter.copy_(parameter.half().float())


def _plain_state(model: Any) -> dict[str, Any]:
    from pica.adapters.export.check import plain_copy

    return {k: v.detach() for k, v in plain_copy(model).state_dict().items()}


def _with_lora(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    from pica.adapters.export.check import plain_copy

    return PeftModel.from_pretrained(plain_copy(model), str(folder)).eval()


if __name__ == "__main__":
    sys.exit(main())
