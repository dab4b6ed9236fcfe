"""Several sources with weights: what is held out, how often each is learnt from, and what is refused."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pica.errors import ConfigError
from pica.experiments.data import load_splits
from pica.experiments.mixing import described_sources, mixed
from pica.experiments.pipelines import make_pipeline
from pica.experiments.recipes.parsing import dump_recipe, load_recipe
from pica.experiments.recipes.recipe import Recipe, with_absolute_paths
from pica.experiments.train.origins import examples_digest
from pica.tasks import get_task
from pica.tasks.chat import Conversation, described


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recipe]:
    monkeypatch.chdir(tmp_path)
    chats = [
        [
            {"role": "user", "content": f"Hi {n}"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "x"},
        ]
        for n in range(20)
    ]
    Path("chats.jsonl").write_text("\n".join(json.dumps({"messages": one}) for one in chats))
    Path("sums.csv").write_text("frage,antwort\n" + "\n".join(f"{n}+{n}?,{2 * n}" for n in range(30)))
    Path("orders.json").write_text(json.dumps([{"instruction": f"Do {n}", "output": "Done."} for n in range(10)]))

    def make(train: object, **overrides: object) -> Recipe:
        given = {"model.path": "embedded", "task.name": "chat", "data.train": train}
        given["data.columns"] = {"sums.csv": {"prompt": "frage", "completion": "antwort"}}
        return load_recipe(None, list((given | {k.replace("__", "."): v for k, v in overrides.items()}).items()))

    return make


ALL = {"chats.jsonl": 2.5, "sums.csv": 0.5, "orders.json": 1}


def test_each_source_is_learnt_from_as_its_weight_says_and_never_from_what_is_held_out(recipe: Callable):
    splits = load_splits(
        recipe(ALL, data__test_limit=6, data__hold_out=True, data__validation_limit=6), get_task("chat")
    )
    assert len(splits.test) == len(splits.validation) == 6
    assert len({one.source for one in splits.test + splits.validation}) > 1, "taken out of all sources alike"
    taken, held = Counter(one.identity for one in splits.train), {e.identity for e in splits.test + splits.validation}
    assert not held & taken.keys()
    kept = {name: 0 for name in ALL}
    for name, count in (("chats.jsonl", 20), ("sums.csv", 30), ("orders.json", 10)):
        kept[name] = count - sum(one.source == name for one in splits.test + splits.validation)
    times = {
        name: [taken[one.identity] for one in {id(e): e for e in splits.train if e.source == name}.values()]
        for name in ALL
    }
    assert sorted(set(times["chats.jsonl"])) == [2, 3]
    assert sum(times["chats.jsonl"]) == 2 * kept["chats.jsonl"] + round(kept["chats.jsonl"] / 2)
    assert times["sums.csv"] == [1] * round(kept["sums.csv"] / 2)
    assert times["orders.json"] == [1] * kept["orders.json"]
    assert splits.train != sorted(splits.train, key=lambda one: one.source), "in random order"
    said = described_sources(splits.train, described)
    assert [line.split(":")[0] for line in sorted(said)] == ["chats.jsonl", "orders.json", "sums.csv"]
    count, passed = kept["chats.jsonl"], sum(times["chats.jsonl"])
    cut = f"{count} of which the last words are left out, as nobody answers them"
    assert f"{count} conversations, `messages`, one turn each, {cut}; {passed} in one pass" in " ".join(said)


def test_the_mix_is_of_the_seed_alone(recipe: Callable):
    one, same, other = (
        load_splits(with_absolute_paths(made), get_task("chat"))
        for made in (recipe(ALL), load_recipe_again(recipe(ALL)), recipe(ALL, data__seed=1))
    )
    assert one == same
    assert examples_digest(one.train) == examples_digest(same.train) != examples_digest(other.train)
    listed = load_splits(
        recipe(["chats.jsonl", "orders.json"], data__train_limit=12, data__columns={}), get_task("chat")
    )
    assert len(listed.train) == 12
    assert len({example.source for example in listed.train}) == 2, "a limit is one of the mix"


def load_recipe_again(made: Recipe) -> Recipe:
    Path("again.yaml").write_text(dump_recipe(with_absolute_paths(made)))
    assert yaml.safe_load(Path("again.yaml").read_text())["data"]["train"] == {
        str(Path(name).resolve()): weight for name, weight in ALL.items()
    }
    return load_recipe("again.yaml")


def test_a_small_share_takes_one_at_least():
    rows = [Conversation(text=str(n), source="a" if n else "b") for n in range(9)]
    found = mixed(rows, {"a": 1, "b": 0.01}, seed=0)
    assert Counter(one.source for one in found) == {"a": 8, "b": 1}


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"chats.jsonl": 0}, r"'chats.jsonl' has weight 0; a weight says how often"),
        ({"chats.jsonl": float("nan")}, "has weight nan"),
        ({"chats.jsonl": 1e9}, r"has weight 1e\+09; .* at most 1,000"),
        ({"chats.jsonl": -1, "nothing.jsonl": 1}, r"(?s)has weight -1.*'nothing.jsonl' does not exist"),
        ("{chats.jsonl: much}", "neither a list of sources"),
        (["chats.jsonl", "chats.jsonl"], r"occurs twice; give it the weight 2 instead, \{chats.jsonl: 2\}"),
        ({}, "names no source"),
        (["chats.jsonl", "embedded"], "learns from conversations of yours"),
    ],
)
def test_bad_weights_are_refused(recipe: Callable, train: object, said: str):
    with pytest.raises(ConfigError, match=said):
        recipe(train)


@pytest.mark.parametrize(
    ("task", "changes", "said"),
    [
        ("preference", {"task__chat_template": "plain"}, "`prompt/chosen/rejected as text`"),
        ("reward", {"task__subset": "arithmetic", "data__test": "test.json"}, "problems"),
        ("arithmetic", {"data__test": "test.json"}, "problems"),
    ],
)
def test_what_else_a_model_writes_is_learnt_from_several_sources_alike(
    recipe: Callable, task: str, changes: dict[str, object], said: str
):
    for name, count in (("few.json", 8), ("many.json", 24), ("test.json", 2)):
        rows = [
            {"prompt": f"{name} {n}", "chosen": "Yes.", "rejected": "No."}
            if task == "preference"
            else {"instruction": f"{name} {n}", "output": "The answer is 1.", "answer": "1"}
            for n in range(count)
        ]
        Path(name).write_text(json.dumps(rows))
    made = recipe({"few.json": 3, "many.json": 0.5}, task__name=task, data__columns={}, **changes)
    splits = load_splits(made, get_task(task))
    found = {name: [one for one in splits.train if one.source == name] for name in ("few.json", "many.json")}
    held = Counter(one.source for one in splits.test) if task == "preference" else Counter[str]()
    assert len(found["few.json"]) == 3 * (8 - held["few.json"])
    assert len(found["many.json"]) == round((24 - held["many.json"]) / 2)
    assert not {one.identity for one in splits.test} & {one.identity for one in splits.train}
    lines = make_pipeline(made).describe(splits.train)
    assert re.search(rf"few.json: \d+ (pairs, )?{said}; \d+ in one pass, \d+% of them all", "\n".join(lines))
    assert load_splits(made, get_task(task)) == splits


def test_several_sources_need_a_test_where_none_is_held_out(recipe: Callable):
    with pytest.raises(ConfigError, match="data.test is required when data.train is a file, names several sources or"):
        recipe({"orders.json": 1, "embedded": 2}, task__name="reward", task__subset="arithmetic", data__columns={})


def test_classifiers_have_one_source(recipe: Callable):
    with pytest.raises(ConfigError, match="names several sources, and task sentiment learns from one; name one"):
        recipe(["chats.jsonl"], task__name="sentiment", data__test="sums.csv")


@pytest.mark.parametrize("form", ["a mapping", "text"])
def test_named_test_problems_are_measured_each_and_their_mean_counts(recipe: Callable, form: str):
    rows = [{"question": f"{n} + {n}?", "answer": f"#### {2 * n}"} for n in range(9)]
    Path("gsm.jsonl").write_text("\n".join(json.dumps(one) for one in rows[:4]))
    Path("math.json").write_text(json.dumps([{"problem": f"{n}?", "solution": "\\boxed{x}"} for n in range(5)]))
    Path("train.json").write_text(json.dumps(rows[4:]))
    tests: object = (
        {"gsm": "gsm.jsonl", "own": "math.json"} if form == "a mapping" else "{gsm: gsm.jsonl, own: math.json}"
    )
    columns = {"own": {"question": "problem"}}
    made = recipe("train.json", task__name="math", data__test=tests, data__test_limit=3, data__columns=columns)
    assert Counter(one.group for one in load_splits(made, get_task("math")).test) == {"gsm": 3, "own": 3}
    moved = with_absolute_paths(made)
    assert isinstance(moved.data.test, dict)
    assert all(Path(place).is_absolute() for place in moved.data.test.values())
    assert load_recipe(str(_written(dump_recipe(moved)))) == moved


def _written(text: str) -> Path:
    path = Path("again.yaml")
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("task", "tests", "said"),
    [
        ("sentiment", {"a": "sums.csv", "b": "sums.csv"}, "task sentiment is measured on one; name one"),
        ("chat", {"a": "chats.jsonl"}, "task chat is measured on one; name one"),
        ("math", {}, "data.test names no source"),
        ("math", {"a": "nowhere.jsonl"}, "data.test: file 'nowhere.jsonl' does not exist"),
        ("math", "{a: b", "no sources with a name each"),
    ],
)
def test_what_cannot_be_measured_by_name_is_refused(recipe: Callable, task: str, tests: object, said: str):
    with pytest.raises(ConfigError, match=re.escape(said)):
        recipe("chats.jsonl", task__name=task, data__test=tests, data__columns={})
