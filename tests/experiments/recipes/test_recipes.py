"""Every built-in recipe, run in miniature: its model's own architecture with tiny sizes, its task's own form of data."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    DebertaV2Config,
    DebertaV2Model,
    GemmaConfig,
    LlamaConfig,
    PretrainedConfig,
)

from pica import coverage
from pica.experiments.adapters import peft_config
from pica.experiments.recipes.checks import REQUIRED
from pica.experiments.recipes.parsing import builtin_recipes, load_recipe
from pica.experiments.reporting import Silent
from pica.experiments.train.run import start
from pica.tasks.glue import GlueTask
from tests.experiments.tiny import write_tiny_llama
from tests.experiments.tiny_encoder import reviews, write_tiny_bert
from tests.experiments.tiny_vision import VIT, write_pictures, write_tiny_vision
from tests.tuners.base.test_counts import DEBERTA_V3_BASE, GEMMA_2B, GEMMA_7B, LLAMA_3_8B, VIT_B_16, on_meta

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_DECODER = {**_SMALL, "vocab_size": 258, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
_DEBERTA_V3: dict[str, Any] = {
    "vocab_size": 30,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}
_MINIATURES: dict[str, PretrainedConfig] = {
    "google/gemma-2b": GemmaConfig(**_DECODER, num_key_value_heads=1, head_dim=16),
    "google/gemma-7b": GemmaConfig(**_DECODER, num_key_value_heads=4, head_dim=16),
    "meta-llama/Meta-Llama-3-8B": LlamaConfig(**_DECODER, num_key_value_heads=1),
    "microsoft/deberta-v3-base": DebertaV2Config(**_SMALL, **_DEBERTA_V3),
    "google/vit-base-patch16-224-in21k": VIT,
}
PUBLISHED = {
    "gemma-2b-metamathqa": (GEMMA_2B, 5_373_952),
    "gemma-2b-metamathqa-r32": (GEMMA_2B, 671_744),
    "gemma-7b-metamathqa": (GEMMA_7B, 10_223_616),
    "gemma-7b-metamathqa-r16": (GEMMA_7B, 638_976),
    "llama-3-8b-metamathqa": (LLAMA_3_8B, 11_010_048),
    "llama-3-8b-metamathqa-r32": (LLAMA_3_8B, 1_376_256),
    "gemma-2b-commonsense": (GEMMA_2B, 5_373_952),
    "gemma-7b-commonsense": (GEMMA_7B, 5_111_808),
    **{f"deberta-v3-base-{name}": (DEBERTA_V3_BASE, 110_592) for name in GlueTask.subsets},
    "vit-b16-vtab": (VIT_B_16, 442_368),
}
# Those that differ from another one in numbers only need not be run each time.
_TWINS = {
    "gemma-2b-metamathqa-r32",
    "gemma-7b-metamathqa",
    "gemma-7b-metamathqa-r16",
    "llama-3-8b-metamathqa-r32",
    "gemma-7b-commonsense",
    *(f"deberta-v3-base-{name}" for name in ("cola", "sst2", "qnli", "qqp", "rte")),
}
# In test_dreambooth.py, test_preferences.py and test_rewards.py.
_ELSEWHERE = {"dreambooth-sd15", "dreambooth-tiny", "preference-tiny", "reward-tiny"}


def placeholders(name: str, folder: Path) -> list[tuple[str, Any]]:
    """Places for what only the user knows, so that a recipe can be read."""
    data = folder / "data.json"
    data.write_text("[]")
    given = yaml.safe_load(builtin_recipes()[name])
    (folder / "config.json").write_text("{}")
    if "test" not in given["data"]:  # the training folder's, and here there is none
        given["data"]["test"] = REQUIRED
    return [
        (f"{section}.{key}", str(folder if section == "model" else data))
        for section in ("model", "data")
        for key, value in given[section].items()
        if value == REQUIRED
    ]


def miniature(path: str, folder: Path) -> str:
    """A model folder with the architecture of a recipe's model."""
    if path == "embedded":
        return path
    config = _MINIATURES.get(path)
    if config is None:  # a small model that the user names: SmolLM2 is a Llama, MiniLM a BERT
        return str(folder)
    if isinstance(config, DebertaV2Config):
        write_tiny_bert(folder)
        DebertaV2Model(config).save_pretrained(folder)
    elif config is VIT:
        write_tiny_vision(folder)
    else:
        write_tiny_llama(folder)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == config.model_type
    return str(folder)


