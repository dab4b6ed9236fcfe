"""The blocks of docs/ecosystem.md, run as they stand there with tiny models, and what each has to bring about."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import peft
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer

import pica
from tests.experiments.tiny import write_tiny_llama
from tests.experiments.tiny_encoder import BAD, GOOD, write_tiny_bert

PAGE = Path(__file__).parents[1] / "docs" / "ecosystem.md"
NAMES = ["dpo", "dpo again", "reward", "grpo", "sentences", "mixed", "federated", "graph"]
PAIRS = [{"prompt": f"say {word}:", "chosen": " yes yes", "rejected": " no"} for word in ("a", "b", "c", "d")]


def blocks() -> dict[str, str]:
    found = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert len(found) == len(NAMES), "a block of the page has no test"
    return dict(zip(NAMES, found))


class Place:
    """A folder with tiny models and data, in which blocks of the page are run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = write_tiny_llama(folder / "llama")
        self.encoder = write_tiny_bert(folder / "bert")
        self.write("preferences.jsonl", PAIRS)
        self.write("prompts.jsonl", [{"prompt": row["prompt"]} for row in PAIRS])
        for client, words in (("north", "abc"), ("south", "xyz")):
            self.write(f"{client}.jsonl", [{"text": f"say {word}: yes {word} yes"} for word in words])
        pairs = [
            (f"the film is {one}", f"a {other} story") for side in (GOOD, BAD) for one, other in zip(side, side[1:])
        ]
        self.write("pairs.jsonl", [{"anchor": one, "positive": other} for one, other in pairs])

    def write(self, name: str, rows: list[dict[str, str]]) -> None:
        (self.folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(self, name: str) -> dict[str, Any]:
        """The names that a block leaves."""
        code = blocks()[name].replace("path/or/name", str(self.base)).replace("path/or/encoder", str(self.encoder))
        code = code.replace("bf16=False", "bf16=False, logging_steps=1")  # so that the first step can be looked at
        left: dict[str, Any] = {}
        torch.manual_seed(0)
        exec(compile(code, f"{PAGE.name}, {name}", "exec"), left)
        return left


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    made = Place(tmp_path_factory.mktemp("ecosystem"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made.folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", made.folder / "cache")
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield made


@pytest.fixture(scope="module")
def dpo(place: Place) -> dict[str, Any]:
    return place.run("dpo")


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def ids(place: Place) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(place.base)
    return dict(tokenizer([row["prompt"] + row["chosen"] for row in PAIRS], return_tensors="pt"))


@torch.no_grad()
def logits(model: Any, place: Place) -> torch.Tensor:
    return model.eval()(**ids(place)).logits


@torch.no_grad()
def margins(policy: Any, reference: Any, place: Place) -> torch.Tensor:
    """How much more the policy prefers the chosen answers than the reference does, in nats; by the plain formula."""
    tokenizer = AutoTokenizer.from_pretrained(place.base)

    def answer(model: Any, row: dict[str, str], which: str) -> torch.Tensor:
        prompt = tokenizer(row["prompt"])["input_ids"]
        whole = torch.tensor([[*tokenizer(row["prompt"] + row[which])["input_ids"], tokenizer.eos_token_id]])
        shares = model.eval()(input_ids=whole).logits[0, :-1].log_softmax(-1)
        return shares.gather(1, whole[0, 1:, None])[len(prompt) - 1 :].sum()

    return torch.stack(
        [
            answer(policy, row, "chosen")
            - answer(reference, row, "chosen")
            - answer(policy, row, "rejected")
            + answer(reference, row, "rejected")
            for row in PAIRS
        ]
    )


def test_dpo_starts_at_the_model_without_adapter_and_learns_the_preference(dpo: dict[str, Any], place: Place):
    trainer = dpo["trainer"]
    assert trainer.ref_model is None
    base = AutoModelForCausalLM.from_pretrained(place.base)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained("dpo")
    assert isinstance(loaded.peft_config["default"], pica.PicaConfig)
    assert torch.equal(logits(loaded, place), logits(trainer.model, place))
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6), "policy and reference begin as one"
    assert logged(trainer, "rewards/margins")[0] == pytest.approx(0, abs=1e-6)
    assert (margins(loaded, base, place) > 0).all()
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded, place), logits(base, place))


def test_dpo_on_an_adapter_refers_to_that_adapter_as_it_was(dpo: dict[str, Any], place: Place):
    before = logits(dpo["trainer"].model, place)
    trainer = place.run("dpo again")["trainer"]
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    after = logits(trainer.model, place)
    trainer.model.set_adapter("ref")
    torch.testing.assert_close(logits(trainer.model, place), before, msg="the reference is the adapter that was given")
    assert not torch.allclose(after, before, atol=1e-4)
    assert not Path("dpo-again", "ref").exists()
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained("dpo-again")
    torch.testing.assert_close(logits(loaded, place), after)
    first = peft.AutoPeftModelForCausalLM.from_pretrained("dpo")
    assert (margins(loaded, first, place) > 0).all()


@pytest.mark.parametrize("pattern", ["plain", "banded"])
def test_svft_goes_through_dpo_as_well(place: Place, pattern: Literal["plain", "banded"]):
    """From an adapter that has been trained: TRL finds its parameters by name, and copies them for the reference."""
    config = pica.SvftConfig(pattern=pattern, off_diagonals=2 if pattern == "banded" else None, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(place.base), config)
    untrained = logits(model, place)
    for value in model.parameters():
        if value.requires_grad:
            torch.nn.init.normal_(value, generator=torch.Generator().manual_seed(0))
    before = logits(model, place)
    assert not torch.allclose(before, untrained, atol=1e-2)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(output_dir="svft", learning_rate=1e-2, max_steps=3, logging_steps=1, bf16=False),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(place.base),
    )
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert not torch.allclose(logits(model, place), before, atol=1e-4)
    model.set_adapter("ref")
    torch.testing.assert_close(logits(model, place), before)


def test_a_reward_model_is_stored_with_its_head(place: Place):
    left = place.run("reward")
    trained, judge = left["trainer"].model, left["judge"]
    scores = logits(judge, place)
    assert scores.shape == (len(PAIRS), 1)
    torch.testing.assert_close(scores, logits(trained, place))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        another = AutoModelForSequenceClassification.from_pretrained(place.base, num_labels=1)
    another.config.pad_token_id = judge.config.pad_token_id
    loaded = peft.PeftModel.from_pretrained(another, "reward")
    torch.testing.assert_close(logits(loaded, place), scores, msg="whatever head the base happens to have")
    others = [name for name, value in trained.named_parameters() if value.requires_grad and "pica_M" not in name]
    assert others == ["base_model.model.score.modules_to_save.default.weight"]
    assert logged(left["trainer"], "accuracy")[-1] > 0.9


def test_grpo_holds_to_the_model_without_adapter(place: Place):
    trainer = place.run("grpo")["trainer"]
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained("grpo")
    base = AutoModelForCausalLM.from_pretrained(place.base)
    assert torch.equal(logits(loaded, place), logits(trainer.model, place))
    assert not torch.allclose(logits(loaded, place), logits(base, place), atol=1e-4)
    assert all(math.isfinite(value) for value in logged(trainer, "loss"))
    divergence = logged(trainer, "kl")
    assert divergence[0] == pytest.approx(0, abs=1e-6), "policy and reference begin as one"
    assert divergence[-1] > 1e-6


def kto(place: Place, shared: dict[str, Any]) -> Any:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in PAIRS]
    rows += [{"prompt": row["prompt"], "completion": row["rejected"], "label": False} for row in PAIRS]
    return KTOTrainer(
        args=KTOConfig(output_dir="kto", **shared.pop("args")), train_dataset=Dataset.from_list(rows), **shared
    )


def rloo(place: Place, shared: dict[str, Any]) -> Any:
    arguments = RLOOConfig(output_dir="rloo", num_generations=2, max_completion_length=8, **shared.pop("args"))
    rows = Dataset.from_list([{"prompt": row["prompt"]} for row in PAIRS])
    return RLOOTrainer(
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=arguments,
        train_dataset=rows,
        **shared,
    )