def write_data(task: str, subset: str | None, folder: Path) -> str:
    """A folder with a train and a test file of the task's form."""
    if task == "vtab":
        write_pictures(folder / "pictures", 40)
        listed = [f"{path.relative_to(folder)} {number}" for number, path in enumerate(folder.rglob("*.png"))]
        for name, lines in (("train800", listed[:20]), ("val200", listed[20:30]), ("test", listed[30:])):
            (folder / f"{name}.txt").write_text("\n".join(lines))
        return str(folder)
    for split, offset in (("train", 0), ("test", 50)):
        rows: list[dict[str, Any]] = []
        for number in range(offset, offset + (30 if split == "train" else 4)):
            if task == "math":
                rows.append({"query": f"{number} + 1?", "response": f"#### {number + 1}"})
            elif task == "arithmetic":
                solution = {"output": f"The answer is {number}.", "answer": str(number)}
                rows.append({"instruction": f"{number} + 0?", **solution})
            elif task == "commonsense":
                answer = ("true", "false")[number % 2]
                solution = {"output": f"the correct answer is {answer}", "answer": answer}
                rows.append({"instruction": f"{number}? Answer format: true/false", **solution})
            elif task == "sentiment":
                text, label = reviews(1, offset=number)[0]
                rows.append({"text": text, "label": label})
            else:
                fields = GlueTask().target(subset)
                labels = fields.labels or ("0.5", "3.5")
                names = {
                    "mnli": ("premise", "hypothesis"),
                    "qnli": ("question", "sentence"),
                    "qqp": ("question1", "question2"),
                }
                first, second = names.get(subset or "", ("sentence1", "sentence2"))
                text = reviews(1, offset=number)[0][0]
                row = {"label": labels[number % len(labels)]}
                rows.append(
                    row | ({"sentence": text} if subset in ("cola", "sst2") else {first: text, second: "so fine"})
                )
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in _TWINS else [])
        for name in builtin_recipes()
        if name not in _ELSEWHERE
    ],
)
def test_every_recipe_trains_two_steps_and_evaluates_in_miniature(name: str, tmp_path: Path):
    model, data = tmp_path / "model", tmp_path / "data"
    (tmp_path / "named").mkdir()
    given = yaml.safe_load(builtin_recipes()[name])
    data.mkdir()
    task = given["task"]
    place = write_data(task["name"], task.get("subset"), data)
    if given["model"]["path"] == REQUIRED:
        (write_tiny_bert if task["name"] == "sentiment" else write_tiny_llama)(model)
    changes: dict[str, Any] = {
        "model.path": miniature(given["model"]["path"], model),
        "data.train": place,
        "data.test": place,
        "data.train_limit": 20,
        "data.test_limit": 4,
        "data.validation_limit": 4,
        "adapter.r": 4,
        "trainer.max_steps": 2,
        "trainer.batch_size": 4,
        "trainer.accumulation": 2,
        "trainer.max_length": 200,
        "output": str(tmp_path / "out"),
    }
    if task["name"] not in ("glue", "sentiment", "vtab"):
        changes["task.max_new_tokens"] = 3
    if len(given["trainer"].get("learning_rates", [])) > 1:
        changes["trainer.learning_rates"] = given["trainer"]["learning_rates"][:1]
    if "baseline" in given:
        changes["baseline.learning_rates"] = given["baseline"]["learning_rates"][:1]
    metrics = start(load_recipe(name, list(changes.items())), reporter=Silent()).metrics
    assert metrics.adapter.training.steps == 2
    assert metrics.adapter.examples == 4
    assert 0 < metrics.adapter.loss < 20
    assert len((tmp_path / "out" / "predictions-adapter.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_papers_recipe_trains_as_many_parameters_as_the_paper_says(name: str, tmp_path: Path):
    recipe = load_recipe(name, placeholders(name, tmp_path))
    config, count = PUBLISHED[name]
    if recipe.task.name == "glue":
        with torch.device("meta"):
            base = AutoModelForSequenceClassification.from_config(config)
        model = peft.get_peft_model(base, peft_config(recipe.adapter, task_type="SEQ_CLS"))
    elif recipe.task.name == "vtab":
        with torch.device("meta"):
            vit = AutoModelForImageClassification.from_config(config)
        model = peft.get_peft_model(vit, peft_config(recipe.adapter, task_type=None))
    else:
        model = peft.get_peft_model(on_meta(config), peft_config(recipe.adapter))
    assert coverage(model).trainable == count
    assert f"{count:,}" in builtin_recipes()[name], "and the recipe's own head says so"


@pytest.mark.parametrize(
    "name", [name for name in PUBLISHED if name.endswith(("metamathqa", "r32", "r16", "commonsense"))]
)
def test_a_papers_recipe_has_the_references_settings(name: str, tmp_path: Path):
    trainer = load_recipe(name, placeholders(name, tmp_path)).trainer
    assert trainer.batch_size * trainer.accumulation == 64
    assert (trainer.weight_decay, trainer.max_length, trainer.precision) == (0.0, 512, "bfloat16")
    expected = ("linear", 100, 3) if "commonsense" in name else ("cosine", 0.1, 2)
    assert (trainer.schedule, trainer.warmup, trainer.epochs) == expected