@pytest.mark.parametrize("make", [kto, rloo])
def test_the_other_trainers_that_the_page_names(place: Place, make: Callable[[Place, dict[str, Any]], Any]):
    shared = {
        "model": str(place.base),
        "peft_config": pica.PicaConfig(r=4, task_type="CAUSAL_LM"),
        "args": {"learning_rate": 1e-2, "max_steps": 2, "bf16": False, "per_device_train_batch_size": 4},
    }
    torch.manual_seed(0)
    trainer = make(place, shared)
    trainer.train()
    trainer.save_model()
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(trainer.args.output_dir)
    assert torch.equal(logits(loaded, place), logits(trainer.model, place))
    with loaded.disable_adapter():
        untrained = logits(loaded, place)
    assert not torch.allclose(logits(loaded, place), untrained, atol=1e-4)


def test_sentence_embeddings_are_those_of_the_stored_adapter(place: Place):
    left = place.run("sentences")
    texts = ["the film is fine", "its end was dull"]
    trained = torch.tensor(left["model"].encode(texts))
    torch.testing.assert_close(torch.tensor(left["again"].encode(texts)), trained)
    from sentence_transformers import SentenceTransformer

    plain = torch.tensor(SentenceTransformer(str(place.encoder)).encode(texts))
    assert not torch.allclose(trained, plain, atol=1e-3)
    assert list(Path("embedder").rglob("adapter_model.safetensors"))
    weights = [path.name for path in Path("embedder").rglob("*.safetensors")]
    assert weights == ["adapter_model.safetensors"], "the model's weights stay where they are"


def test_mixing_with_another_method_goes_through_the_exported_lora(dpo: dict[str, Any], place: Place):
    mixed = place.run("mixed")["mixed"]
    trained = logits(dpo["trainer"].model, place)
    torch.testing.assert_close(logits(mixed, place), trained, rtol=1e-4, atol=1e-4)  # LoHa starts from nothing
    for name, value in mixed.named_parameters():
        if "hada" in name and ".more" in name:
            torch.nn.init.normal_(value, generator=torch.Generator().manual_seed(0))
    both = logits(mixed, place)
    assert not torch.allclose(both, trained, atol=1e-2)
    mixed.set_adapter(["more"])
    assert not torch.allclose(logits(mixed, place), both, atol=1e-3)
    base = AutoModelForCausalLM.from_pretrained(place.base)
    with pytest.raises(ValueError, match="'PICA' is not compatible with the `PeftMixedModel`"):
        peft.get_peft_model(base, pica.PicaConfig(r=4), mixed=True)


def test_federated_clients_meet_in_the_weighted_mean_of_their_updates(dpo: dict[str, Any], place: Place):
    place.run("federated")
    folders = ["dpo", "north", "south", "round-2"]
    start, north, south, mean = (peft.AutoPeftModelForCausalLM.from_pretrained(folder) for folder in folders)
    updates = [
        {n: m.get_delta_weight("default") for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
        for model in (north, south, mean)
    ]
    assert updates[0]
    for name in updates[0]:
        torch.testing.assert_close(updates[2][name], 0.75 * updates[0][name] + 0.25 * updates[1][name])
    assert not torch.allclose(logits(mean, place), logits(start, place), atol=1e-4)
    state = pica.average_adapters([peft.get_peft_model_state_dict(m) for m in (north, south)], weights=[3, 1])
    peft.set_peft_model_state_dict(start, state)
    torch.testing.assert_close(logits(start, place), logits(mean, place))


def test_the_graph_of_a_merged_model_holds_for_any_length(dpo: dict[str, Any], place: Place):
    place.run("graph")
    graph = torch.export.load("merged.pt2").module()
    model = peft.AutoPeftModelForCausalLM.from_pretrained("dpo").eval()
    with torch.no_grad():
        for length in (5, 40):
            ids = torch.arange(length)[None] % 20 + 3
            torch.testing.assert_close(graph(ids), model(input_ids=ids).logits, rtol=0, atol=1e-5)
            with model.disable_adapter():
                assert not torch.allclose(graph(ids), model(input_ids=ids).logits, atol=1e-5)
